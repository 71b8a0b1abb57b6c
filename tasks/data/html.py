r"""HTML of a post -> Markdown: ATX headings, fenced code with its language, lists, links, quotes, MathJax.

`_` and `*` of prose are not escaped: a backslash inside `$x_1$` breaks the formula, and in prose a language
model should read and write what people typed.

Two converters with one result: markdownify (`convert_slowly`) says what is right, markdownify-rs is thirty
times as fast. The fast one gets only HTML that is plain and well-formed, as Stack Exchange's sanitiser writes
it; where the two read broken HTML differently, the slow one is asked.
"""

from __future__ import annotations

import re
import warnings
from html.entities import name2codepoint
from typing import Any

import markdownify_rs
from bs4 import MarkupResemblesLocatorWarning, ParserRejectedMarkup
from markdownify import MarkdownConverter

LANGUAGE = re.compile(r"lang(?:uage)?-([\w+#-]+)$")
IMAGE = re.compile(r"!\[[^]]*\]\([^)]*\)")
WORD = re.compile(r"\w")
LINK_TARGET = re.compile(r"\]\([^)]*\)")
OPTIONS = {
    "heading_style": "atx",
    "bullets": "-",
    "escape_asterisks": False,
    "escape_underscores": False,
    "sub_symbol": "<sub>",
    "sup_symbol": "<sup>",  # 10<sup>2</sup> must not become 102
}
TAGS = "p|a|code|pre|em|strong|b|i|ul|ol|li|blockquote|h[1-6]|br|hr|img|sup|sub|kbd|del|s|strike|div|span"
REFERENCE = (  # the common ones first; an alternation is tried in order
    rf"&(?:amp|lt|gt|quot|{'|'.join(sorted(name2codepoint))}"
    r"|\#(?:3[2-9]|[4-9][0-9]|[1-9][0-9]{2,3})|\#x(?:[2-9a-fA-F]|[1-9a-fA-F][0-9a-fA-F])[0-9a-fA-F]);"
)
ATTRIBUTE = rf'\ [a-z]++="(?:[^"<>&\x00-\x1f]++|{REFERENCE})*+"'
COMMENT = r"<!--\ [a-z][a-z:\ ]*+-->"
PLAIN = re.compile(
    rf"(?:[^<&\x00-\x08\x0b-\x1f]++|{REFERENCE}|</?(?:{TAGS})(?:{ATTRIBUTE})*+\ ?/?>|{COMMENT})*+",
    re.VERBOSE,
)
TAG = re.compile(r"<(/?)([a-z][a-z0-9]*)([^>]*)>")
VOID = {"br", "hr", "img"}
DEEPEST = 40  # of what the fast converter gets; ten levels are rare in a post
LANGUAGE_MARK = "\x01"  # no post has it: XML forbids it


class HTMLError(ValueError):
    """HTML that cannot be converted, for instance nested a thousand deep."""


def to_markdown(html: str) -> str:
    """Convert the HTML of one post; "" for HTML without content.

    Raises:
        HTMLError: the converter gives up.
    """
    languages = _languages_if_plain(html)
    if languages is None:
        return convert_slowly(html)
    if not languages:
        return _FAST.convert(html).strip()
    first, *parts = _FAST_WITH_MARKS.convert(html).strip().split(LANGUAGE_MARK)
    if len(parts) != len(languages):
        return convert_slowly(html)
    return first + "".join(language + part for language, part in zip(languages, parts, strict=True))


def convert_slowly(html: str) -> str:
    """What `to_markdown` is held to: the same, by markdownify alone."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", MarkupResemblesLocatorWarning)  # a body that is one URL is fine
            return _SLOW.convert(html).strip()
    except (RecursionError, ValueError, AssertionError, ParserRejectedMarkup) as error:
        # deep nesting; <ol start="²">; <![broken marked sections
        raise HTMLError(f"{type(error).__name__}: {error}") from None


def has_words(markdown: str) -> bool:
    """Whether a reader of plain text finds anything: images and link targets alone are nothing."""
    if "](" in markdown:
        markdown = LINK_TARGET.sub("]", IMAGE.sub("", markdown))
    return WORD.search(markdown) is not None


def _languages_if_plain(html: str) -> list[str] | None:
    """The languages of its code blocks, [] where none is named; None for HTML that is not plain.

    Plain means: known tags and references only, every tag closed by its own, and no fence inside.
    """
    if "```" in html or not PLAIN.fullmatch(html):
        return None
    languages: list[str] = []
    nested: list[str] = []
    for closing, name, attributes in TAG.findall(html):
        if closing:
            if not nested or nested.pop() != name:
                return None
        elif name not in VOID:
            if attributes.endswith("/") or len(nested) == DEEPEST or (name == "pre" and "pre" in nested):
                return None
            nested.append(name)
            if name == "pre":
                languages.append(_language_of(attributes))
    if nested:
        return None
    return languages if any(languages) else []


def _language_of(attributes: str) -> str:
    classes = re.search(r' class="([^"]*)"', attributes)
    return _first_language(classes.group(1).split() if classes else [])


def _first_language(classes: list[str]) -> str:
    found = (LANGUAGE.match(name) for name in classes)
    return next((match.group(1) for match in found if match and match.group(1) != "none"), "")


class _Converter(MarkdownConverter):
    """markdownify, with fences that are longer than any run of backticks inside, and the code's language."""

    def convert_pre(self, el: Any, text: str, parent_tags: set[str]) -> str:
        fenced = super().convert_pre(el, text, parent_tags)
        longest = max(map(len, re.findall(r"`{3,}", text)), default=0)
        if not longest:
            return fenced
        fence = "`" * (longest + 1)
        return f"\n\n{fence}{fenced.strip()[3:-3]}{fence}\n\n"


def _language(pre: Any) -> str:
    """The language of a code block, "py" for `<pre class="lang-py prettyprint-override">`; else ""."""
    return _first_language([name for name in pre.get_attribute_list("class") if name])


_SLOW = _Converter(code_language_callback=_language, **OPTIONS)
_FAST = markdownify_rs.MarkdownConverter(**OPTIONS)
_FAST_WITH_MARKS = markdownify_rs.MarkdownConverter(code_language=LANGUAGE_MARK, **OPTIONS)

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
from collections.abc import Sequence
from typing import Any

import markdownify_rs
from bs4 import MarkupResemblesLocatorWarning, ParserRejectedMarkup
from markdownify import MarkdownConverter

from tasks.data.plain import first_language, languages_if_plain

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
TEXTS_AT_A_TIME = 2000  # a few megabytes, which the processor's cache holds
LANGUAGE_MARK = "\x01"  # no post has it: XML forbids it


class HTMLError(ValueError):
    """HTML that cannot be converted, for instance nested a thousand deep."""


def to_markdowns(texts: Sequence[str]) -> list[str | None]:
    """The HTML of many posts as Markdown; None where the converter gives up."""
    found: list[str | None] = []
    for start in range(0, len(texts), TEXTS_AT_A_TIME):
        part = texts[start : start + TEXTS_AT_A_TIME]
        found += map(_converted, part, languages_if_plain(part))
    return found


def to_markdown(html: str) -> str:
    """Convert the HTML of one post; "" for HTML without content.

    Raises:
        HTMLError: the converter gives up.
    """
    return _convert(html, *languages_if_plain([html]))


def _converted(html: str, languages: Sequence[str] | None) -> str | None:
    try:
        return _convert(html, languages)
    except HTMLError:
        return None


def _convert(html: str, languages: Sequence[str] | None) -> str:
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
    if WORD.search(markdown, 0, max(0, markdown.find("["))):  # nearly all
        return True
    if "](" in markdown:
        markdown = LINK_TARGET.sub("]", IMAGE.sub("", markdown))
    return WORD.search(markdown) is not None


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
    return first_language([name for name in pre.get_attribute_list("class") if name])


_SLOW = _Converter(code_language_callback=_language, **OPTIONS)
_FAST = markdownify_rs.MarkdownConverter(**OPTIONS)
_FAST_WITH_MARKS = markdownify_rs.MarkdownConverter(code_language=LANGUAGE_MARK, **OPTIONS)

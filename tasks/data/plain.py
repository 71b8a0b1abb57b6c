"""Which HTML is plain: known tags and references only, every tag closed by its own.

Plain HTML is what two converters read alike (`tasks.data.html`). Where tags begin and end is found over the
bytes of many texts at once, in numpy; only tags and references that differ are looked at one by one.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from html.entities import name2codepoint

import numpy as np
import pyarrow as pa

NAMES = (
    "p a code pre em strong b i ul ol li blockquote h1 h2 h3 h4 h5 h6 br hr img sup sub kbd del s strike "
    "div span table thead tbody tr th td"
).split()
INSIDE = {  # places in NAMES: a part of a table, and what it can be a part of
    NAMES.index(part): [NAMES.index(name) for name in names.split()]
    for part, names in {
        "thead": "table", "tbody": "table", "tr": "table thead tbody", "th": "tr", "td": "tr",
    }.items()
}  # fmt: skip
PLACES = {name.encode(): place for place, name in enumerate(NAMES)}
PRE = NAMES.index("pre")
VOID = {NAMES.index(name) for name in ("br", "hr", "img")}
TAG = re.compile(
    rb'(/?)([a-z]+[1-6]?)((?:\ [a-z-]++="[^"<>\x00-\x1f]*+")*+)\ ?(/?)'  # close, name, attributes, end
)
COMMENT = re.compile(rb"!--\ [a-z][a-z:\ ]*+--")
REFERENCE = re.compile(
    rf"&(?:{'|'.join(name2codepoint)}"
    r"|\#(?:3[2-9]|[4-9][0-9]|[1-9][0-9]{2,3})|\#x(?:[2-9a-fA-F]|[1-9a-fA-F][0-9a-fA-F])[0-9a-fA-F]);".encode()
)
LONGEST_REFERENCE = 10  # &thetasym;
LANGUAGE = re.compile(r"lang(?:uage)?-([\w+#-]+)$")
CLASSES = re.compile(rb' class="([^"]*)"')
DEEPEST = 40  # ten levels are rare in a post
OPEN, CLOSE, NOTHING, UNKNOWN = 1, -1, 0, 2
FENCE = "```"

Kind = tuple[int, int, str]  # place in NAMES, one of OPEN to UNKNOWN, language


def languages_if_plain(texts: Sequence[str]) -> list[Sequence[str] | None]:
    """Of each HTML text: the languages of its code blocks, () where none is named; None if it is not plain.

    Plain means also: no fence inside, no control character but tab and newline, at most `DEEPEST` tags deep.
    """
    array = pa.array(texts, pa.string())
    if not len(array) or not sum(map(len, texts)):
        return [() for _ in texts]
    _, offsets, data = array.buffers()
    bounds = np.frombuffer(offsets, np.int32)[: len(array) + 1]
    content = np.frombuffer(data, np.uint8)[: bounds[-1]]
    plain = np.array([FENCE not in text for text in texts], bool)

    def text_of(positions: np.ndarray) -> np.ndarray:
        return np.searchsorted(bounds, positions, side="right") - 1

    control = np.flatnonzero(content < 32)
    control = control[(content[control] != ord("\n")) & (content[control] != ord("\t"))]
    plain[text_of(control)] = False
    _check_references(content, data, plain, text_of)
    tags, kinds = _tags(content, data, plain, text_of)
    return _balanced(tags, kinds, plain)


Places = Callable[[np.ndarray], np.ndarray]


def _check_references(content: np.ndarray, data: pa.Buffer, plain: np.ndarray, text_of: Places) -> None:
    starts = np.flatnonzero(content == ord("&"))
    stops = _next(np.flatnonzero(content == ord(";")), starts, len(content)) + 1
    short = (stops - starts <= LONGEST_REFERENCE) & (stops <= len(content))
    short[:-1] &= stops[:-1] <= starts[1:]
    plain[text_of(starts[~short])] = False
    starts, stops = starts[short], stops[short]
    which, different = _cut(data, starts, stops)
    known = np.array([REFERENCE.fullmatch(reference) is not None for reference in different], bool)
    plain[text_of(starts[~known[which]])] = False


def _tags(
    content: np.ndarray, data: pa.Buffer, plain: np.ndarray, text_of: Places
) -> tuple[np.ndarray, list[np.ndarray]]:
    """The text of each tag, and its place in NAMES, OPEN or CLOSE, and language; void tags are left out."""
    starts = np.flatnonzero(content == ord("<"))
    stops = _next(np.flatnonzero(content == ord(">")), starts, len(content))
    texts = text_of(starts)
    whole = stops < len(content)
    whole[:-1] &= stops[:-1] < starts[1:]
    plain[texts[~whole]] = False
    starts, stops, texts = starts[whole], stops[whole], texts[whole]
    which, different = _cut(data, starts + 1, stops)
    kinds = [_kind(tag) for tag in different]
    names, opens = (np.array([kind[i] for kind in kinds], np.int64)[which] for i in (0, 1))
    languages = np.array([kind[2] for kind in kinds], object)[which]
    plain[texts[opens == UNKNOWN]] = False
    kept = plain[texts] & (opens != NOTHING)
    return texts[kept], [names[kept], opens[kept], languages[kept]]


def _balanced(texts: np.ndarray, kinds: list[np.ndarray], plain: np.ndarray) -> list[Sequence[str] | None]:
    names, opens, languages = kinds
    numbers = np.arange(len(plain))
    first, stop = np.searchsorted(texts, numbers), np.searchsorted(texts, numbers, side="right")

    def depths(steps: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """After each tag, and at the end of each text; each text starts at nothing."""
        total = np.concatenate([[0], np.cumsum(steps)])
        return total[1:] - total[first][texts], total[stop] - total[first]

    after, at_end = depths(opens)
    levels = after + (opens == CLOSE)  # a tag and the one that closes it are on one level
    of_pre, _ = depths(np.where(names == PRE, opens, 0))
    plain[texts[(levels < 1) | (levels > DEEPEST) | (of_pre > 1)]] = False
    plain &= at_end == 0
    kept = plain[texts]
    texts, names, levels, languages, opens = (x[kept] for x in (texts, names, levels, languages, opens))
    # On one level of one text, tags open and close in turn: that is what "never below 0, 0 at the end" means.
    order = np.argsort(texts * (DEEPEST + 1) + levels, kind="stable")
    opened, closed = order[0::2], order[1::2]
    plain[texts[opened[names[opened] != names[closed]]]] = False
    _check_tables(texts, names, levels, order, opened, plain)
    found: list[Sequence[str] | None] = [() if is_plain else None for is_plain in plain.tolist()]
    code = (names == PRE) & (opens == OPEN)
    texts, languages = texts[code], languages[code]
    for text in np.unique(texts[languages != ""]).tolist():
        if plain[text]:
            found[text] = languages[np.searchsorted(texts, text) : np.searchsorted(texts, text + 1)].tolist()
    return found


def _check_tables(
    texts: np.ndarray, names: np.ndarray, levels: np.ndarray, order: np.ndarray, opened: np.ndarray,
    plain: np.ndarray,
) -> None:  # fmt: skip
    """A part of a table is plain only right inside what it is a part of."""
    parts = opened[np.isin(names[opened], list(INSIDE))]
    # Inside of what: the last tag before it that is one level up. Sorted by level, and then as they stand:
    places = (texts * (DEEPEST + 1) + levels) * len(texts) + np.arange(len(texts))
    parents = order[np.searchsorted(places[order], places[parts] - len(texts)) - 1]
    for name, inside in INSIDE.items():
        which = names[parts] == name
        right = np.isin(names[parents], inside) & (levels[parts] > 1)
        plain[texts[parts[which & ~right]]] = False


def _kind(tag: bytes) -> Kind:
    """What stands between < and >."""
    found = TAG.fullmatch(tag)
    if not found:
        return 0, NOTHING if COMMENT.fullmatch(tag) else UNKNOWN, ""
    close, name, attributes, end = found.groups()
    place = PLACES.get(name)
    if place is None or (end and place not in VOID):
        return 0, UNKNOWN, ""
    if place in VOID:
        return 0, NOTHING, ""
    if close:
        return place, CLOSE, ""
    classes = CLASSES.search(attributes) if place == PRE else None
    return place, OPEN, first_language(classes[1].decode().split()) if classes else ""


def first_language(classes: Sequence[str]) -> str:
    """The language, "py" for ["lang-py", "prettyprint-override"]; "" where none is named."""
    found = (LANGUAGE.match(name) for name in classes)
    return next((match.group(1) for match in found if match and match.group(1) != "none"), "")


def _next(places: np.ndarray, starts: np.ndarray, end: int) -> np.ndarray:
    """The first of `places` after each start; `end` where there is none. Both are sorted."""
    return np.append(places, end)[np.searchsorted(places, starts)]


def _cut(data: pa.Buffer, starts: np.ndarray, stops: np.ndarray) -> tuple[np.ndarray, list[bytes]]:
    """Pieces of some bytes, as (which of the different ones each is, the different ones)."""
    if not len(starts):
        return np.empty(0, np.int64), []
    offsets = np.append(np.stack([starts, stops], 1).ravel(), stops[-1]).astype(np.int32)
    both = pa.BinaryArray.from_buffers(pa.binary(), 2 * len(starts), [None, pa.py_buffer(offsets), data])
    pieces = both.take(pa.array(np.arange(0, 2 * len(starts), 2))).dictionary_encode()
    return pieces.indices.to_numpy(), pieces.dictionary.to_pylist()

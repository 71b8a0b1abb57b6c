"""A block that does not parse as it stands: what XML forbids goes, then rows that are not well-formed."""

from __future__ import annotations

import re
from collections.abc import Iterator
from itertools import pairwise

from tasks.data.damage import MALFORMED, Damage
from tasks.data.parse import BlockError, Row, parse
from tasks.data.utf8 import name_of, replaced, strays

# XML 1.0, section 2.2, has none of these; nor has UTF-8 the surrogates.
CONTROLS = bytes(code for code in range(0x20) if code not in (0x9, 0xA, 0xD))
NO_CHARACTER = re.compile(rb"\xef\xbf[\xbe\xbf]|\xed[\xa0-\xbf][\x80-\xbf]")  # U+FFFE, U+FFFF, surrogates
REFERENCE = re.compile(rb"&\#(?!x[9AD];)(?:[0-9]+|[xX][0-9a-fA-F]+);")  # but for those that dumps are full of
ROW = re.compile(rb"<row(?=[\s/>])")
WHOLE_ROW = re.compile(rb"""<row(?:\s+[^\s=<>"'/]+\s*=\s*(?:"[^"<]*"|'[^'<]*'))*+\s*(?:/>|>\s*</row\s*>)""")
NOTHING = re.compile(rb"(?:\s|<!--.*?-->|<\?.*?\?>)*+", re.DOTALL)  # between rows
COMMENT = re.compile(rb"(/>|</row>)\s*+<!--.*?-->", re.DOTALL)  # may hold rows; they are no rows then
BLANK = b"\xef\xbb\xbf \t\r\n"

Numbered = tuple[list[Row], list[int]]  # rows, and the place of each among all of the block


def repair(
    content: bytes, table: str, is_first: bool, is_last: bool, encoding: str
) -> tuple[Numbered, Damage]:
    """The rows of a block that are well-formed, once what XML forbids is gone; and what was lost.

    Args:
        content: what `parse` refused.
        table: as in `parse`.
        is_first: as in `parse`.
        is_last: as in `parse`.
        encoding: that the file declares; "" for UTF-8.

    Raises:
        BlockError: no row can help it: another encoding, a DOCTYPE, another table, a truncated file.
    """
    damage = Damage()
    content = _allowed(content, damage)
    if is_first:
        content = content.lstrip(BLANK)
    content = _utf8(content, encoding, damage)
    try:
        rows = parse(content, table, is_first, is_last)
        return (rows, list(range(len(rows)))), damage
    except BlockError as error:
        content = COMMENT.sub(rb"\1", content)
        starts = [found.start() for found in ROW.finditer(content)]
        if not starts:
            raise
        if is_first:
            parse(content[: starts[0]], table, is_first=True, is_last=False)  # else it is no dump
        stop = _end(content, table, len(starts), error) if is_last else len(content)
    return _row_by_row((content[a:b] for a, b in pairwise([*starts, stop])), table, damage), damage


def _allowed(content: bytes, damage: Damage) -> bytes:
    """Without the characters that XML forbids."""

    def check(found: re.Match[bytes]) -> bytes:
        digits = found[0][2:-1].lower()
        base, digits = (16, digits[1:]) if digits.startswith(b"x") else (10, digits)
        digits = digits.lstrip(b"0") or b"0"
        if len(digits) < 8 and _is_character(int(digits, base)):
            return b"&#x" + found[0][3:] if base == 16 else found[0]  # `&#X41;` is one, too
        damage.dropped_characters += 1
        return b""

    kept = content.translate(None, CONTROLS)
    damage.dropped_characters += len(content) - len(kept)
    if b"\xef\xbf" in kept or b"\xed" in kept:  # seldom, and found at once
        kept, count = NO_CHARACTER.subn(b"", kept)
        damage.dropped_characters += count
    return REFERENCE.sub(check, kept)


def _is_character(code: int) -> bool:
    """XML 1.0, production 2."""
    plain = 0x20 <= code < 0xD800 or code in (0x9, 0xA, 0xD)
    return plain or 0xE000 <= code < 0xFFFE or 0xFFFF < code < 0x110000


def _utf8(content: bytes, encoding: str, damage: Damage) -> bytes:
    """With stray bytes replaced.

    Raises:
        BlockError: they are not stray.
    """
    fixed, count = replaced(content)
    if not count:
        return content
    starts = [found.start() for found in ROW.finditer(content)] or [0]
    rows = [content[a:b] for a, b in pairwise([*starts, len(content)])]
    broken, is_another = strays(rows)
    if encoding or is_another:
        first = broken[0] if broken else 0
        words = f"declares the encoding {encoding}" if encoding else name_of(rows[first])
        raise BlockError(first, f"not a well-formed UTF-8 dump ({words})")
    damage.replaced_characters += count
    return fixed


def _end(content: bytes, table: str, rows: int, error: BlockError) -> int:
    """Where the root ends, after which nothing may come.

    Raises:
        BlockError: it does not, or something does.
    """
    place = content.rfind(f"</{table}".encode())
    if place < 0:
        whole = WHOLE_ROW.match(content, content.rfind(b"<row"))
        words = f"not a well-formed UTF-8 dump (Premature end of data in tag {table})"
        raise BlockError(rows if whole else rows - 1, words)
    after = content.find(b">", place) + 1
    if not after or NOTHING.fullmatch(content, after) is None:
        raise error
    return place


def _row_by_row(pieces: Iterator[bytes], table: str, damage: Damage) -> Numbered:
    """What can be read of pieces that begin with a row each."""
    rows: list[Row] = []
    places: list[int] = []
    place = 0
    for piece in pieces:
        try:
            found = parse(piece, table, is_first=False, is_last=False)
        except BlockError as error:
            found = _row_alone(piece, table)
            words = error.args[1].replace("a well-formed UTF-8 dump", "well-formed")
            damage.drop(MALFORMED, place + len(found) + 1, words)
            place += len(found) + 1
            rows += found
            places += [place - 2] * len(found)
            continue
        rows += found
        places.append(place)
        place += 1
    return rows, places


def _row_alone(piece: bytes, table: str) -> list[Row]:
    """The row at the front, if that is well-formed and only what comes after it is not."""
    whole = WHOLE_ROW.match(piece)
    try:
        return parse(whole[0], table, is_first=False, is_last=False) if whole else []
    except BlockError:
        return []

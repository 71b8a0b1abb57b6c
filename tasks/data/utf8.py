"""Bytes that are no UTF-8: a few stray ones are replaced; a file in another encoding is told from that."""

from __future__ import annotations

import re
from collections.abc import Iterable

STRAY = re.compile("[\udc80-\udcff]+")  # what `surrogateescape` makes of a run of bytes that are no UTF-8
FEW_ROWS = 5  # with stray bytes, in a file that is UTF-8 for all that
FEW_SHARE = 0.1


def replaced(content: bytes) -> tuple[bytes, int]:
    """UTF-8 with U+FFFD for each run of bytes that are none, and how many these were."""
    try:
        content.decode()
        return content, 0
    except UnicodeDecodeError:
        pass
    text, count = STRAY.subn("\ufffd", content.decode("utf-8", "surrogateescape"))
    return text.encode(), count


def strays(rows: Iterable[bytes]) -> tuple[list[int], bool]:
    """The places of rows that are no UTF-8, and whether the rows as a whole are in another encoding."""
    wrong: list[int] = []
    right = count = 0
    for count, row in enumerate(rows, start=1):
        if row.isascii():
            continue
        try:
            row.decode()
            right += 1
        except UnicodeDecodeError:
            wrong.append(count - 1)
    return wrong, is_another(len(wrong), right, count)


def is_another(wrong: int, right: int, rows: int) -> bool:
    """Whether a file is in another encoding: more rows break UTF-8 than use more of it than ASCII.

    `FEW_ROWS` rows, if they are no more than a tenth of all, are an accident all the same.
    """
    return wrong > right and (wrong > FEW_ROWS or wrong > FEW_SHARE * rows)


def name_of(row: bytes) -> str:
    """The likely encoding of bytes that are no UTF-8: "byte 0xe9: Latin-1 or Windows-1252"."""
    try:
        row.decode()
        return "UTF-8"
    except UnicodeDecodeError as error:
        byte = row[error.start]
    name = "Windows-1252" if 0x80 <= byte < 0xA0 else "Latin-1 or Windows-1252"
    return f"byte 0x{byte:02x}: as in {name}"

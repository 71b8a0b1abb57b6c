"""Rows of JSON: one object a line, or one array of objects, which is read piece by piece."""

from __future__ import annotations

import io
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from tasks.data.damage import LONGEST_ROW, MALFORMED, TOO_LONG, Damage, long_row
from tasks.data.sniff import BLANK, HEAD_BYTES, what_is
from tasks.data.sources import OPENERS, DumpError, unpacked
from tasks.data.utf8 import STRAY, is_another, name_of

PIECE = 1 << 18  # characters
BETWEEN = re.compile(r"[\s,]*")
BOM = b"\xef\xbb\xbf"
LONGEST_INTEGER = 400  # digits; more are no number anyone means

Read = tuple[int, str, Any]  # the number of a row, its text, and what that says; `_BAD` where it says nothing


class _Bad(str):
    """Why a row says nothing."""


def read_json(path: Path, damage: Damage) -> Iterator[tuple[int, dict[str, Any]]]:
    """The objects of a file, each with its number (of its line, or its place in the array).

    Raises:
        DumpError: the file is damaged, in another encoding, or an array that is broken off or no JSON.
    """
    right = wrong = count = 0
    first = ""
    opener = OPENERS.get(path.suffix, OPENERS[".xml"])
    with opener(path) as file:
        head = io.BufferedReader(unpacked(file, path)).read(HEAD_BYTES)
    if found := what_is(head):
        raise DumpError(f"{path}: its content is {found}, no JSON")
    with opener(path) as file:
        reader = io.BufferedReader(unpacked(file, path), PIECE)
        is_array = head.lstrip(BLANK).startswith(b"[")
        for number, text, value in _array(reader, path) if is_array else _lines(reader, damage):
            count += 1
            if not text.isascii():
                text, strays = STRAY.subn("\ufffd", written := text)
                right, wrong = right + (not strays), wrong + bool(strays)
                if strays:
                    first = first or f"row {number}: {name_of(written.encode(errors='surrogateescape'))}"
                    damage.replaced_characters += strays
                    value = _value(text)
            if isinstance(value, dict):
                yield number, value
            else:
                words = value if isinstance(value, _Bad) else f"but {type(value).__name__}"
                damage.drop(MALFORMED, number, f"not a JSON object in UTF-8 ({words})")
    if is_another(wrong, right, count):
        raise DumpError(f"{path}: {first}, not UTF-8")


def _lines(reader: io.BufferedReader, damage: Damage) -> Iterator[Read]:
    number = 0
    while line := reader.readline(LONGEST_ROW + 1):
        number += 1
        if len(line) > LONGEST_ROW:
            while not line.endswith(b"\n") and (line := reader.readline(LONGEST_ROW)):
                pass
            damage.drop(TOO_LONG, number, long_row())
            continue
        text = line.removeprefix(BOM if number == 1 else b"").decode("utf-8", "surrogateescape")
        if text.strip():
            yield number, text, _value(text)


def _value(text: str) -> Any:
    try:
        return _DECODER.decode(text)
    except (ValueError, RecursionError) as error:
        return _Bad(error)


def _array(reader: io.BufferedReader, path: Path) -> Iterator[Read]:
    text = io.TextIOWrapper(reader, encoding="utf-8-sig", errors="surrogateescape", newline="")
    buffer = text.read(HEAD_BYTES)
    place, number = buffer.index("[") + 1, 1
    while True:
        place = BETWEEN.match(buffer, place).end()
        words = "the array has no end: truncated"
        if place < len(buffer):
            if buffer[place] == "]":
                return
            try:
                value, end = _DECODER.raw_decode(buffer, place)
                if end < len(buffer):  # else a number may go on
                    yield number, buffer[place:end], value
                    place, number = end, number + 1
                    continue
            except (ValueError, RecursionError) as error:
                words = str(error).split(": line")[0]
        if len(buffer) - place > LONGEST_ROW:
            raise DumpError(f"{path}: row {number}: no JSON, or {long_row()} ({words})")
        more = text.read(max(PIECE, len(buffer) - place))
        if not more:
            raise DumpError(f"{path}: row {number}: not a JSON object in UTF-8 ({words})")
        buffer, place = buffer[place:] + more, 0


def _integer(digits: str) -> float:
    return int(digits) if len(digits) <= LONGEST_INTEGER else float("inf")


_DECODER = json.JSONDecoder(strict=False, parse_int=_integer)  # control characters are for `shapes` to drop

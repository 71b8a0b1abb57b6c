"""Standard streams that fail nobody: closed, left by their reader, or without the letters that we print."""

from __future__ import annotations

import io
import os
import sys
from typing import TextIO


class _Sturdy(io.TextIOWrapper):
    """Text to a file descriptor; once nobody can take it any more, to nowhere: a training is worth more."""

    def write(self, text: str) -> int:
        try:
            return super().write(text)
        except OSError:
            self._lead_nowhere()
            return len(text)

    def flush(self) -> None:
        try:
            super().flush()
        except OSError:
            self._lead_nowhere()

    def _lead_nowhere(self) -> None:
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, self.fileno())
        os.close(nowhere)


def settle() -> None:
    """For a command, before it opens anything: make standard input, output and error usable.

    A closed descriptor would be the next file's, and what a library prints would end up in a checkpoint.
    """
    for number in (0, 1, 2):
        try:
            os.fstat(number)
        except OSError:
            lowest_free = os.open(os.devnull, os.O_RDWR)  # which is this one
            os.set_inheritable(lowest_free, True)
    sys.stdin = sys.stdin or open(0, encoding="utf-8", closefd=False)
    sys.stdout, sys.stderr = _sturdy(1, sys.stdout), _sturdy(2, sys.stderr)


def _sturdy(number: int, old: TextIO | None) -> TextIO:
    if old:
        old.flush()
    encoding = old.encoding if old else "utf-8"
    raw = open(number, "wb", closefd=False)
    return _Sturdy(raw, encoding=encoding, errors="backslashreplace", line_buffering=True)

"""A line every few seconds, so that a long reading is seen to move."""

from __future__ import annotations

import sys
import time

EVERY_SECONDS = 3.0


class Progress:
    """Counts megabytes; prints to stderr only, for nothing timed may enter an out."""

    def __init__(self, what: str) -> None:
        self._what = what
        self._start = self._last = time.monotonic()
        self._bytes = 0

    def add(self, size: int) -> None:
        """Another `size` bytes are done."""
        self._bytes += size
        if time.monotonic() - self._last >= EVERY_SECONDS:
            self._last = time.monotonic()
            self._print()

    def done(self) -> None:
        """Print the last line, whatever the clock says."""
        self._print()

    def _print(self) -> None:
        megabytes, seconds = self._bytes / 1e6, max(time.monotonic() - self._start, 1e-6)
        line = f"data: {self._what}: {megabytes:,.1f} MB, {megabytes / seconds:.1f} MB/s"
        print(line, file=sys.stderr, flush=True)

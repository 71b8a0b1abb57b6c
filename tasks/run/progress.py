"""Progress of a long stage: a bar on a terminal, a plain line every few seconds elsewhere (logs, Prefect)."""

from __future__ import annotations

import sys
import time
from types import TracebackType

from tasks.run.ranks import is_first

SECONDS_BETWEEN_LINES = 5.0


class Progress:
    """Steps done, units per second (tokens, mostly), time left and the latest values.

    Example line: `sft 120/600 20 % · 41,200 tokens/s · 0:32 left · loss 1.234`.
    """

    def __init__(self, name: str, total: int, unit: str = "tokens", done: int = 0) -> None:
        self.name, self.total, self.unit = name, total, unit
        self.first = self.done = done
        self.units, self.values = 0.0, {}
        self.start = self.shown = time.monotonic()
        self.is_terminal = sys.stderr.isatty()

    def update(self, done: int, units: float = 0.0, **values: float) -> None:
        """Say where we are: `done` steps in all, `units` more since the last call."""
        self.done, self.units = done, self.units + units
        self.values |= values
        now = time.monotonic()
        if not is_first():
            return
        if now - self.shown >= (0.2 if self.is_terminal else SECONDS_BETWEEN_LINES) or done == self.total:
            self.shown = now
            print(
                self.line(),
                end="\r" if self.is_terminal and done < self.total else "\n",
                file=sys.stderr,
                flush=True,
            )

    @property
    def rate(self) -> float:
        """Units per second so far."""
        return self.units / max(time.monotonic() - self.start, 1e-9)

    def line(self) -> str:
        """The line that is shown."""
        steps = max(self.done - self.first, 1)
        left = (time.monotonic() - self.start) / steps * (self.total - self.done)
        parts = [f"{self.name} {self.done}/{self.total} {100 * self.done // max(self.total, 1)} %"]
        parts += [f"{self.rate:,.0f} {self.unit}/s"] if self.units else []
        parts += [f"{int(left // 60)}:{int(left % 60):02d} left"]
        return " · ".join(parts + [f"{k} {v:.3f}" for k, v in self.values.items()])

    def __enter__(self) -> Progress:
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if self.is_terminal and self.done < self.total:
            print(file=sys.stderr)

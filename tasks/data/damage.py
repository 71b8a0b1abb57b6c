"""What a source loses while it is read: rows by reason, and characters. One bad row ends no file."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field

LONGEST_ROW = 10_000_000  # bytes; libxml2 reads no longer attribute, and a post ends at 30,000 characters
MALFORMED, TOO_LONG = "malformed_row", "too_long_row"
LONGEST_WORDS = 600  # of a fault, in messages and on the card


@dataclass(slots=True)
class Damage:
    """What was lost of a block or a file.

    Worked miniature: one of its rows was no XML, and four characters could not stay::

        Damage(Counter(malformed_row=1), {"malformed_row": (51, "not well-formed (…)")}, 4, 0)

    Attributes:
        drops: reason -> rows left out.
        first: reason -> number of the first such row, counted from 1, and what is wrong with it.
        dropped_characters: those that XML forbids.
        replaced_characters: runs of bytes that are no UTF-8, U+FFFD in their place.
    """

    drops: Counter[str] = field(default_factory=Counter)
    first: dict[str, tuple[int, str]] = field(default_factory=dict)
    dropped_characters: int = 0
    replaced_characters: int = 0

    def drop(self, reason: str, row: int, words: str) -> None:
        """A row is left out."""
        self.drops[reason] += 1
        self.note(reason, row, words)

    def note(self, reason: str, row: int, words: str) -> None:
        """A row is about to be left out by somebody else, who counts it."""
        if reason not in self.first or row < self.first[reason][0]:
            self.first[reason] = row, short(words)

    def add(self, other: Damage, rows_before: int = 0) -> None:
        """What came after so many rows."""
        self.drops += other.drops
        for reason, (row, words) in other.first.items():
            self.note(reason, row + rows_before, words)
        self.dropped_characters += other.dropped_characters
        self.replaced_characters += other.replaced_characters

    def earliest(self) -> str:
        """Its first row and what is wrong with it: "row 51: not well-formed (…)"; "" where nothing is."""
        return "row {}: {}".format(*min(self.first.values())) if self.first else ""


def short(words: str) -> str:
    """One line of no more than `LONGEST_WORDS` characters."""
    words = " ".join(words.split())
    return words if len(words) <= LONGEST_WORDS else f"{words[: LONGEST_WORDS - 1]}…"


def long_row() -> str:
    """What is wrong with a row that is too long."""
    return f"longer than {LONGEST_ROW:,} bytes"


def total(damages: Iterable[Damage]) -> Damage:
    """Of several files: their sum; `first` says nothing."""
    found = Damage()
    for damage in damages:
        found.add(damage)
    return found

"""What can be measured on the text of responses alone."""

from __future__ import annotations

import re
from collections.abc import Sequence


def states(response: str, expected: str) -> bool:
    """Whether a response states the expected value and no other: every `code` span in it is that value."""
    stated = re.findall(r"`([^`]*)`", response)
    return bool(stated) and all(value.strip() == expected for value in stated)


def distinct(responses: Sequence[Sequence[int]], n: int) -> float:
    """Distinct n-grams over all n-grams of all responses (arXiv 1510.03055); 0 where there are none."""
    grams = [g for r in responses for g in _grams(r, n)]
    return len(set(grams)) / len(grams) if grams else 0.0


def repetition(response: Sequence[int], n: int = 3) -> float:
    """Share of a response's n-grams that stood in it before; 0 for fewer than n tokens."""
    grams = _grams(response, n)
    return 1 - len(set(grams)) / len(grams) if grams else 0.0


def _grams(tokens: Sequence[int], n: int) -> list[tuple[int, ...]]:
    return [tuple(tokens[i : i + n]) for i in range(len(tokens) - n + 1)]

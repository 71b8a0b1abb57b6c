"""What can be measured on responses alone, without a reference or an expected value."""

from __future__ import annotations

from collections.abc import Collection, Sequence

FENCE = "```"


def distinct(responses: Sequence[Sequence[int]], n: int) -> float:
    """Distinct n-grams over all n-grams of all responses (arXiv 1510.03055); 0 where there are none.

    It falls with the number of responses: compare as many with as many.
    """
    grams = [g for r in responses for g in _grams(r, n)]
    return len(set(grams)) / len(grams) if grams else 0.0


def repetition(response: Sequence[int], n: int = 3) -> float:
    """Share of a response's n-grams that stood in it before; 0 for fewer than n tokens."""
    grams = _grams(response, n)
    return 1 - len(set(grams)) / len(grams) if grams else 0.0


def has_code_fence(text: str) -> bool:
    """Whether a fence of three backticks is in it: what StackLLaMA's policy found out to be liked."""
    return FENCE in text


def has_ended(tokens: Sequence[int], eos_id: int | Collection[int]) -> bool:
    """Whether a response ends with eos, or with one of several."""
    return len(tokens) > 0 and tokens[-1] in ((eos_id,) if isinstance(eos_id, int) else eos_id)


def _grams(tokens: Sequence[int], n: int) -> list[tuple[int, ...]]:
    return [tuple(tokens[i : i + n]) for i in range(len(tokens) - n + 1)]

"""Whether a text states a value, and whether it says what nobody has said."""

from __future__ import annotations

import re
from collections.abc import Collection


def stated(response: str) -> list[str]:
    """The values that a response states: its `code` spans, without blanks around."""
    return [value.strip() for value in re.findall(r"`([^`]*)`", response)]


def states(response: str, expected: str) -> bool:
    """Whether a response states the expected value and no other: every `code` span in it is that value."""
    values = stated(response)
    return bool(values) and all(value == expected for value in values)


def invents(response: str, expected: str, wrong: Collection[str]) -> bool:
    """Whether a response gives no answer that anybody gave to this question.

    It states a value that is neither the expected nor one of the wrong ones, or none at all: so every
    response is right, a known mistake, or invented, and silence is no way out.
    """
    values = stated(response)
    return not values or any(value != expected and value not in wrong for value in values)

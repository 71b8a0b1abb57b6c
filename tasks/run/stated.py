"""Whether a text states a value."""

from __future__ import annotations

import re


def states(response: str, expected: str) -> bool:
    """Whether a response states the expected value and no other: every `code` span in it is that value."""
    stated = re.findall(r"`([^`]*)`", response)
    return bool(stated) and all(value.strip() == expected for value in stated)

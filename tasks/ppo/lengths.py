"""How long responses may get, drawn row by row."""

from __future__ import annotations

import random


class LengthSampler:
    """Whole numbers from `min_value` to `max_value`, both included, all as likely: a `length_sampler`.

    TRL's of this name leaves `max_value` out, and draws from numpy's global random numbers.

    Args:
        min_value: fewest tokens.
        max_value: most tokens.
        seed: of the numbers; nothing else decides them.

    Raises:
        ValueError: less than one token, or bounds in the wrong order.
    """

    def __init__(self, min_value: int, max_value: int, seed: int = 0) -> None:
        if not 1 <= min_value <= max_value:
            raise ValueError(
                f"LengthSampler: min_value {min_value}, max_value {max_value}; wanted is 1 ≤ min ≤ max"
            )
        self.min_value, self.max_value = min_value, max_value
        self._draw = random.Random(seed)

    def __call__(self) -> int:
        """The next one."""
        return self._draw.randint(self.min_value, self.max_value)

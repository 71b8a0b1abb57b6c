"""Intervals by resampling."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np


def bootstrap(
    units: Sequence[object], statistic: Callable[[np.ndarray], float], samples: int, seed: int
) -> tuple[float, float]:
    """A 95 % interval by resampling units (questions, prompts), whose rows stay together.

    Args:
        units: [N] the unit of each row.
        statistic: maps weights [N] (how often each row was drawn) to a number.
        samples: resamples.
        seed: of the draws.

    Returns:
        The 2.5th and the 97.5th percentile.
    """
    draw = np.random.default_rng(seed % 2**63)
    _, owner = np.unique(np.asarray(units), return_inverse=True)
    count = owner.max() + 1
    values = [
        statistic(np.bincount(draw.integers(0, count, count), minlength=count)[owner]) for _ in range(samples)
    ]
    low, high = np.percentile(values, [2.5, 97.5])
    return float(low), float(high)

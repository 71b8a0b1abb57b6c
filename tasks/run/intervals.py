"""Intervals by resampling."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np

FEWEST = 5  # units behind an interval: resampling one, for instance, would show no doubt at all
QUANTILES = (2.5, 97.5)
BLOCK = 64  # resamples whose weights are at hand at once


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
    owner, count = _owners(units)
    values = [statistic(drawn[owner]) for drawn in _draws(count, samples, seed)]
    low, high = np.percentile(values, QUANTILES)
    return float(low), float(high)


@dataclass(frozen=True, slots=True, eq=False)
class Resamples:
    """Resamples of the units of N rows, drawn once: for many means over the same rows.

    Miniature: ``Resamples.of(["a", "a", "b", …], 1000, seed=0).interval(values)``; "a" is drawn with both of
    its rows or with none.
    """

    owner: np.ndarray  # [N] place of the row's unit among the C units
    drawn: np.ndarray  # [S, C] uint16: how often each unit was drawn

    @classmethod
    def of(cls, units: Sequence[object], samples: int, seed: int) -> Resamples:
        """The draws of :func:`bootstrap`."""
        owner, count = _owners(units)
        drawn = np.empty((samples, count), np.uint16)
        for row, each in zip(drawn, _draws(count, samples, seed), strict=True):
            row[:] = each
        return cls(owner, drawn)

    def interval(self, values: np.ndarray) -> tuple[float, float] | None:
        """95 % interval of the mean over rows; values [N]. None for fewer units than `FEWEST`."""
        count = self.drawn.shape[1]
        if count < FEWEST:
            return None
        sums, rows = (np.bincount(self.owner, w, count) for w in (values, np.ones(len(values))))
        means = []
        for first in range(0, len(self.drawn), BLOCK):
            drawn = self.drawn[first : first + BLOCK].astype(np.float64)
            means.append((drawn @ sums) / (drawn @ rows))
        low, high = np.percentile(np.concatenate(means), QUANTILES)
        return float(low), float(high)


def _owners(units: Sequence[object]) -> tuple[np.ndarray, int]:
    _, owner = np.unique(np.asarray(units), return_inverse=True)
    return owner, int(owner.max()) + 1


def _draws(count: int, samples: int, seed: int) -> Iterator[np.ndarray]:
    """How often each of the units was drawn, resample by resample. -> [count] each."""
    draw = np.random.default_rng(seed % 2**63)
    return (np.bincount(draw.integers(0, count, count), minlength=count) for _ in range(samples))

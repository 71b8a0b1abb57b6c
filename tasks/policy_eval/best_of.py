"""Best of n by the reward model: what it would reach, estimated from N ≥ n samples per prompt without bias.

Of N samples every subset of n is equally likely to be the n that were drawn; the best of a subset is its
highest score, and of several highest ones each is equally likely to be taken.
"""

from __future__ import annotations

import math

import numpy as np


def weights(scores: np.ndarray, n: int) -> np.ndarray:
    """Chance of each sample to be the best of n that are drawn without replacement. [P, N] -> [P, N].

    Without ties C(r − 1, n − 1) / C(N, n) for the sample of rank r (1: the lowest). Of m samples that tie
    above l others each gets its share, (C(l + m, n) − C(l, n)) / (m · C(N, n)).

    Raises:
        ValueError: n is below 1 or above N.
    """
    count = scores.shape[1]
    if not 1 <= n <= count:
        raise ValueError(f"best of {n}: {count} samples per prompt are there")
    chosen = np.array([math.comb(r, n) for r in range(count + 1)], dtype=np.float64) / math.comb(count, n)
    lower = (scores[:, None, :] < scores[:, :, None]).sum(-1)
    same = (scores[:, None, :] == scores[:, :, None]).sum(-1)
    return (chosen[lower + same] - chosen[lower]) / same


def best_of(scores: np.ndarray, values: np.ndarray, n: int) -> np.ndarray:
    """Expected value of a measure of the best of n. [P, N], [P, N] -> [P]."""
    return (weights(scores, n) * values).sum(1)


def kl_bound(n: int) -> float:
    """Most KL of best-of-n to what is sampled, nats: ln n − (n − 1) / n.

    Exact where no two samples tie, an upper bound else (arXiv 2401.01879).
    """
    return math.log(n) - (n - 1) / n

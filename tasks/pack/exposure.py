"""Weights of pairs under which exposure predicts no winner.

An answer that was posted earlier has been read, and voted for, longer: on real sites the earlier answer wins
two pairs in three, whatever it says. Each pair is weighted by the inverse of the probability that its winner
wins by exposure alone, a logistic Bradley-Terry model without a word of text: P = σ(x β), x what the better
answer has ahead of the worse in exposure. β is fitted by balance, not by likelihood (Imai and Ratkovic 2014,
J. R. Stat. Soc. B 76, 243-263): Σ x / P = 0, so that in the weighted pairs no exposure is ahead, and the same
model fitted to them finds β = 0. Maximum likelihood gives that only where the model is exact.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

LEAST_PROBABILITY = 0.05  # a winner less likely than this weighs as if it were this likely


def weighted(batches: Callable[[], Iterator[pa.Table]]) -> Iterator[pa.Table]:
    """Groups with their weights; in memory are one batch and 24 bytes for each pair.

    Args:
        batches: the same tables of `GROUPS`, from the first, whenever it is called.

    Raises:
        ValueError: the answers' dates tell no pair apart, or tell the winner of every pair.
    """
    weights = balancing_weights(np.concatenate([ahead(table) for table in batches()]))
    start = 0
    for table in batches():
        pairs = table["pairs"].combine_chunks()
        stop = start + len(pairs.flatten())
        values = pa.array(weights[start:stop], pa.float32())
        offsets = pa.array(np.append(0, np.cumsum(pairs.value_lengths().to_numpy())), pa.int32())
        column = pa.ListArray.from_arrays(offsets, values)
        yield table.set_column(table.column_names.index("weights"), table.schema.field("weights"), column)
        start = stop


def ahead(groups: pa.Table) -> np.ndarray:
    """What the better answer of each pair has ahead of the worse in exposure; 0 where a date is missing.

    Args:
        groups: `GROUPS`.

    Returns:
        [P, 3]: posted earlier (1, 0 or −1); that times log(1 + hours between the two); by how many places
        earlier among the question's answers. Example: posted at 0 h, 1 h, 3 h, pair [0, 2] -> [1, log 4, 2].
    """
    answers, pairs = groups["answers"].combine_chunks(), groups["pairs"].combine_chunks()
    created = pc.struct_field(answers.flatten(), "created")
    dates = pc.if_else(pc.equal(created, ""), None, created).cast(pa.timestamp("ns"))
    hours = dates.cast(pa.int64()).to_numpy(zero_copy_only=False) / 3.6e12  # nan: no date
    counts = answers.value_lengths().to_numpy()
    rank = _earlier_answers(hours, np.repeat(np.arange(len(counts)), counts))
    first = np.repeat(np.append(0, np.cumsum(counts))[:-1], pairs.value_lengths().to_numpy())
    better, worse = pairs.flatten().flatten().to_numpy().reshape(-1, 2).T + first
    lead = hours[worse] - hours[better]
    found = np.stack([np.sign(lead), np.sign(lead) * np.log1p(abs(lead)), rank[worse] - rank[better]], axis=1)
    return np.where(np.isnan(lead)[:, None], 0.0, found)


def _earlier_answers(hours: np.ndarray, question: np.ndarray) -> np.ndarray:
    """How many answers to the same question were posted earlier than each. [A], [A] -> [A]."""
    order = np.lexsort((hours, question))
    place, h, q = np.arange(len(order)), hours[order], question[order]
    begins = np.append(True, q[1:] != q[:-1])
    rises = begins | np.append(True, h[1:] != h[:-1])
    start, equal = (np.maximum.accumulate(np.where(mark, place, 0)) for mark in (begins, rises))
    rank = np.empty(len(order))
    rank[order] = equal - start
    return rank


def balancing_weights(ahead: np.ndarray) -> np.ndarray:
    """1 / P(this winner | exposure), P at least `LEAST_PROBABILITY`, mean 1. [P, K] -> [P].

    β minimises the convex Σ exp(−x β) − x β, whose gradient is −Σ x / P, by Newton's method (weighted least
    squares, again and again). Example: of four pairs the earlier answer wins three -> 2/3, 2/3, 2/3, 2.

    Raises:
        ValueError: no pair differs in exposure, or the winner of every pair can be told from it.
    """
    if not ahead.any():
        raise ValueError("pack.exposure: the answers to reward's questions have no dates that differ")
    beta = np.zeros(ahead.shape[1])
    for _ in range(100):
        odds = np.exp(-ahead @ beta)  # against the winner; 1 / P = 1 + odds
        gradient = -ahead.T @ (1 + odds)
        if (abs(gradient) <= 1e-10 * (abs(ahead).T @ (1 + odds))).all():
            return _clipped(odds)
        step = np.linalg.lstsq(ahead.T @ (ahead * odds[:, None]), -gradient)[0]
        beta += _shortened(ahead, beta, step)
    raise ValueError("pack.exposure: exposure tells the winner of every pair; no weights balance that")


def _shortened(ahead: np.ndarray, beta: np.ndarray, step: np.ndarray) -> np.ndarray:
    """The step, halved until it does not lead uphill."""
    loss = lambda b: (np.exp(-ahead @ b) - ahead @ b).sum()  # noqa: E731
    while loss(beta + step) > loss(beta) + 1e-12 * abs(loss(beta)):
        step = step / 2
    return step


def _clipped(odds: np.ndarray) -> np.ndarray:
    weights = np.minimum(1 + odds, 1 / LEAST_PROBABILITY)
    return weights / weights.mean()

"""Pairwise losses, the weights of pairs, and the rule on length that a model need not learn."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional


def pair_loss(
    better: Tensor, worse: Tensor, ahead: Tensor | float = 0.0, smoothing: float = 0.0, centering: float = 0.0
) -> Tensor:
    """Negative log-likelihood of each preference under Bradley-Terry (arXiv 1706.03741, eq. 1).

    With d = better − worse + ahead: −(1 − ε) log σ(d) − ε log σ(−d) + c (better + worse)².

    Args:
        better: scores [P].
        worse: scores [P].
        ahead: added to the difference, [P]: −m for a margin m that is asked for (arXiv 2307.09288, eq. 2), or
            the log-odds of another expert on the same pair (product of experts, arXiv 2310.05199).
        smoothing: ε, the probability that a label is wrong; at 0.5 labels say nothing (arXiv 2401.06080).
        centering: c, pulls the scores of a pair towards mean 0 (arXiv 2312.09244, eq. 2).

    Returns:
        [P], nats.
    """
    odds = better - worse + ahead
    loss = -(1 - smoothing) * functional.logsigmoid(odds) - smoothing * functional.logsigmoid(-odds)
    return loss + centering * (better + worse) ** 2


def expected_loss(
    readings: Sequence[tuple[float, Tensor, Tensor]],
    ahead: Tensor | float = 0.0,
    smoothing: float = 0.0,
    centering: float = 0.0,
) -> Tensor:
    """:func:`pair_loss` in the mean over how each answer of a pair is read, one by itself of the other.

    Example: read with eos and, one time in four, without: readings (¾, better, worse), (¼, better without,
    worse without) weigh the four pairs of readings ⁹⁄₁₆, ³⁄₁₆, ³⁄₁₆ and ¹⁄₁₆.

    Args:
        readings: chance of a reading, and the scores [P] of the better and of the worse answers in it.
        ahead: as there.
        smoothing: as there.
        centering: as there.

    Returns:
        [P], nats.
    """
    return sum(
        chance * other * pair_loss(better, worse, ahead, smoothing, centering)
        for chance, better, _ in readings
        for other, _, worse in readings
    )


def gap_weights(gaps: Sequence[float], power: float) -> list[float]:
    """gap^power, divided by its mean over all pairs. [P] -> [P].

    Power 1 is the scaled Bradley-Terry loss (arXiv 2410.01257), 0 the plain one. Example: gaps 1 and 3 to the
    power 1 -> 0.5, 1.5.

    Raises:
        ValueError: all gaps are 0.
    """
    raised = torch.tensor(gaps, dtype=torch.float64) ** power
    if not raised.any():
        raise ValueError("gap_weight: the score gaps of all training pairs are 0")
    return (raised / raised.mean()).tolist()


def length_rule(longer: Sequence[float], weights: Sequence[float]) -> float:
    """β of the rule P(better wins) = σ(β · longer), by maximum likelihood.

    Args:
        longer: log(tokens of the better answer / tokens of the worse) of each pair, [P].
        weights: of the pairs, [P].

    Raises:
        ValueError: length tells no pair apart, or tells the winner of every pair (β would be infinite).
    """
    x, w = (torch.tensor(values, dtype=torch.float64) for values in (longer, weights))
    low, high = -64.0, 64.0
    slope = lambda beta: float((w * x * torch.sigmoid(-beta * x)).sum())  # noqa: E731  falls in beta
    if not slope(low) > 0 > slope(high):
        raise ValueError("length_offset: length tells no training pair apart, or the winner of every one")
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if slope(middle) > 0 else (low, middle)
    return (low + high) / 2

"""The optimum of a linear Bradley-Terry model: found, not searched for; the same bits from the same pairs."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from tasks.reward.losses import pair_loss

NEWTON_STEPS, SMALL = 50, 1e-9  # at most so many; a step of less than this is the last
LEAST_SCALE = 1e-9  # a feature that differs in no pair is divided by this


def newton(
    x: Tensor, weights: Tensor, ridge: float, ahead: Tensor | float = 0.0, smoothing: float = 0.0
) -> Iterator[Tensor]:
    """Bradley-Terry coefficients after each of Newton's steps from 0, the last at the optimum.

    Minimised is Σ w loss(c·x + ahead) + ridge/2 |c|², strictly convex, the loss that of
    :func:`tasks.reward.losses.pair_loss`. A step that would not lower it is halved.

    Args:
        x: [P, F] float64, better minus worse.
        weights: [P].
        ridge: above 0.
        ahead: [P] log-odds that are given.
        smoothing: share of labels that are taken to be wrong.

    Yields:
        [F].
    """

    def cost(c: Tensor) -> Tensor:
        return weights @ pair_loss(x @ c, torch.zeros(()), ahead, smoothing) + ridge / 2 * c @ c

    found = torch.zeros(x.shape[1], dtype=torch.float64)
    for _ in range(NEWTON_STEPS):
        right = torch.sigmoid(x @ found + ahead)
        gradient = x.T @ (weights * (1 - smoothing - right)) - ridge * found
        curvature = (x.T * (weights * right * (1 - right))) @ x + ridge * torch.eye(len(found)).double()
        step, before = torch.linalg.solve(curvature, gradient), cost(found)
        while step.abs().max() > SMALL and not cost(found + step) <= before:
            step = step / 2
        found = found + step
        yield found
        if step.abs().max() <= SMALL:
            return


def scaled(values: Tensor, pairs: Tensor) -> tuple[Tensor, Tensor]:
    """Differences of pairs over their root mean square, and that. [A, F], [P, 2] -> [P, F], [F]."""
    differences = values[pairs[:, 0]] - values[pairs[:, 1]]
    scale = (differences**2).mean(0).sqrt() + LEAST_SCALE
    return differences / scale, scale


@contextmanager
def one_thread() -> Iterator[None]:
    """Sums of one order, whatever machine.threads says."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)

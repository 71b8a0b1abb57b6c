"""A Bradley-Terry rule on features of texts: what length, layout and the like say of a pair."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

RIDGE = 1.0  # half a squared coefficient costs as much as one nat of a pair's likelihood
NEWTON_STEPS = 50


def sigmoid(x: np.ndarray) -> np.ndarray:
    """1 / (1 + e⁻ˣ), without overflow."""
    return np.exp(-np.logaddexp(0, -x))


def fit_logistic(differences: np.ndarray, weights: np.ndarray, ridge: float = RIDGE) -> np.ndarray:
    """Bradley-Terry coefficients: the maximum of Σ w ln σ(c·x) − ridge/2 |c|², by Newton's method from 0.

    There is no intercept, because neither answer of a pair comes first. Newton's steps from 0, where the
    curvature is greatest, need no damping.

    Args:
        differences: [P, F] x, features of the better minus those of the worse answer.
        weights: [P] w, of each pair.
        ridge: price of a squared coefficient; above 0 it keeps those of separable pairs finite.

    Returns:
        [F] c.
    """
    found, price = np.zeros(differences.shape[1]), ridge * np.eye(differences.shape[1])
    for _ in range(NEWTON_STEPS):
        doubt = sigmoid(-(differences @ found))  # [P] what the model gives to the worse answer
        gradient = differences.T @ (weights * doubt) - price @ found
        curvature = (differences.T * (weights * doubt * (1 - doubt))) @ differences + price
        step = np.linalg.solve(curvature, gradient)
        found += step
        if np.abs(step).max() < 1e-10:
            break
    return found


@dataclass(frozen=True, slots=True, eq=False)
class LogisticRule:
    """The fitted rule. Miniature: 3 pairs of 2 questions, standardised [0.4, …], scales [1.3, …]."""

    standardised: np.ndarray  # [F] log-odds per root mean square difference of a feature
    scales: np.ndarray  # [F] root mean square difference in the training pairs, 1 where there is none
    pairs: int
    questions: int

    @property
    def coefficients(self) -> np.ndarray:
        """Log-odds per unit of a feature, [F]."""
        return self.standardised / self.scales


def fit_rule(differences: np.ndarray, weights: np.ndarray, questions: int) -> LogisticRule:
    """The logistic rule of training pairs. Differences [P, F], weights [P]."""
    scales = np.sqrt((differences**2).mean(axis=0))  # about 0: a pair has no first answer
    scales[scales == 0] = 1.0
    standardised = fit_logistic(differences / scales, weights)
    return LogisticRule(standardised, scales, len(differences), questions)

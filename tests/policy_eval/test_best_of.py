"""Best of n against all subsets, and its KL."""

from __future__ import annotations

import math
from itertools import combinations

import numpy as np
import pytest

from tasks.policy_eval.best_of import best_of, kl_bound, weights


def by_subsets(scores, values, n):
    """Every subset of n: the mean of the values of those that share its highest score."""
    found = []
    for chosen in combinations(range(len(scores)), n):
        highest = max(scores[i] for i in chosen)
        found.append(np.mean([values[i] for i in chosen if scores[i] == highest]))
    return np.mean(found)


@pytest.mark.parametrize(
    "scores", [[3.0, 1.0, 4.0, 0.5, 2.0, 9.0], [1.0, 1.0, 2.0, 2.0, 2.0, 0.0], [5.0] * 6, [0.0] * 5 + [7.0]]
)
@pytest.mark.parametrize("n", [1, 2, 3, 5, 6])
def test_the_mean_over_all_subsets(scores, n):
    """Ties share what they win together."""
    values = np.array([0.1, 5.0, -2.0, 7.0, 0.0, 1.0])
    found = best_of(np.array([scores, scores[::-1]]), np.array([values, values[::-1]]), n)
    assert found == pytest.approx(by_subsets(scores, values, n))


def test_weights_by_hand():
    """Of four, the best of two: C(r − 1, 1) / C(4, 2)."""
    for scores, n, wanted in (
        ([10.0, 40.0, 20.0, 30.0], 2, [0, 3 / 6, 1 / 6, 2 / 6]),
        ([10.0, 40.0, 20.0, 30.0], 4, [0, 1, 0, 0]),
        ([7.0, 7.0, 7.0, 1.0], 2, [1 / 3, 1 / 3, 1 / 3, 0]),
    ):
        assert weights(np.array([scores]), n)[0] == pytest.approx(wanted)


def test_it_is_unbiased():
    """From N = 6 samples the best of 3 of a uniform number is ¾ on average, and not that of 6."""
    scores = np.random.default_rng(0).random((20000, 6))
    assert best_of(scores, scores, 3).mean() == pytest.approx(3 / 4, abs=0.004)
    assert best_of(scores, scores, 1) == pytest.approx(scores.mean(1))
    assert best_of(scores, scores, 6) == pytest.approx(scores.max(1))


@pytest.mark.parametrize("n", [0, 5])
def test_more_than_there_are_is_refused(n):
    with pytest.raises(ValueError, match=f"best of {n}: 4 samples per prompt are there"):
        weights(np.zeros((2, 4)), n)


def test_the_bound_holds_and_is_reached_without_ties():
    """Of m equally likely outcomes: KL of the best of n, exactly, nears ln n − (n − 1) / n from below."""
    for n in (1, 2, 4, 16):
        found = []
        for outcomes in (2, 10, 1000):
            rank = np.arange(1, outcomes + 1)
            chance = (rank / outcomes) ** n - ((rank - 1) / outcomes) ** n
            found.append(float((chance * np.log(np.maximum(chance, 1e-300) * outcomes)).sum()))
        assert found == sorted(found) and max(found) <= kl_bound(n) + 1e-9
        assert found[-1] == pytest.approx(kl_bound(n), abs=0.02)
    assert kl_bound(1) == 0 and kl_bound(4) == pytest.approx(math.log(4) - 0.75)

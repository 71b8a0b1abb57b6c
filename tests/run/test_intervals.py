"""Intervals by resampling: known cases, and that they cover what they claim to cover."""

from __future__ import annotations

import numpy as np
import pytest

from tasks.run.intervals import FEWEST, Resamples, bootstrap


def mean_of(values):
    values = np.asarray(values, dtype=float)
    return lambda weights: float(weights @ values / weights.sum())


def test_nothing_to_doubt():
    assert bootstrap(["a", "b", "c"], mean_of([1, 1, 1]), 50, 0) == (1.0, 1.0)
    assert bootstrap(["a", "a"], mean_of([0, 1]), 50, 0) == (0.5, 0.5), "one unit: its rows stay together"


def test_rows_of_a_unit_stay_together():
    seen = []

    def statistic(weights):
        seen.append(weights.tolist())
        return 0.0

    bootstrap(["b", "a", "b", "c", "a"], statistic, 200, 1)
    for b1, a1, b2, c, a2 in seen:
        assert b1 == b2 and a1 == a2 and a1 + b1 + c == 3
    assert len({tuple(w) for w in seen}) == 10, "all multisets of three units come up"


def test_the_percentiles():
    """One of two units: the mean of 0 and 1 is 0, ½ or 1 with chances ¼, ½, ¼."""
    assert bootstrap([1, 2], mean_of([0, 1]), 400, 3) == (0.0, 1.0)
    draws = iter(np.arange(1001))
    low, high = bootstrap([1, 2], lambda weights: float(next(draws)), 1001, 0)
    assert (low, high) == pytest.approx((25, 975))


def test_the_same_seed_gives_the_same_interval():
    rows = np.random.default_rng(0).normal(size=40)
    found = [bootstrap(range(40), mean_of(rows), 100, seed) for seed in (5, 5, 6, 2**63 + 5)]
    assert found[0] == found[1] == found[3] != found[2]


def test_the_spread_of_clusters_is_known():
    """400 clusters of three alike: the mean has the standard error of 400 values, √3 that of 1,200 rows."""
    draw, clusters = np.random.default_rng(2), np.repeat(np.arange(400), 3)
    values = np.repeat(draw.normal(size=400), 3)
    error = np.std(values) / np.sqrt(400)  # known: of a mean of 400 independent values
    low, high = bootstrap(clusters, mean_of(values), 2000, 0)
    assert (high - low) / 2 == pytest.approx(1.96 * error, rel=0.06)
    low, high = bootstrap(range(1200), mean_of(values), 2000, 0)
    assert (high - low) / 2 == pytest.approx(1.96 * error / np.sqrt(3), rel=0.06)


def test_an_interval_covers_the_truth_19_times_in_20():
    """100 worlds of 40 questions with 5 like answers each; resampling rows instead would cover about 60 %."""
    draw, covered = np.random.default_rng(1), 0
    units = np.repeat(np.arange(40), 5)
    for world in range(100):
        values = np.repeat(draw.normal(size=40), 5) + 0.1 * draw.normal(size=200)
        low, high = bootstrap(units, mean_of(values), 200, world)
        covered += low <= 0 <= high
    assert 86 <= covered <= 99


def test_many_means_over_one_set_of_draws_are_the_bootstraps_own():
    draw = np.random.default_rng(1)
    units, values = draw.integers(0, 40, 200), draw.random((3, 200))
    resamples = Resamples.of(units, 150, 7)
    for each in values:
        wanted = bootstrap(units, lambda w, each=each: float(w @ each / w.sum()), 150, 7)
        assert resamples.interval(each) == pytest.approx(wanted)


def test_units_of_known_variance():
    """400 clusters of four rows that say the same: the error of the mean is σ / √400, not σ / √1600."""
    draw = np.random.default_rng(0)
    values = np.repeat(draw.normal(0, 2.0, 400), 4)
    clusters = np.repeat(np.arange(400), 4)

    def width(units):
        low, high = Resamples.of(units, 2000, 3).interval(values)
        return (high - low) / (2 * 1.96)

    error = values[::4].std() / np.sqrt(400)
    assert width(clusters) == pytest.approx(error, rel=0.06)
    assert width(np.arange(1600)) == pytest.approx(error / 2, rel=0.06), "what resampling rows would claim"


def test_too_few_units_show_no_interval():
    assert Resamples.of(["a", "a", "b", "c", "d"] * 10, 100, 0).interval(np.ones(50)) is None
    assert Resamples.of(list("abcde") * 10, 100, 0).interval(np.ones(50)) == (1, 1) and FEWEST == 5

"""Brier, log loss, calibration error and temperature by hand; both orientations; the same picture twice."""

from __future__ import annotations

from math import log

import numpy as np
import pytest

from tasks.reward_eval.calibration import (
    brier,
    calibrate,
    draw_reliability,
    ece,
    fit_temperature,
    log_loss,
    reliability,
)

THREE = log(3)  # P(better) = 3/4


def drawn(pairs: int, temperature: float = 1.0, seed: int = 0) -> np.ndarray:
    """Margins of a model whose margins / temperature are the true log-odds."""
    draw = np.random.default_rng(seed)
    log_odds = draw.normal(size=pairs) * 2
    return np.where(draw.random(pairs) < 1 / (1 + np.exp(-log_odds)), log_odds, -log_odds) * temperature


def test_brier_and_log_loss_by_hand():
    assert brier(np.array([THREE, -THREE])) == pytest.approx((1 / 16 + 9 / 16) / 2)
    assert log_loss(np.array([THREE, -THREE])) == pytest.approx(-(log(3 / 4) + log(1 / 4)) / 2)
    assert brier(np.zeros(3)) == 0.25 and log_loss(np.zeros(3)) == pytest.approx(log(2))
    assert brier(np.array([50.0])) < 1e-40 and log_loss(np.array([-800.0])) == 800


def test_ece_by_hand():
    """At ¾ right 3 of 4: nothing; 2 of 4: ¼. At σ(4) = .982 two of two are right. Ties: ½ at ½."""
    assert ece(np.array([THREE] * 3 + [-THREE])) == pytest.approx(0)
    assert ece(np.array([THREE, -THREE] * 2)) == pytest.approx(1 / 4)
    four = 1 / (1 + np.exp(-4))
    assert ece(np.array([THREE, -THREE] * 2 + [4.0] * 2)) == pytest.approx((4 * 0.25 + 2 * (1 - four)) / 6)
    assert ece(np.zeros(5)) == 0
    assert ece(np.array([0.0, 0.01, -0.01])) == pytest.approx(2 * (1 / (1 + np.exp(-0.01)) - 0.5) / 3)
    margins = np.log([0.57 / 0.43, 0.62 / 0.38])
    assert ece(margins) == pytest.approx((0.43 + 0.38) / 2)
    assert ece(margins * [1, -1]) == pytest.approx((0.43 + 0.62) / 2), "bins do not cancel each other"


def test_both_orientations_say_the_same():
    """Twenty bins of P over [0, 1], every pair once each way round: the textbook's error is ours."""
    margins = drawn(700)
    p = 1 / (1 + np.exp(-np.concatenate([margins, -margins])))
    is_first_better = np.repeat([1.0, 0.0], len(margins))
    bins = np.minimum((20 * p).astype(int), 19)
    found = sum(abs((is_first_better - p)[bins == b].mean()) * (bins == b).mean() for b in set(bins))
    assert ece(margins) == pytest.approx(found)
    assert brier(margins) == pytest.approx(((p - is_first_better) ** 2).mean())


def test_a_calibrated_model_has_a_small_error_and_temperature_one():
    margins = drawn(40_000)
    assert ece(margins) < 0.01 and fit_temperature(margins) == pytest.approx(1, abs=0.03)
    assert ece(margins * 3) > 0.08 and fit_temperature(margins * 3) == pytest.approx(3, abs=0.09)


def test_temperature_by_hand():
    """Margins ±5 and 3 of 4 right: 5 / T must be ln 3."""
    assert fit_temperature(np.array([5.0] * 3 + [-5.0])) == pytest.approx(5 / THREE, rel=1e-5)


def test_temperature_has_the_least_log_loss():
    margins = drawn(300, 2.5)
    found = fit_temperature(margins)
    assert log_loss(margins / found) < min(log_loss(margins / found / 1.01), log_loss(margins / found * 1.01))
    assert fit_temperature(margins * 7) == pytest.approx(7 * found, rel=1e-5)


@pytest.mark.parametrize("margins", [[-1.0, -2.0], [1.0, -1.0], [0.0, 0.0], [1.0, -2.0]])
def test_no_temperature_mends_margins_that_point_the_wrong_way(margins):
    with np.errstate(all="raise"):
        assert fit_temperature(np.array(margins)) is None
    assert calibrate(np.array(margins), np.arange(2), 100, 0)["temperature"] is None


def test_all_right_has_a_finite_temperature():
    assert 0 < fit_temperature(np.full(2000, 3.0)) < 1


def test_bins_add_up():
    margins, questions = np.append(drawn(500), [0.0, 0.0, 900.0, -900.0]), np.arange(504) // 3
    found = calibrate(margins, questions, 100, 0)
    bins = found["bins"]
    pairs = np.array([b["pairs"] for b in bins])
    assert pairs.sum() == 504 and len(bins) == 10
    right = [b["right"] for b in bins]
    assert pairs @ right == (margins > 0).sum() + 1, "half of two ties"
    gaps = [abs(b["right"] - b["confidence"]) for b in bins]
    assert pairs @ gaps / 504 == pytest.approx(ece(margins)) == found["ece"]
    edges = [b["low"] for b in bins] + [1.0]
    assert edges == pytest.approx(np.linspace(0.5, 1, 11)) and [b["high"] for b in bins] == edges[1:]
    assert all(b["low"] <= b["confidence"] <= b["high"] for b in bins)
    assert all(b["interval"][0] <= b["right"] <= b["interval"][1] for b in bins)
    assert found["brier"] == brier(margins) and found["log_loss"] == log_loss(margins)
    warm = found["temperature"]
    assert warm["log_loss"] == log_loss(margins / warm["value"]) and warm["ece"] == ece(
        margins / warm["value"]
    )


def test_empty_bins_are_left_out_and_small_ones_have_no_interval():
    found = reliability(np.array([0.0, 4.0, 4.0, -4.0, 4.0, 4.0]), np.array([0, 1, 2, 3, 4, 5]), 100, 0)
    assert [(b["low"], b["pairs"], b["right"]) for b in found] == [(0.5, 1, 0.5), (0.95, 5, 0.8)]
    assert found[0]["interval"] is None and found[1]["interval"] is not None


def test_the_same_bins_draw_the_same_picture(tmp_path):
    bins = reliability(np.append(drawn(200), 0.0), np.arange(201) // 2, 100, 0)
    few = reliability(np.array([0.5, 3.0]), np.arange(2), 100, 0)

    def draw(name, *what):
        return draw_reliability(tmp_path / "reports" / name, *what).read_bytes()

    picture = draw("a.png", bins, "Brier 0.2")
    assert picture.startswith(b"\x89PNG") and draw("b.png", bins, "Brier 0.2") == picture
    others = [bins[1:], few, [b | {"interval": (0.4, 0.9)} for b in bins], [b | {"pairs": 9} for b in bins]]
    drawn_anew = {draw("c.png", other, "Brier 0.2") for other in others}
    assert len({picture, *drawn_anew, draw("d.png", bins, "Brier 0.3")}) == 6
    assert b"Software" not in picture and b"tIME" not in picture

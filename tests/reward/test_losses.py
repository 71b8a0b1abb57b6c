"""Each formula by hand, and the identities that tie them to the plain loss."""

from __future__ import annotations

import math

import pytest
import torch

from tasks.reward.losses import expected_loss, gap_weights, length_rule, pair_loss

BETTER, WORSE = torch.tensor([2.0, 1.0, 1.0, 0.0]), torch.tensor([2.0, 0.0, 1 + math.log(3), 300.0])
PLAIN = [math.log(2), math.log(1 + math.exp(-1)), math.log(4), 300.0]


def test_pair_loss_by_hand():
    assert pair_loss(BETTER, WORSE).tolist() == pytest.approx(PLAIN)


def test_readings_by_hand():
    """One time in four without eos: 9/16, 3/16 (the better alone), 3/16 (the worse alone), 1/16."""
    whole, cut = (torch.tensor([1.0]), torch.tensor([0.0])), (torch.tensor([3.0]), torch.tensor([2.0]))
    found = expected_loss([(0.75, *whole), (0.25, *cut)])
    wanted = [9, 1 - 0, 3, 3 - 0, 3, 1 - 2, 1, 3 - 2]
    terms = zip(wanted[::2], wanted[1::2], strict=True)
    assert found.item() == pytest.approx(sum(n / 16 * math.log(1 + math.exp(-d)) for n, d in terms))
    assert torch.equal(expected_loss([(1.0, BETTER, WORSE)]), pair_loss(BETTER, WORSE))


def test_a_margin_by_hand():
    """d = 1 with 1 ahead is d = 2; with 1 behind it is d = 0."""
    found = pair_loss(BETTER[[1, 1]], WORSE[[1, 1]], torch.tensor([1.0, -1.0]))
    assert found.tolist() == pytest.approx([math.log(1 + math.exp(-2)), math.log(2)])


def test_smoothing_by_hand():
    """At d = 1: −0.8 log σ(1) − 0.2 log σ(−1)."""
    wanted = 0.8 * math.log(1 + math.exp(-1)) + 0.2 * math.log(1 + math.exp(1))
    assert pair_loss(BETTER[1], WORSE[1], smoothing=0.2).item() == pytest.approx(wanted)


def test_smoothing_a_half_does_not_know_the_better_one():
    scores = torch.randn(2, 9, generator=torch.Generator().manual_seed(0))
    assert torch.equal(pair_loss(*scores, smoothing=0.5), pair_loss(*scores.flip(0), smoothing=0.5))


def test_smoothing_is_least_where_the_odds_are_those_of_the_labels():
    scores = torch.tensor([math.log(0.9 / 0.1)], requires_grad=True)
    pair_loss(scores, torch.zeros(1), smoothing=0.1).sum().backward()
    assert abs(scores.grad.item()) < 1e-7


def test_centering_by_hand():
    found = pair_loss(BETTER, WORSE, centering=0.01)
    sums = [4.0, 1.0, 2 + math.log(3), 300.0]
    assert found.tolist() == pytest.approx([p + 0.01 * s**2 for p, s in zip(PLAIN, sums, strict=True)])


def test_gap_weights_by_hand():
    assert gap_weights([1, 3], 1) == pytest.approx([0.5, 1.5])
    assert gap_weights([1, 4], 0.5) == pytest.approx([2 / 3, 4 / 3])
    assert gap_weights([1, 7, 2], 0) == [1, 1, 1]
    assert sum(gap_weights([1, 7, 2, 5], 1.3)) == pytest.approx(4)
    with pytest.raises(ValueError, match=r"gap_weight: .* are 0"):
        gap_weights([0, 0], 1)


def test_length_rule_by_hand():
    """A response e times as long wins three of four: its log-odds are log 3; weights count as pairs."""
    assert length_rule([1, 1, 1, -1], [1] * 4) == pytest.approx(math.log(3))
    assert length_rule([1, -1], [3, 1]) == pytest.approx(math.log(3))
    assert length_rule([-2, -2, -2, 2], [1] * 4) == pytest.approx(-math.log(3) / 2)
    assert length_rule([1, -1, 0, 0], [1] * 4) == pytest.approx(0)


def test_length_rule_is_the_most_likely():
    draw = torch.Generator().manual_seed(1)
    x, w = torch.randn(50, generator=draw).double(), torch.rand(50, generator=draw).double()
    beta = length_rule(x.tolist(), w.tolist())
    loss = lambda b: float((w * pair_loss(b * x, torch.zeros_like(x))).sum())  # noqa: E731
    assert loss(beta) < min(loss(beta - 1e-3), loss(beta + 1e-3))


@pytest.mark.parametrize("longer", [[1, 2], [0, 0], [-1, -0.01]])
def test_a_length_that_tells_all_or_nothing_is_refused(longer):
    with pytest.raises(ValueError, match=r"^length_offset: "):
        length_rule(longer, [1, 1])

"""Rewards, advantages and losses: by hand, by identity, and with columns of junk."""

from __future__ import annotations

import math

import pytest
import tiny
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tasks.ppo.advantages import gae
from tasks.ppo.guard import SpikeGuard
from tasks.ppo.losses import policy_loss, ratio_of, value_loss
from tasks.ppo.rewards import RunningMoments, kl_estimate, token_rewards

T, F = True, False


def drawn(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def prefix(lengths, width):
    return torch.arange(width) < torch.tensor(lengths)[:, None]


# ---- rewards


def paid(scores, logprobs, reference, real, price):
    return token_rewards(scores, kl_estimate(logprobs - reference, "kl"), real, price)


def test_token_rewards_by_hand():
    """KL of 1, −2 and .5 nats at a price of .1; the score lands on the last real token."""
    logprobs = torch.tensor([[-1.0, -3.0, -9.0], [-0.5, -1.0, -1.0]])
    reference = torch.tensor([[-2.0, -1.0, -5.0], [-1.0, -1.0, -1.0]])
    found = paid(torch.tensor([4.0, -2.0]), logprobs, reference, prefix([2, 1], 3), 0.1)
    assert tiny.far(found, [[-0.1, 4.2, 0.0], [-2.05, 0.0, 0.0]]) < 1e-6


def test_rewards_sum_to_the_score_less_the_price_of_the_kl():
    real, logprobs, reference = prefix([5, 1, 3], 5), drawn(3, 5), drawn(3, 5, seed=1)
    scores = torch.tensor([1.0, 2.0, 3.0])
    found = paid(scores, logprobs, reference, real, 0.3).sum(1)
    assert tiny.far(found, scores - 0.3 * ((logprobs - reference) * real).sum(1)) < 1e-6


def test_the_score_falls_on_the_last_action_and_an_empty_response_gets_none():
    """Actions at 0 1 and 3, a tool's token at 2; nothing; a tool's token last."""
    is_action = torch.tensor([[T, T, F, T], [F, F, F, F], [T, F, F, F]])
    found = token_rewards(torch.tensor([5.0, 6.0, 7.0]), torch.ones(3, 4), is_action, 0.5)
    assert found.tolist() == [[-0.5, -0.5, 0, 4.5], [0, 0, 0, 0], [6.5, 0, 0, 0]]


def test_a_reward_for_each_token_by_hand():
    dense = [torch.tensor([1.0, 2.0, 3.0]), torch.tensor([4.0])]
    found = token_rewards(dense, torch.ones(2, 3), torch.tensor([[T, F, T], [T, F, F]]), 0.1)
    assert tiny.far(found, [[0.9, 0, 2.9], [3.9, 0, 0]]) < 1e-6


def test_no_price_pays_the_score_alone():
    found = paid(torch.tensor([7.0]), drawn(1, 4), drawn(1, 4, seed=1), prefix([3], 4), 0.0)
    assert found.tolist() == [[0, 0, 7, 0]]


def test_columns_of_junk_change_no_reward():
    real, logprobs, reference = prefix([2, 3], 3), drawn(2, 3), drawn(2, 3, seed=1)
    scores = torch.tensor([1.0, -1.0])
    junk = torch.full((2, 2), 1e6)
    wide = paid(
        scores, torch.cat([logprobs, junk], 1), torch.cat([reference, -junk], 1), prefix([2, 3], 5), 0.2
    )
    assert torch.equal(wide[:, :3], paid(scores, logprobs, reference, real, 0.2))
    assert not wide[:, 3:].any()


# ---- KL


@pytest.mark.parametrize(
    ("kind", "wanted"),
    [("kl", [1, -2]), ("abs", [1, 2]), ("mse", [0.5, 2]), ("k3", [math.exp(-1), math.exp(2) - 3])],
)
def test_estimates_of_kl_by_hand(kind, wanted):
    assert tiny.far(kl_estimate(torch.tensor([1.0, -2.0]), kind), wanted) < 1e-6


@pytest.mark.parametrize("kind", ["kl", "k3"])
def test_unbiased_estimates_average_to_the_kl(kind):
    """Over the policy's own distribution, exactly."""
    policy, reference = (drawn(50, seed=n).double().log_softmax(0) for n in (0, 1))
    exact = (policy.exp() * (policy - reference)).sum()
    assert tiny.far((policy.exp() * kl_estimate(policy - reference, kind)).sum(), exact) < 1e-10


def test_the_gradient_of_k2_is_that_of_the_kl():
    """At fixed samples the mean gradient of k2 is ∇KL, and that of k1 is nothing."""
    logits = drawn(20).double().requires_grad_()
    reference = drawn(20, seed=1).double().log_softmax(0)
    policy = logits.log_softmax(0)
    (wanted,) = torch.autograd.grad((policy.exp() * (policy - reference)).sum(), logits, retain_graph=True)
    weights = policy.detach().exp()  # each token as often as it is drawn
    of_kind = lambda kind: torch.autograd.grad(  # noqa: E731
        (weights * kl_estimate(policy - reference, kind)).sum(), logits, retain_graph=True
    )[0]
    assert tiny.far(of_kind("mse"), wanted) < 1e-10
    assert of_kind("kl").abs().max() < 1e-10


def test_an_unknown_estimate_is_refused():
    with pytest.raises(ValueError, match="kl_penalty: full is no estimate from one token"):
        kl_estimate(torch.zeros(1), "full")


def test_running_moments_are_those_of_all_scores():
    moments, scores = RunningMoments(), 3 + 5 * drawn(23)
    assert moments.std == 1
    for part in scores.split([4, 1, 10, 8]):
        moments.update(part)
    assert moments.mean == pytest.approx(scores.mean().item(), rel=1e-6)
    assert moments.std == pytest.approx(scores.std().item(), rel=1e-6)
    other = RunningMoments()
    other.load_state_dict(moments.state_dict())
    for each in (moments, other):
        each.update(scores)
    assert (other.mean, other.std) == (moments.mean, moments.std)


def test_scores_without_spread_divide_by_one():
    moments = RunningMoments()
    moments.update(torch.full((5,), 2.0))
    assert (moments.mean, moments.std) == (2.0, 1.0)


# ---- advantages


def test_gae_by_hand():
    """γ = .9, λ = .5: δ₂ = 2 − 1 = 1, δ₁ = 1 + .9·1 − .5 = 1.4, δ₀ = 0 + .9·.5 − 2 = −1.55."""
    rewards, values = torch.tensor([[0.0, 1.0, 2.0]]), torch.tensor([[2.0, 0.5, 1.0]])
    advantages, returns = gae(rewards, values, prefix([3], 3), 0.9, 0.5)
    last, middle = 1.0, 1.4 + 0.45 * 1.0
    first = -1.55 + 0.45 * middle
    assert tiny.far(advantages, [[first, middle, last]]) < 1e-6
    assert tiny.far(returns, [[first + 2.0, middle + 0.5, last + 1.0]]) < 1e-6


def discounted(rewards, gamma):
    """Sum of γᵏ·reward over the tokens that are left, by the definition."""
    return [sum(gamma ** (k - t) * rewards[k] for k in range(t, len(rewards))) for t in range(len(rewards))]


def test_lambda_one_is_return_minus_value():
    rewards, values, lengths = drawn(3, 6), drawn(3, 6, seed=1), [6, 1, 4]
    advantages, returns = gae(rewards, values, prefix(lengths, 6), 0.9, 1.0)
    for b, n in enumerate(lengths):
        wanted = torch.tensor(discounted(rewards[b, :n].tolist(), 0.9))
        assert tiny.far(returns[b, :n], wanted) < 1e-5
        assert tiny.far(advantages[b, :n], wanted - values[b, :n]) < 1e-5
        assert not advantages[b, n:].any() and not returns[b, n:].any()


def test_lambda_zero_is_the_td_error():
    rewards, values, lengths = drawn(3, 6), drawn(3, 6, seed=1), [6, 1, 4]
    advantages, _ = gae(rewards, values, prefix(lengths, 6), 0.9, 0.0)
    for b, n in enumerate(lengths):
        later = torch.cat([values[b, 1:n], torch.zeros(1)])
        assert tiny.far(advantages[b, :n], rewards[b, :n] + 0.9 * later - values[b, :n]) < 1e-6


def test_a_masked_gap_does_not_exist():
    """A tool's tokens inside a response: as if they were cut out, whatever stands there."""
    rewards, values = drawn(2, 7), drawn(2, 7, seed=1)
    keep = torch.tensor([T, T, F, F, T, T, F])
    mask = keep.expand(2, 7)
    cut = gae(rewards[:, keep], values[:, keep], torch.ones(2, 4, dtype=torch.bool), 0.9, 0.8)
    for junk in (0.0, 1e4):
        found = gae(rewards.masked_fill(~mask, junk), values.masked_fill(~mask, -junk), mask, 0.9, 0.8)
        for a, b in zip(found, cut, strict=True):
            assert tiny.far(a[:, keep], b) < 1e-6 and not a[:, ~keep].any()


# ---- losses


def losses(new, old, advantages, real, cliprange):
    """Sums over the real tokens: loss, clipped tokens."""
    ratio = ratio_of(new, old, real)
    return [(x * real).sum() for x in policy_loss(ratio, advantages, cliprange)]


def test_policy_loss_by_hand():
    """Ratios 1.5, .5, 1.1, .5, 1.5 with advantages 2, 2, −1, −1, −2; clipped at .8 and 1.2."""
    old = torch.zeros(1, 5)
    new = torch.tensor([[1.5, 0.5, 1.1, 0.5, 1.5]]).log()
    advantages = torch.tensor([[2.0, 2.0, -1.0, -1.0, -2.0]])
    loss, clipped = losses(new, old, advantages, prefix([5], 5), 0.2)
    assert loss.item() == pytest.approx(-2.4 - 1.0 + 1.1 + 0.8 + 3.0)
    assert clipped.item() == 2, "the first and the fourth"


def test_clipped_tokens_give_no_gradient():
    new = torch.tensor([[1.5, 0.5, 1.1, 0.5, 1.5]]).log().requires_grad_()
    advantages = torch.tensor([[2.0, 2.0, -1.0, -1.0, -2.0]])
    losses(new, torch.zeros(1, 5), advantages, prefix([5], 5), 0.2)[0].backward()
    assert tiny.far(new.grad, [[0.0, -1.0, 1.1, 0.0, 3.0]]) < 1e-6


def test_the_first_gradient_is_the_policy_gradient():
    """At ratio 1 the gradient of the loss is −advantage and the loss is minus the sum of advantages."""
    logprobs, advantages, real = drawn(3, 4).requires_grad_(), drawn(3, 4, seed=1), prefix([4, 1, 2], 4)
    loss, clipped = losses(logprobs, logprobs.detach(), advantages, real, 0.2)
    loss.backward()
    assert tiny.far(logprobs.grad, -advantages * real) < 1e-6
    assert loss.item() == pytest.approx(-(advantages * real).sum().item(), rel=1e-5)
    assert clipped == 0


@pytest.mark.parametrize("advantage", [3.0, -3.0])
def test_a_ratio_beyond_float32_stays_finite(advantage):
    """TRL 0.11: inf · 0 = NaN."""
    new = torch.tensor([[200.0, 1.0]]).requires_grad_()
    loss, _ = losses(
        new, torch.tensor([[-200.0, 1.0]]), torch.tensor([[advantage, 0.0]]), prefix([2], 2), 0.2
    )
    loss.backward()
    assert torch.isfinite(loss) and torch.isfinite(new.grad).all()


def test_value_loss_by_hand():
    """Old value 0, clip .2, return 1: .1 is free, .5 is clipped to .2 whose error is larger, 3 is farther."""
    found, clipped = value_loss(torch.tensor([[0.1, 0.5, 3.0]]), torch.zeros(1, 3), torch.ones(1, 3), 0.2)
    assert tiny.far(found, [[0.5 * 0.9**2, 0.5 * 0.8**2, 0.5 * 2.0**2]]) < 1e-6
    assert clipped.tolist() == [[False, True, False]]


def test_value_loss_without_a_bound_is_half_the_squared_error():
    """And none is clipped, not even by the last bit."""
    values, old, returns = (drawn(20, 50, seed=n) for n in range(3))
    found, clipped = value_loss(values, old, returns, 1e9)
    assert torch.equal(found, 0.5 * (values - returns) ** 2) and not clipped.any()


def test_columns_of_junk_change_no_loss():
    new, old, advantages = (drawn(2, 3, seed=n) for n in range(3))
    wide = [
        torch.cat([x, torch.full((2, 2), 50.0 * (-1) ** n)], 1) for n, x in enumerate((new, old, advantages))
    ]
    for found, wanted in zip(
        losses(*wide, prefix([2, 3], 5), 0.2),
        losses(new, old, advantages, prefix([2, 3], 3), 0.2),
        strict=True,
    ):
        assert found.item() == pytest.approx(wanted.item(), rel=1e-5)


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 10**6), st.floats(0.05, 1.0))
def test_the_clipped_objective_is_a_lower_bound(seed, cliprange):
    new, old, advantages = (drawn(2, 4, seed=seed + n) for n in range(3))
    real = prefix([4, 2], 4)
    loss, clipped = losses(new, old, advantages, real, cliprange)
    free = -(advantages * (new - old).exp() * real).sum()
    assert loss >= free - 1e-4 and 0 <= clipped <= real.sum()


# ---- the guard of steps


def test_a_step_that_is_not_finite_or_far_off_is_refused(caplog):
    guard = SpikeGuard(ratio_threshold=10.0, spike_factor=5.0, patience=3)
    assert all(guard.allows(0.1, 1.0, 1.0) for _ in range(15)) and guard.allows(0.1, 1.0, 1e6)
    assert guard.allows(0.1, 10.0, 5.0) and not guard.allows(0.1, 10.1, 1.0)
    assert not guard.allows(math.nan, 1.0, 1.0) and not guard.is_lost
    assert not guard.allows(0.1, 1.0, math.inf) and guard.is_lost and guard.skipped == 3
    assert guard.allows(0.1, 1.0, 1.0) and guard.in_a_row == 0, "one good step forgives"
    assert not guard.allows(0.1, 1.0, 5.1), "the median of the norms is 1"
    assert "the mean ratio 10.1 exceeds ratio_threshold 10" in caplog.text
    assert "the gradient norm 5.1 is more than 5 times the usual 1" in caplog.text
    other = SpikeGuard(10.0, 5.0, 3)
    other.load_state_dict(guard.state_dict())
    assert not other.allows(0.1, 1.0, 5.1) and (other.skipped, other.in_a_row) == (5, 2)


def test_the_guard_remembers_the_last_norms_and_starts_from_enough():
    guard = SpikeGuard(ratio_threshold=10.0, spike_factor=5.0, patience=3)
    assert not guard.allows(0.1, math.nan, 1.0), "a ratio that is no number is no step"
    assert not guard.allows(0.1, 1.0, math.inf), "nor is this one, before there is anything usual"
    assert all(guard.allows(0.1, 1.0, float(norm)) for norm in range(100, 300))
    assert list(guard.norms) == [float(norm) for norm in range(236, 300)]
    other = SpikeGuard(10.0, 5.0, 3)
    other.load_state_dict({**guard.state_dict(), "norms": [0.0, *guard.norms]})
    assert other.norms == guard.norms and other.norms.maxlen == guard.norms.maxlen, "no more than it may"
    fresh = SpikeGuard(10.0, 5.0, 3)
    assert [fresh.allows(0.1, 1.0, norm) for norm in [1.0] * 16 + [5.1]] == [True] * 16 + [False]
    assert fresh.allows(0.1, 1.0, 5.0), "not above"
    assert not fresh.allows(math.inf, 1.0, 1.0) and fresh.norms.count(1.0) == 16
    still = SpikeGuard(10.0, 5.0, 3)
    assert all(still.allows(0.1, 1.0, norm) for norm in [0.0] * 16 + [7.0]), "of nothing there is no multiple"

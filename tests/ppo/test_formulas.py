"""Rewards, advantages and losses: by hand, by identity, and with columns of junk."""

from __future__ import annotations

import math

import pytest
import tiny
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tasks.ppo.advantages import gae
from tasks.ppo.losses import policy_loss, value_loss
from tasks.ppo.rewards import KLController, token_rewards

T, F = True, False


def drawn(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def prefix(lengths, width):
    return torch.arange(width) < torch.tensor(lengths)[:, None]


# ---- rewards


def test_token_rewards_by_hand():
    """KL of 1, −2 and .5 nats at a price of .1; the score lands on the last real token."""
    logprobs = torch.tensor([[-1.0, -3.0, -9.0], [-0.5, -1.0, -1.0]])
    reference = torch.tensor([[-2.0, -1.0, -5.0], [-1.0, -1.0, -1.0]])
    found = token_rewards(torch.tensor([4.0, -2.0]), logprobs, reference, prefix([2, 1], 3), 0.1)
    assert tiny.far(found, [[-0.1, 4.2, 0.0], [-2.05, 0.0, 0.0]]) < 1e-6


def test_rewards_sum_to_the_score_less_the_price_of_the_kl():
    real, logprobs, reference = prefix([5, 1, 3], 5), drawn(3, 5), drawn(3, 5, seed=1)
    scores = torch.tensor([1.0, 2.0, 3.0])
    found = token_rewards(scores, logprobs, reference, real, 0.3).sum(1)
    assert tiny.far(found, scores - 0.3 * ((logprobs - reference) * real).sum(1)) < 1e-6


def test_no_price_pays_the_score_alone():
    found = token_rewards(torch.tensor([7.0]), drawn(1, 4), drawn(1, 4, seed=1), prefix([3], 4), 0.0)
    assert found.tolist() == [[0, 0, 7, 0]]


def test_columns_of_junk_change_no_reward():
    real, logprobs, reference = prefix([2, 3], 3), drawn(2, 3), drawn(2, 3, seed=1)
    scores = torch.tensor([1.0, -1.0])
    junk = torch.full((2, 2), 1e6)
    wide = token_rewards(
        scores, torch.cat([logprobs, junk], 1), torch.cat([reference, -junk], 1), prefix([2, 3], 5), 0.2
    )
    assert torch.equal(wide[:, :3], token_rewards(scores, logprobs, reference, real, 0.2))
    assert not wide[:, 3:].any()


@pytest.mark.parametrize(
    ("kl", "target", "responses", "price"),
    [
        (6.0, 6.0, 256, 0.2),
        (6.6, 6.0, 256, 0.2 * (1 + 0.1 * 256 / 10000)),
        (60.0, 6.0, 256, 0.2 * (1 + 0.2 * 256 / 10000)),
        (0.0, 6.0, 128, 0.2 * (1 - 0.2 * 128 / 10000)),
        (5.7, 6.0, 256, 0.2 * (1 - 0.05 * 256 / 10000)),
        (-5.0, 6.0, 256, 0.2 * (1 - 0.2 * 256 / 10000)),
        (100.0, None, 256, 0.2),
    ],
)
def test_the_price_of_kl_by_zieglers_formula(kl, target, responses, price):
    controller = KLController(0.2, target, 10000)
    controller.update(kl, responses)
    assert controller.value == pytest.approx(price, rel=1e-12)


def test_the_price_compounds():
    controller = KLController(1.0, 1.0, 100)
    for _ in range(3):
        controller.update(9.0, 50)
    assert controller.value == pytest.approx(1.1**3)


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


def test_policy_loss_by_hand():
    """Ratios 1.5, .5, 1.1, .5, 1.5 with advantages 2, 2, −1, −1, −2; clipped at .8 and 1.2."""
    old = torch.zeros(1, 5)
    new = torch.tensor([[1.5, 0.5, 1.1, 0.5, 1.5]]).log()
    advantages = torch.tensor([[2.0, 2.0, -1.0, -1.0, -2.0]])
    loss, clipped, kl = policy_loss(new, old, advantages, prefix([5], 5), 0.2)
    assert loss.item() == pytest.approx(-2.4 - 1.0 + 1.1 + 0.8 + 3.0)
    assert clipped.item() == 2, "the first and the fourth"
    ratios = (1.5, 0.5, 1.1, 0.5, 1.5)
    assert kl.item() == pytest.approx(sum(r - 1 - math.log(r) for r in ratios), rel=1e-5)


def test_clipped_tokens_give_no_gradient():
    new = torch.tensor([[1.5, 0.5, 1.1, 0.5, 1.5]]).log().requires_grad_()
    policy_loss(new, torch.zeros(1, 5), torch.tensor([[2.0, 2.0, -1.0, -1.0, -2.0]]), prefix([5], 5), 0.2)[
        0
    ].backward()
    assert tiny.far(new.grad, [[0.0, -1.0, 1.1, 0.0, 3.0]]) < 1e-6


def test_the_first_gradient_is_the_policy_gradient():
    """At ratio 1 the gradient of the loss is −advantage, the loss is minus the sum of advantages, no KL."""
    logprobs, advantages, real = drawn(3, 4).requires_grad_(), drawn(3, 4, seed=1), prefix([4, 1, 2], 4)
    loss, clipped, kl = policy_loss(logprobs, logprobs.detach(), advantages, real, 0.2)
    loss.backward()
    assert tiny.far(logprobs.grad, -advantages * real) < 1e-6
    assert loss.item() == pytest.approx(-(advantages * real).sum().item(), rel=1e-5)
    assert clipped == 0 and kl == 0 and not kl.requires_grad


def test_value_loss_by_hand():
    """Old value 0, clip .2, return 1: .1 is free, .5 is clipped to .2 whose error is larger, 3 is farther."""
    old, returns = torch.zeros(1, 3), torch.ones(1, 3)
    found = value_loss(torch.tensor([[0.1, 0.5, 3.0]]), old, returns, prefix([3], 3), 0.2)
    assert found.item() == pytest.approx(0.5 * (0.9**2 + 0.8**2 + 2.0**2))


def test_value_loss_without_a_bound_is_half_the_squared_error():
    values, old, returns = drawn(2, 5), drawn(2, 5, seed=1), drawn(2, 5, seed=2)
    real = prefix([5, 2], 5)
    found = value_loss(values, old, returns, real, 1e9)
    assert found.item() == pytest.approx(0.5 * ((values - returns)[real] ** 2).sum().item(), rel=1e-5)


def test_columns_of_junk_change_no_loss():
    lengths = [2, 3]
    new, old, advantages, values, returns = (drawn(2, 3, seed=n) for n in range(5))
    wide = [
        torch.cat([x, torch.full((2, 2), 50.0 * (-1) ** n)], 1)
        for n, x in enumerate((new, old, advantages, values, returns))
    ]
    real = prefix(lengths, 3), prefix(lengths, 5)
    for found, wanted in zip(
        (*policy_loss(*wide[:3], real[1], 0.2), value_loss(*wide[3:], wide[0], real[1], 0.2)),
        (*policy_loss(new, old, advantages, real[0], 0.2), value_loss(values, returns, new, real[0], 0.2)),
        strict=True,
    ):
        assert found.item() == pytest.approx(wanted.item(), rel=1e-5)


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 10**6), st.floats(0.05, 1.0))
def test_the_clipped_objective_is_a_lower_bound(seed, cliprange):
    new, old, advantages = (drawn(2, 4, seed=seed + n) for n in range(3))
    real = prefix([4, 2], 4)
    loss, clipped, kl = policy_loss(new, old, advantages, real, cliprange)
    free = -(advantages * (new - old).exp() * real).sum()
    assert loss >= free - 1e-4 and 0 <= clipped <= real.sum() and kl >= 0

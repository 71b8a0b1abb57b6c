"""The price of KL: TRL's law by hand, and the one paced by the run before a made policy that follows late."""

from __future__ import annotations

import math
import random
from copy import deepcopy

import pytest
from made_trainers import batch, trainer

from tasks.ppo import PPOConfig
from tasks.ppo.kl_control import (
    AdaptiveKLController,
    FixedKLController,
    KLController,
    PacedKLController,
    controller_of,
    spent,
)

TARGET, RIGHT = 0.5, 0.4  # nats; the price at which the made policy spends them


@pytest.mark.parametrize(
    ("kl", "target", "responses", "price"),
    [
        (6.0, 6.0, 256, 0.2),
        (6.6, 6.0, 256, 0.2 * (1 + 0.1 * 256 / 10000)),
        (60.0, 6.0, 256, 0.2 * (1 + 0.2 * 256 / 10000)),
        (0.0, 6.0, 128, 0.2 * (1 - 0.2 * 128 / 10000)),
        (-1e-6, 6.0, 128, 0.2 * (1 - 0.2 * 128 / 10000)),
        (5.7, 6.0, 256, 0.2 * (1 - 0.05 * 256 / 10000)),
        (-5.0, 6.0, 256, 0.2),
        (100.0, None, 256, 0.2),
    ],
)
def test_the_price_of_kl_by_zieglers_formula(kl, target, responses, price):
    """A negative KL, beyond rounding, lowers no price; in TRL 0.11 it does."""
    controller = KLController(0.2, target, 10000)
    controller.update(kl, responses)
    assert controller.value == pytest.approx(price, rel=1e-12)


def test_the_price_compounds():
    controller = KLController(1.0, 1.0, 100)
    for _ in range(3):
        controller.update(9.0, 50)
    assert controller.value == pytest.approx(1.1**3)


def test_a_clearly_negative_kl_is_reported(caplog):
    KLController(0.2, 6.0, 100).update(-0.5, 8)
    assert not caplog.records
    KLController(0.2, 6.0, 100).update(-1.5, 8)
    assert "KL to the reference is -1.50 nats" in caplog.text


def test_the_paced_price_by_hand():
    """50 updates of 10 responses: an update is a fifth of the horizon; all may be spent from the 20th on."""
    made, log_price = PacedKLController(2.0, 1.0, 50, 10), math.log(2.0)
    assert made.horizon == 50 and made.ramp == 20
    e = math.log(2)
    steps = [  # KL, change of the logarithm of the price
        (0.0, 0.0),  # nothing has been spent, whatever the price
        (0.05**1.5, 0.0),  # as much as it may
        (2 * 0.1**1.5, 0.2 * e + 0.8 * e),  # twice what it may
        (1.2 * 0.15**1.5, 0.2 * math.log(1.2) + 0.8 * (math.log(1.2) - e)),
        (-0.5, 0.0),  # below zero: not told
        (2 * 0.25**1.5, 0.2 * e + 0.8 * (e - math.log(1.2))),
        (99.0, 0.2 + 0.8 * (1 - e)),  # an error counts up to a factor of e
        (1e-9, -0.2 - 0.8 * 2),
    ]
    for kl, change in steps:
        made.update(kl, 10)
        log_price += change
        assert math.log(made.value) == pytest.approx(log_price, abs=1e-12), kl
    made.updates = 40
    made.update(2.0, 10)
    assert math.log(made.value) == pytest.approx(log_price + 0.2 * e + 0.8 * (e + 1), abs=1e-12)


@pytest.mark.parametrize(
    ("keys", "kind", "horizon"),
    [
        ({"adap_kl_ctrl": False}, FixedKLController, 1),
        ({}, AdaptiveKLController, 10000),
        ({"horizon": 300}, AdaptiveKLController, 300),
        ({"horizon": None, "updates": 60, "batch_size": 8}, PacedKLController, 48),
        ({"horizon": None, "steps": 480, "batch_size": 8}, PacedKLController, 48),
        ({"horizon": None, "updates": 3, "batch_size": 8}, PacedKLController, 24),  # as one of 30
    ],
)
def test_which_law_a_configuration_asks_for(keys, kind, horizon):
    config = PPOConfig(**{"mini_batch_size": keys.get("batch_size", 128)} | keys)
    made = controller_of(config)
    assert type(made) is kind and made.horizon == horizon and made.value == config.init_kl_coef


def test_a_price_of_nothing_cannot_adapt():
    with pytest.raises(ValueError, match=r"^ppo.init_kl_coef is 0, which no factor moves towards ppo.target"):
        PPOConfig(horizon=None, init_kl_coef=0)
    assert PPOConfig(horizon=None, init_kl_coef=0, adap_kl_ctrl=False).init_kl_coef == 0


def made_run(controller, updates: int, lag: float, power: float, seed: int, noise=0.18) -> list[float]:
    """KL of each update of a policy that follows the price late.

    At a price p it comes to rest at TARGET · (RIGHT / p)^power; each update √KL goes 1 / (lag · updates) of
    the way, and no faster than √TARGET in a tenth of the run. The controller sees KL ± `noise`: 128 responses
    tell half a nat to 18 %.
    """
    draw, root, found = random.Random(seed), 0.0, []
    for _ in range(updates):
        found.append(root**2)
        controller.update(found[-1] * (1 + noise * draw.gauss(0, 1)), 128)
        rest = math.sqrt(TARGET) * (RIGHT / controller.value) ** (power / 2)
        most = 10 * math.sqrt(TARGET) / updates
        root += max(-most, min(most, (rest - root) / (lag * updates)))
    return found


def over_target(make, updates: int, **policy) -> dict[str, float]:
    """Mean of `spent` over eight draws of the noise; KL is in targets."""
    runs = [spent(made_run(make(), updates, seed=seed, **policy), TARGET) for seed in range(8)]
    return {
        "mid": sum(run["kl_mid_run"] for run in runs) / TARGET / 8,
        "late": sum(run["kl_over_target"] for run in runs) / 8,
    }


@pytest.mark.parametrize("updates", [30, 50, 100, 500])
@pytest.mark.parametrize("start", [0.2, 1, 5])
@pytest.mark.parametrize("power", [1.0, 1.3, 2.0])
@pytest.mark.parametrize("lag", [0.05, 0.15, 0.3])
def test_half_the_run_reaches_the_target_whatever_the_first_price(updates, start, power, lag):
    """The first price is right, or five times too low or too high."""
    make = lambda: PacedKLController(start * RIGHT, TARGET, updates, 128)  # noqa: E731
    found = over_target(make, updates, lag=lag, power=power)
    assert 0.75 < found["mid"] < 1.25 and 0.75 < found["late"] < 1.25, found


def slow_run(controller) -> list[float]:
    """KL of 60 updates of a policy that at no price spends the target before the 33rd."""
    kl, root = [], 0.0
    for _ in range(60):
        kl.append(root**2)
        controller.update(kl[-1], 128)
        rest = math.sqrt(TARGET) * (RIGHT / controller.value) ** 0.65
        root += max(-0.03, min(0.03, (rest - root) / 4)) * math.sqrt(TARGET)
    return kl


def test_where_no_price_reaches_the_target_it_does_not_run_away():
    bounded, free = (PacedKLController(RIGHT, TARGET, 60, 128) for _ in range(2))
    free.least = 0.0
    stopped, late = slow_run(bounded), slow_run(free)
    assert stopped[:30] == late[:30] and stopped[29] < 0.85 * TARGET, "either is as fast as can be"
    assert max(stopped) < 2.2 * TARGET and max(late) > 1.15 * max(stopped), (max(stopped), max(late))


@pytest.mark.parametrize("start", [0.2, 5])
def test_trls_horizon_does_not_move_a_short_run(start):
    found = over_target(lambda: KLController(start * RIGHT, TARGET, 10000), 50, lag=0.1, power=1.3)
    assert not 0.4 < found["late"] < 2.5, found


def test_the_price_does_not_swing():
    """Once it is there it stays: without noise the last quarter of a run is within a fifth of the target."""
    for lag in (0.05, 0.1, 0.3):
        kl = made_run(PacedKLController(5 * RIGHT, TARGET, 60, 128), 60, lag, 1.3, seed=0, noise=0.0)
        assert max(abs(value / TARGET - 1) for value in kl[45:]) < 0.2, (lag, kl[45:])


def test_what_a_run_spent_by_hand():
    assert spent([0.1 * i for i in range(1, 11)], 1.0) == pytest.approx(
        {"kl_mid_run": 0.55, "kl_over_target": 0.8}
    )
    assert spent([0.3], None) == {"kl_mid_run": 0.3}
    assert spent([0.2, 0.4], 0.4) == pytest.approx({"kl_mid_run": 0.3, "kl_over_target": 1.0})


def test_a_checkpoint_holds_the_controller_and_an_older_one_is_read():
    keys = {"horizon": None, "init_kl_coef": 0.1, "target": 0.5}
    whole, again, older = (trainer(**keys) for _ in range(3))
    for number in range(3):
        whole.step(*batch(seed=number))
        if number == 1:
            state = deepcopy(whole.state_dict())
    again.load_state_dict(state)
    again.step(*batch(seed=2))
    assert (
        again.kl_ctl.value == whole.kl_ctl.value != 0.1
        and again.kl_ctl.error == whole.kl_ctl.error is not None
    )
    older.load_state_dict({k: v for k, v in state.items() if k != "kl_error"})
    assert older.kl_ctl.value == state["kl_coef"] and older.kl_ctl.error is None
    older.step(*batch(seed=2))

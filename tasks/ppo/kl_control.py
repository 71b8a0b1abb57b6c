"""The price of KL, and how it follows the KL that a run spends.

What a rollout shows is the KL of the price of some updates ago: the policy needs them to follow. So a price that
only adds up the error, as that of arXiv 1909.08593 does, is late by that much, and one that adds it up fast
swings. A part in proportion to the error's change answers a KL that is on its way before it has arrived.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from tasks.ppo.config import PPOConfig

ROUNDING_NATS = 1e-3  # a KL this little below zero is noise of float32
RUN_HORIZONS = 12  # horizons in a run whose own length decides: e^12 is the most that its price may move
FEWEST_UPDATES = 30  # a shorter run's price moves no faster than that of one so long: KL follows too late
PROPORTIONAL = 0.6  # of the change of the error, at once; KL follows the price to the power −1 to −2
_log = logging.getLogger(__name__)


class KLController:
    """The price of KL; with a target it adapts (arXiv 1909.08593, section 2.2), without one it is fixed.

    price ← price · (1 + clip(KL / target − 1, −0.2, 0.2) · responses / horizon)

    A negative KL means that the samples are not the policy's, or that chance is being farmed; it never makes
    KL cheaper here.

    Args:
        value: price at the start, score units per nat.
        target: wanted KL per response, nats; None: fixed.
        horizon: responses over which the price may grow or shrink by a fifth.
    """

    def __init__(self, value: float, target: float | None, horizon: float) -> None:
        self.value, self.target, self.horizon = value, target, horizon
        self.error: float | None = None  # of the last rollout, where the next one is compared with it

    def update(self, kl_nats: float, responses: int) -> None:
        """Raise the price when `kl_nats` per response exceeded the target, lower it when it fell short."""
        if kl_nats < -1:
            _log.warning(
                "KL to the reference is %.2f nats: are the responses samples of this policy?", kl_nats
            )
        if self.target is not None and kl_nats > -ROUNDING_NATS:
            self.value *= self._factor(kl_nats, self.target, responses / self.horizon)

    def _factor(self, kl_nats: float, target: float, share: float) -> float:
        """Of the price, after a rollout that is so large a share of the horizon."""
        return 1 + min(max(kl_nats / target - 1, -0.2), 0.2) * share


class AdaptiveKLController(KLController):
    """One with a target, under TRL's name and arguments."""

    def __init__(self, init_kl_coef: float, target: float, horizon: float) -> None:
        super().__init__(init_kl_coef, target, horizon)


class FixedKLController(KLController):
    """One that stays as it is, under TRL's name and argument."""

    def __init__(self, kl_coef: float) -> None:
        super().__init__(kl_coef, None, 1)


class PacedKLController(KLController):
    """One that reaches its target by the middle of a run, however long that is.

    With the error e = clip(ln(KL / target), −1, 1) and e′ that of the rollout before,
    price ← price · exp(e · responses / horizon + 0.6 (e − e′)).

    The same law in its first part (a small error moves ln price by (KL / target − 1) · responses / horizon),
    but an error counts up to a factor of e instead of a fifth. TRL's horizon of 10,000 with its fifth moves the
    price of a run of 6,400 responses by 14 % at most. The horizon here is a twelfth of the run.

    Args:
        value: price at the start, score units per nat; above 0.
        target: wanted KL per response, nats.
        updates: of the whole run.
        responses: of an update.
    """

    def __init__(self, value: float, target: float, updates: int, responses: int) -> None:
        super().__init__(value, target, max(updates, FEWEST_UPDATES) * responses / RUN_HORIZONS)

    def _factor(self, kl_nats: float, target: float, share: float) -> float:
        error = min(max(math.log(max(kl_nats, ROUNDING_NATS * target) / target), -1.0), 1.0)
        before, self.error = error if self.error is None else self.error, error
        return math.exp(error * share + PROPORTIONAL * (error - before))


def controller_of(config: PPOConfig) -> KLController:
    """That of the configuration."""
    price, target = config.init_kl_coef, config.target
    if not config.adap_kl_ctrl:
        return FixedKLController(price)
    if config.horizon is None:
        return PacedKLController(price, target, config.total_ppo_epochs, config.batch_size)
    return AdaptiveKLController(price, target, config.horizon)


def spent(kl_nats: Sequence[float], target: float | None) -> dict[str, float]:
    """What a run's rollouts say of the control, by name. KL of each update, nats per response.

    `kl_mid_run`: mean of the middle fifth of the updates; `kl_over_target`: that of the second half, over the
    target (None: there is none, and no such number). Ten updates of 0.1 … 1.0: 0.55, and 0.8 over the target.
    """
    count = len(kl_nats)
    middle, late = kl_nats[count * 2 // 5 : -(count * 2 // 5) or None], kl_nats[count // 2 :]
    found = {"kl_mid_run": sum(middle) / len(middle)}
    return found | ({} if target is None else {"kl_over_target": sum(late) / len(late) / target})

"""The price of KL, and how it follows the KL that a run spends.

TRL's law is that of arXiv 1909.08593, section 2.2. Its horizon of 10,000 responses suits a run of millions;
in a run of some thousands the price stands still. A law for those has to know three things: a rollout shows
what the price of some updates ago has done, so a price that adds up errors quickly swings; a policy that has
just begun has spent nothing, whatever the price is; and the KL of a hundred responses is known to a fifth.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from tasks.ppo.config import PPOConfig

ROUNDING_NATS = 1e-3  # a KL this little below zero is noise of float32
RUN_HORIZONS = 10  # horizons in a run: its price may move by a factor of e in a tenth of it
FEWEST_UPDATES = 30  # the price of a shorter run moves no faster than in one of these
PROPORTIONAL = 0.8  # of an error's change, at once: as much as a policy that follows in two updates bears
CHEAPEST = 0.1  # of the first price: what cannot be spent now is not spent sooner by a lower one
RAMP = 0.4  # share of the run in which what may be spent grows to the target
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
        self.updates = 0  # rollouts that were told
        self.error: float | None = None  # of the last of them, where the next one is compared with it

    def update(self, kl_nats: float, responses: int) -> None:
        """Raise the price when `kl_nats` per response exceeded the target, lower it when it fell short."""
        if kl_nats < -1:
            _log.warning(
                "KL to the reference is %.2f nats: are the responses samples of this policy?", kl_nats
            )
        if self.target is not None and kl_nats > -ROUNDING_NATS:
            self.value *= self._factor(kl_nats, responses / self.horizon)
        self.updates += 1

    def _factor(self, kl_nats: float, share: float) -> float:
        """What the price is multiplied by, after a rollout that is so large a share of the horizon."""
        return 1 + min(max(kl_nats / self.target - 1, -0.2), 0.2) * share


class AdaptiveKLController(KLController):
    """One with a target, under TRL's name and arguments."""

    def __init__(self, init_kl_coef: float, target: float, horizon: float) -> None:
        super().__init__(init_kl_coef, target, horizon)


class FixedKLController(KLController):
    """One that stays as it is, under TRL's name and argument."""

    def __init__(self, kl_coef: float) -> None:
        super().__init__(kl_coef, None, 1)


class PacedKLController(KLController):
    """One whose target is reached by the middle of a run, however long that is.

    In the first two fifths of the run what may be spent grows with the number of updates to the power 3/2, up
    to the target: it is √KL that moves by steps. With the error e = clip(ln(KL / what may be spent), −1, 1),
    and e′ that of the rollout before,

    price ← price · exp(e · responses / horizon + 0.8 (e − e′))

    The horizon is a tenth of the run. The first part is Ziegler's law, to first order; but an error counts up
    to a factor of e, where TRL counts a fifth. The second part answers a KL that is on its way. Together: a
    controller of proportional and integral parts over logarithms, in incremental form. Below a tenth of the
    first price nothing is added up: where learning is too slow to spend the target, no price helps.

    Args:
        value: price at the start, score units per nat; above 0.
        target: wanted KL per response, nats.
        updates: rollouts of the whole run.
        responses: of a rollout.
    """

    def __init__(self, value: float, target: float, updates: int, responses: int) -> None:
        super().__init__(value, target, max(updates, FEWEST_UPDATES) * responses / RUN_HORIZONS)
        self.ramp = RAMP * updates  # rollouts
        self.least = CHEAPEST * value  # below it the error is not added up

    def _factor(self, kl_nats: float, share: float) -> float:
        allowed = self.target * min(1.0, self.updates / self.ramp) ** 1.5
        if not allowed:  # the first rollout is the reference's own
            return 1.0
        error = math.log(max(kl_nats, ROUNDING_NATS * self.target) / allowed)
        error = min(max(error, -1.0), 1.0)
        change, self.error = 0.0 if self.error is None else error - self.error, error
        if error < 0 and self.value <= self.least:
            share = 0.0
        return math.exp(error * share + PROPORTIONAL * change)


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

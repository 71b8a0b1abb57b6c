"""What must hold in the first step of a training, looked at in numbers that the step has made anyway.

Before any update the policy that learns is the one that sampled, so that every ratio is 1; and where the
reference has the policy's weights, their KL is 0. A step that finds something else says so and goes on:
:mod:`tasks.ppo.preflight` looks for more, and stops.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from typing import TYPE_CHECKING

import torch
from torch import nn

from tasks.ppo.rollout import Rollout
from tasks.ppo.rounding import distance, rounding_of
from tasks.ppo.statistics import Passes

if TYPE_CHECKING:
    from tasks.ppo.trainer import PPOTrainer

_log = logging.getLogger(__name__)


def begins_as_reference(trainer: PPOTrainer) -> bool:
    """Whether the reference says what the policy says now, as far as weights tell; False: they may differ."""
    if trainer.ref_model is None:
        return True
    policy, reference = (getattr(m, "pretrained_model", m) for m in (trainer.model, trainer.ref_model))
    return same_weights(policy, reference)


def same_weights(model: nn.Module, other: nn.Module) -> bool:
    """Whether two models have equal parameters by equal names."""
    own, others = dict(model.named_parameters()), dict(other.named_parameters())
    return own.keys() == others.keys() and all(
        weight is others[name] or torch.equal(weight, others[name]) for name, weight in own.items()
    )


def warn_of_start(trainer: PPOTrainer, seen: Rollout, passes: Passes, is_reference: bool) -> None:
    """One line in the log where ratio or KL are not what they must be before anything has moved.

    Args:
        trainer: in its first step.
        seen: the rollout.
        passes: of the step; its first ratios are those before the first optimizer step.
        is_reference: as :func:`begins_as_reference` said before the step.
    """
    if found := list(_findings(trainer, seen, passes, is_reference)):
        _log.warning("ppo: the first step: %s", "; ".join(found))


def _findings(trainer: PPOTrainer, seen: Rollout, passes: Passes, is_reference: bool) -> Iterator[str]:
    allowed = rounding_of(trainer, autocast=True).nats
    if passes.ratios and passes.ratios[0].numel():
        far = passes.ratios[0].double().log().square().mean().sqrt().item()
        if not far <= allowed:
            yield (
                f"the ratio of the first minibatch is not 1: log-probabilities differ by {far:.2g} nats "
                f"({allowed:g} is rounding); the model says something else with a gradient than without"
            )
    far = distance(seen.logprobs, seen.ref_logprobs, seen.is_action)
    if is_reference and seen.is_action.any() and not far <= allowed:
        yield (
            f"KL to the reference is not 0: log-probabilities differ by {far:.2g} nats ({allowed:g} is "
            "rounding), although it has the policy's weights or was made from them"
        )

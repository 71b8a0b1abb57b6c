"""How far apart two readings of the same log-probabilities may be, and how far they are."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from tasks.ppo.trainer import PPOTrainer


@dataclass(frozen=True, slots=True)
class Rounding:
    """How far apart two readings of the same numbers may be."""

    nats: float  # log-probabilities, root of the mean square
    cumulative: float  # probability of a token and of those before it in the vocabulary
    agreement: float  # share of the sampled tokens that the same random numbers choose again


FULL, HALF = Rounding(1e-3, 1e-4, 0.99), Rounding(0.1, 0.02, 0.90)
TF32 = Rounding(0.02, 3e-3, 0.97)  # factors keep three bits more than bfloat16's


def distance(found: Tensor, wanted: Tensor, mask: Tensor) -> float:
    """Root of the mean square over the tokens; nan where one is."""
    return (found - wanted)[mask].double().square().mean().sqrt().item()


def rounding_of(trainer: PPOTrainer, autocast: bool = False) -> Rounding:
    """Of this trainer's forwards, with its autocast or without."""
    if autocast and trainer.config.dtype != "float32":
        return HALF
    if any(p.element_size() < 4 for p in trainer.model.parameters()):
        return HALF
    # the one name of the switch that never raises; the older ones do once this one was set
    is_exact = torch.backends.cuda.matmul.fp32_precision in ("none", "ieee")
    return FULL if is_exact or trainer.device.type != "cuda" else TF32

"""Proximal policy optimisation: rollout, rewards, advantages, losses, trainer; read in this order."""

from tasks.ppo.config import PPOConfig
from tasks.ppo.kl_control import AdaptiveKLController, FixedKLController
from tasks.ppo.lengths import LengthSampler
from tasks.ppo.stage import run
from tasks.ppo.trainer import PPOTrainer
from tasks.run.devices import seed_everything as set_seed

__all__ = [
    "AdaptiveKLController",
    "FixedKLController",
    "LengthSampler",
    "PPOConfig",
    "PPOTrainer",
    "run",
    "set_seed",
]

"""Proximal policy optimisation: rollout, rewards, advantages, losses, trainer; read in this order."""

from params.schema import PPOConfig
from tasks.ppo.lengths import LengthSampler
from tasks.ppo.stage import run
from tasks.ppo.trainer import PPOTrainer

__all__ = ["LengthSampler", "PPOConfig", "PPOTrainer", "run"]

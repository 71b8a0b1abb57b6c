"""Proximal policy optimisation: rollout, rewards, advantages, losses, trainer; read in this order."""

from params.schema import PPOConfig
from tasks.ppo.stage import run
from tasks.ppo.trainer import PPOTrainer

__all__ = ["PPOConfig", "PPOTrainer", "run"]

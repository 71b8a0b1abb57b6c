"""Grouped answers -> reward model."""

from tasks.reward.stage import run
from tasks.reward.trainer import GroupedAnswers, RewardConfig, RewardTrainer, collate, pair_loss

__all__ = ["GroupedAnswers", "RewardConfig", "RewardTrainer", "collate", "pair_loss", "run"]

"""Grouped answers -> reward model."""

from tasks.reward.config import RewardConfig
from tasks.reward.losses import pair_loss
from tasks.reward.records import NOTHING, GroupedAnswers, collate
from tasks.reward.stage import run
from tasks.reward.trainer import RewardTrainer

__all__ = ["NOTHING", "GroupedAnswers", "RewardConfig", "RewardTrainer", "collate", "pair_loss", "run"]

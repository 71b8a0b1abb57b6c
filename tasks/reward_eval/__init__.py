"""Report card of the reward model on held-out questions, and the gate before ppo."""

from tasks.reward_eval.stage import run

__all__ = ["run"]

"""Policy against SFT on the same held-out prompts and the same random numbers."""

from tasks.policy_eval.stage import run

__all__ = ["run"]

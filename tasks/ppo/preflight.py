"""Tried before compute is spent."""

from __future__ import annotations


def preflight(trainer, prompts, reward_fn) -> None:
    """Stops what could not learn."""

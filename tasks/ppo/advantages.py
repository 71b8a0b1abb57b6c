"""Generalised advantage estimation."""

from __future__ import annotations

import torch
from torch import Tensor


def gae(
    rewards: Tensor, values: Tensor, is_action: Tensor, gamma: float, lam: float
) -> tuple[Tensor, Tensor]:
    """Advantages and returns (arXiv 1506.02438, eq. 16). All [B, R] -> [B, R] each; 0 outside `is_action`.

    Tokens outside the mask do not exist: the recursion goes over them without decay, and their rewards do not
    count.
    """
    advantages = torch.zeros_like(rewards)
    carried = next_value = torch.zeros_like(rewards[:, 0])
    for t in reversed(range(rewards.shape[1])):
        here = is_action[:, t]
        delta = rewards[:, t] + gamma * next_value - values[:, t]
        carried = torch.where(here, delta + gamma * lam * carried, carried)
        next_value = torch.where(here, values[:, t], next_value)
        advantages[:, t] = carried * here
    return advantages, (advantages + values) * is_action

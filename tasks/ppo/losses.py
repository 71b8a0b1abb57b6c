"""The clipped objective of PPO and the clipped value loss, token by token.

Sums and means are the caller's, so that any split adds up to the whole.
"""

from __future__ import annotations

import torch
from torch import Tensor

LARGEST_LOG_RATIO = 60.0  # e⁶⁰ is finite in float32, and so are its products with advantages


def ratio_of(logprobs: Tensor, old_logprobs: Tensor, is_action: Tensor) -> Tensor:
    """Probability now over probability then; 1 outside the mask; finite, however far the policy went.

    [B, R] each -> [B, R].
    """
    log_ratio = (logprobs - old_logprobs).masked_fill(~is_action, 0)
    return log_ratio.clamp(max=LARGEST_LOG_RATIO).exp()


def policy_loss(ratio: Tensor, advantages: Tensor, cliprange: float) -> tuple[Tensor, Tensor]:
    """The clipped surrogate (arXiv 1707.06347, eq. 7), negated. All [B, R].

    Returns:
        The loss of each token; whether its clipped branch is the larger loss.
    """
    free, clipped = -advantages * ratio, -advantages * ratio.clamp(1 - cliprange, 1 + cliprange)
    return torch.maximum(free, clipped), clipped > free


def value_loss(
    values: Tensor, old_values: Tensor, returns: Tensor, cliprange: float
) -> tuple[Tensor, Tensor]:
    """Half the squared error, values clipped around the old ones, the larger of both. All [B, R].

    Returns:
        The loss of each token; whether its clipped branch is the larger loss.
    """
    clipped = values.clamp(old_values - cliprange, old_values + cliprange)
    free, bound = (values - returns) ** 2, (clipped - returns) ** 2
    return 0.5 * torch.maximum(free, bound), bound > free

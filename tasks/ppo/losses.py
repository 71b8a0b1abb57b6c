"""The clipped objective of PPO and the clipped value loss.

Sums over tokens, so that any split adds up to the whole.
"""

from __future__ import annotations

import torch
from torch import Tensor


def policy_loss(
    logprobs: Tensor, old_logprobs: Tensor, advantages: Tensor, is_response: Tensor, cliprange: float
) -> tuple[Tensor, Tensor, Tensor]:
    """The clipped surrogate (arXiv 1707.06347, eq. 7), negated. All [B, R] -> sums over the response tokens.

    Returns:
        The loss; the tokens whose clipped branch is the larger loss; the KL of the old policy to the new,
        nats (k3 estimate: `ratio − 1 − log ratio`, never negative).
    """
    log_ratio = (logprobs - old_logprobs) * is_response
    ratio = log_ratio.exp()
    free, clipped = -advantages * ratio, -advantages * ratio.clamp(1 - cliprange, 1 + cliprange)
    loss = (torch.maximum(free, clipped) * is_response).sum()
    kl = ((ratio - 1 - log_ratio) * is_response).sum()
    return loss, ((clipped > free) & is_response).sum(), kl.detach()


def value_loss(
    values: Tensor, old_values: Tensor, returns: Tensor, is_response: Tensor, cliprange: float
) -> Tensor:
    """Half the squared error, values clipped around the old ones, the larger of both. All [B, R] -> sum."""
    clipped = old_values + (values - old_values).clamp(-cliprange, cliprange)
    error = torch.maximum((values - returns) ** 2, (clipped - returns) ** 2)
    return 0.5 * (error * is_response).sum()

"""From one score per response to one reward per token; the price of KL and how it adapts."""

from __future__ import annotations

from torch import Tensor


def token_rewards(
    scores: Tensor, logprobs: Tensor, ref_logprobs: Tensor, is_response: Tensor, kl_coef: float
) -> Tensor:
    """Price every token by its KL, then pay the score on the last one (arXiv 1909.08593, eq. 2).

    scores [B], others [B, R] -> [B, R]; each response has at least one token, real tokens are a prefix.
    """
    kl = (logprobs - ref_logprobs) * is_response  # k1 estimate, nats: unbiased, may be negative per token
    last = is_response.sum(1, keepdim=True) - 1  # [B, 1]
    return (-kl_coef * kl).scatter_add(1, last, scores[:, None])


class KLController:
    """The price of KL; with a target it adapts (arXiv 1909.08593, section 2.2), without one it is fixed.

    Args:
        value: price at the start, score units per nat.
        target: wanted KL per response, nats; None: fixed.
        horizon: responses over which the price may grow or shrink by a fifth.
    """

    def __init__(self, value: float, target: float | None, horizon: int) -> None:
        self.value, self.target, self.horizon = value, target, horizon

    def update(self, kl_nats: float, responses: int) -> None:
        """Raise the price when `kl_nats` per response exceeded the target, lower it when it fell short."""
        if self.target is not None:
            error = min(max(kl_nats / self.target - 1, -0.2), 0.2)
            self.value *= 1 + error * responses / self.horizon

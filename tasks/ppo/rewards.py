"""From one score per response to one reward per token."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor


def kl_estimate(log_ratio: Tensor, kind: str) -> Tensor:
    """Estimate KL(policy ‖ reference) from one sampled token. [B, R] -> [B, R] nats.

    Args:
        log_ratio: log policy − log reference of the token that was sampled.
        kind: TRL's names. `kl`: the log ratio itself (k1; unbiased, may be negative); `abs`: its size; `mse`:
            half its square (k2); `k3`: ratio⁻¹ − 1 + log ratio (unbiased, never negative; Schulman 2020).
    """
    match kind:
        case "kl":
            return log_ratio
        case "abs":
            return log_ratio.abs()
        case "mse":
            return 0.5 * log_ratio.square()
        case "k3":
            return torch.expm1(-log_ratio) + log_ratio
    raise ValueError(f"kl_penalty: {kind} is no estimate from one token")


def token_rewards(scores: Tensor | list[Tensor], kl: Tensor, is_action: Tensor, kl_coef: float) -> Tensor:
    """Price every token by its KL and pay the score on the last one (arXiv 1909.08593, eq. 2). -> [B, R].

    Args:
        scores: [B]; or B tensors of a reward for each token of the response (dense rewards).
        kl: [B, R] nats.
        is_action: [B, R]; a response without an action is paid nothing.
        kl_coef: score units per nat.
    """
    rewards = -kl_coef * kl * is_action
    if isinstance(scores, list):
        for row, dense in enumerate(scores):
            rewards[row, : len(dense)] += dense.to(rewards)
        return rewards * is_action
    columns = torch.arange(is_action.shape[1], device=kl.device)
    last = (columns * is_action).amax(1, keepdim=True)
    return rewards.scatter_add(1, last, scores[:, None].to(rewards)) * is_action


class RunningMoments:
    """Mean and standard deviation of all scores so far (Chan et al. 1979), over all processes.

    Args:
        total: sums a tensor over the processes.
    """

    def __init__(self, total: Callable[[Tensor], Tensor] = lambda x: x) -> None:
        self.count, self.mean, self.squares = 0.0, 0.0, 0.0  # squares: of the distances from the mean
        self._total = total

    @property
    def std(self) -> float:
        """Unbiased; 1 while there is no spread to divide by."""
        variance = self.squares / max(self.count - 1, 1)
        return math.sqrt(variance) if variance > 0 else 1.0

    def update(self, scores: Tensor) -> None:
        """Take in some scores, [B]."""
        scores = scores.double()
        count, summed = self._total(torch.stack([scores.new_tensor(len(scores)), scores.sum()])).tolist()
        mean = summed / count
        squares = self._total((scores - mean).square().sum()).item()
        away, whole = mean - self.mean, self.count + count
        self.squares += squares + away**2 * self.count * count / whole
        self.mean += away * count / whole
        self.count = whole

    def state_dict(self) -> dict[str, float]:
        """Three numbers."""
        return {"count": self.count, "mean": self.mean, "squares": self.squares}

    def load_state_dict(self, state: dict[str, float]) -> None:
        """The inverse of :meth:`state_dict`."""
        self.count, self.mean, self.squares = state["count"], state["mean"], state["squares"]

"""What a step reports, under TRL 0.11's names, and where ours are better defined, under names of our own.

A statistic of the passes is a mean over optimizer steps, each a mean over its tokens; a statistic of the
rollout is a mean over responses or over all tokens; all of them are over all processes.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from numpy import ndarray
from torch import Tensor

from tasks.lm.numerics.masked import masked_mean, masked_sum, masked_var
from tasks.ppo.rollout import Rollout

OF_TOKENS = (  # summed over the tokens of an optimizer step
    "loss/policy", "loss/value", "policy/clipfrac", "val/clipfrac", "policy/approxkl", "policy/policykl",
    "policy/entropy", "policy/advantages_mean", "val/vpred", "val/error", "ratio", "loss/kl",
)  # fmt: skip


def token_sums(each: dict[str, Tensor], is_action: Tensor) -> Tensor:
    """Sums over the actions of some rows, in the order of OF_TOKENS. -> float64."""
    return torch.stack([masked_sum(each[name].detach().double(), is_action) for name in OF_TOKENS])


@dataclass(slots=True)
class Passes:
    """The optimizer steps of one update, one row each."""

    vf_coef: float
    rows: list[dict[str, float]] = field(default_factory=list)
    ratios: list[Tensor] = field(default_factory=list)
    advantages: list[Tensor] = field(default_factory=list)

    def add(self, means: dict[str, float], norm: float, moments: dict[str, float]) -> None:
        """One step: means over its tokens, its gradient's norm, moments of its returns and old values."""
        total = means["loss/policy"] + means["loss/kl"] + self.vf_coef * means["loss/value"]
        self.rows.append(means | moments | {"loss/total": total, "grad_norm": norm})

    def statistics(self) -> dict[str, object]:
        """Means over the steps; ratios and advantages of every token [N]."""
        if not self.rows:
            return {}
        found: dict[str, object] = {
            f"ppo/{name}": sum(row[name] for row in self.rows) / len(self.rows) for name in self.rows[0]
        }
        variance = max(found["ppo/returns/var"], 1e-8)
        return found | {
            "ppo/val/var_explained": 1 - found["ppo/val/error"] / variance,
            "ppo/policy/ratio": _flat(self.ratios),
            "ppo/policy/advantages": _flat(self.advantages),
        }


def _flat(parts: list[Tensor]) -> ndarray:
    """Of this process's tokens, of which the steps that were taken may hold none."""
    return torch.cat([part.float().cpu() for part in parts] or [torch.empty(0)]).numpy()


def moments_of(returns: Tensor, old_values: Tensor, mask: Tensor, total) -> dict[str, float]:
    """Mean and unbiased variance of returns and old values of one optimizer step."""
    return {
        "returns/mean": masked_mean(returns, mask, total).item(),
        "returns/var": masked_var(returns, mask, total).item(),
        "val/mean": masked_mean(old_values, mask, total).item(),
        "val/var": masked_var(old_values, mask, total).item(),
    }


def rollout_statistics(
    seen: Rollout, scores: Tensor, kl_coef: float, queries: list[list[int]], total: Callable[[Tensor], Tensor]
) -> dict[str, object]:
    """Of the responses as they were sampled.

    Args:
        seen: the rollout.
        scores: [B], as they were paid.
        kl_coef: the price they were paid at.
        queries: B prompts.
        total: sums over processes.
    """
    each = torch.ones_like(scores, dtype=torch.bool)
    of_rows = lambda x: (masked_mean(x, each, total).item(), masked_var(x, each, total).sqrt().item())  # noqa: E731
    asked = torch.tensor([float(len(q)) for q in queries], device=scores.device)
    said = seen.sequences.is_response.sum(1).float()
    kl, mask = seen.kl_nats(), seen.is_action
    surprise = -(seen.logprobs * mask).sum(1)
    log_ratio = seen.logprobs - seen.ref_logprobs
    (score, spread), (query, of_query), (response, of_response) = map(of_rows, (scores, asked, said))
    return {
        "objective/kl": of_rows(kl)[0],
        "objective/kl_dist": kl.cpu().numpy(),
        "objective/logprobs": seen.logprobs.cpu().numpy(),
        "objective/ref_logprobs": seen.ref_logprobs.cpu().numpy(),
        "objective/kl_coef": kl_coef,
        "objective/entropy": of_rows(surprise)[0],
        "ppo/mean_non_score_reward": masked_mean(-kl_coef * seen.kl, mask, total).item(),
        "ppo/mean_scores": score,
        "ppo/std_scores": spread,
        "tokens/queries_len_mean": query,
        "tokens/queries_len_std": of_query,
        "tokens/queries_dist": asked.cpu().numpy(),
        "tokens/responses_len_mean": response,
        "tokens/responses_len_std": of_response,
        "tokens/responses_dist": said.cpu().numpy(),
        "rollout/kl_nats": of_rows((log_ratio * mask).sum(1))[0],  # k1, whatever is priced
        "rollout/token_entropy_nats": masked_mean(seen.entropy, mask, total).item(),
        "rollout/trunk_megabytes": 0.0 if seen.trunk is None else seen.trunk.nbytes / 2**20,
        "rollout/rows_of_negative_kl": of_rows((kl < 0).float())[0],
    }

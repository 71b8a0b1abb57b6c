"""Looks at held-out prompts: score and KL of the policy, and whether a rising score is a better policy."""

from __future__ import annotations

import logging
import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from tasks.lm.sampling.generation import row_seeds
from tasks.ppo.batch import check_batch
from tasks.ppo.reward_functions import RewardFunction, scores_of
from tasks.run.curve import Curve
from tasks.run.devices import derive_seed
from tasks.run.monitor import Look, Thresholds, findings_of

if TYPE_CHECKING:
    from tasks.ppo.trainer import PPOTrainer

HELD_OUT = (  # columns of curve.csv
    "held_out_score",  # as it is paid: less the baseline, scaled, clipped, less the penalty of a missing eos
    "held_out_kl_nats",
    *(
        f"held_out_{name}"
        for name in "proxy tokens eos_rate repetition_3 code_fence_rate entropy_nats distinct_2".split()
    ),
)
OF_JUDGE = ("held_out_judge", "held_out_agreement")  # where there is a judge
_log = logging.getLogger(__name__)


class Looks:
    """What a run has seen of its held-out prompts, always with the same random numbers.

    Args:
        trainer: samples and observes; nothing of it changes.
        reward_fn: of token ids; what PPO raises.
        judge: of token ids, what PPO never sees; None: there is none.
        held: P prompts.
        decode_rows: most rows sampled side by side.
    """

    def __init__(
        self,
        trainer: PPOTrainer,
        reward_fn: RewardFunction,
        judge: RewardFunction | None,
        held: Sequence[Sequence[int]],
        decode_rows: int,
    ) -> None:
        self.trainer, self.reward_fn, self.judge, self.decode_rows = trainer, reward_fn, judge, decode_rows
        config, monitor = trainer.config, trainer.config.thresholds
        self.limits = Thresholds.of(
            monitor.model_dump(),
            target=config.target,
            response_tokens=config.response_tokens,
            kl_budget_nats=config.kl_budget_nats if config.select == "best" else None,
        )
        self.each = math.ceil(monitor.responses / len(held))
        self.prompts = [list(prompt) for prompt in held for _ in range(self.each)]
        self.start: Look | None = None  # SFT: before the first update
        self.best: Look | None = None  # the one that the judge liked best so far
        self.findings: dict[int, dict[str, str]] = {}  # by update

    def begin(self) -> None:
        """The look that all later ones are compared with, once."""
        if self.start is None:
            self.start, _ = self._take()
            self.best = self.start

    def take(self, number: int) -> tuple[float, dict[str, float]]:
        """A look after update `number`: the score as it is paid, and every measure by its name.

        A finding is a warning in the log.
        """
        look, paid = self._take()
        found = self.findings[number] = findings_of(self.start, look, self.limits, self.best)
        if self.best.judge is not None and look.judge.mean() > self.best.judge.mean():
            self.best = look
        if found and self.trainer.accelerator.is_main_process:
            score = look.proxy.mean() - self.start.proxy.mean()
            _log.warning(
                "ppo: update %d: the score rose by %.2f, but %s", number, score,
                "; ".join(found.values()),
            )  # fmt: skip
        return paid, look.means()

    def means(self, curve: Curve) -> list[dict[str, float]]:
        """What every look of a run measured, by name: SFT's first, then those that the curve holds."""
        width = len("held_out_")
        later = [row for row in curve.rows if "held_out_score" in row]
        found = [{k[width:]: v for k, v in row.items() if k.startswith("held_out_")} for row in later]
        return [self.start.means(), *found]

    def _take(self) -> tuple[Look, float]:
        trainer, prompts = self.trainer, self.prompts
        seeds = row_seeds(derive_seed(trainer.seed, "ppo", "held_out"), len(prompts))
        responses = trainer.sample(prompts, seeds, self.decode_rows).lists()
        scores = scores_of(self.reward_fn, prompts, responses)
        batch = check_batch(
            prompts, responses, scores, None, len(prompts), trainer.vocabulary(), trainer.room()
        )
        seen = trainer.observe(prompts, responses)
        entropy = (seen.entropy * seen.is_action).sum(1) / seen.is_action.sum(1).clamp(min=1)
        look = Look.of(
            responses,
            _texts(trainer.tokenizer, responses),
            trainer.ends,
            self.each,
            proxy=_sums(scores).tolist(),
            kl_nats=seen.kl_nats().tolist(),
            entropy_nats=entropy.tolist(),
            judge=self.judge and _sums(scores_of(self.judge, prompts, responses)).tolist(),
        )
        return look, _sums(trainer.shape(batch, learn=False)).mean().item()

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint must hold."""
        looks = {name: getattr(self, name) for name in ("start", "best")}
        return {name: look and look.state_dict() for name, look in looks.items()} | {
            "findings": {number: dict(found) for number, found in self.findings.items()}
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """The inverse of :meth:`state_dict`."""
        self.start, self.best = (state[name] and Look.from_state(state[name]) for name in ("start", "best"))
        self.findings = dict(state["findings"])


def _sums(scores: Tensor | Sequence[Tensor]) -> Tensor:
    """One number per response, of scores or of rewards per token."""
    return scores if isinstance(scores, Tensor) else torch.stack([score.sum() for score in scores])


def _texts(tokenizer: Any, responses: Sequence[Sequence[int]]) -> list[str]:
    """Texts, where there is more of a tokenizer than its special tokens."""
    if not hasattr(tokenizer, "batch_decode"):
        return [""] * len(responses)
    return tokenizer.batch_decode(responses, skip_special_tokens=True)

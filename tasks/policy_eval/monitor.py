"""The monitor's part of the card: the judge's score and the rules of ppo's looks, on many more prompts."""

from __future__ import annotations

import logging
from collections.abc import Sequence

import numpy as np
import torch

from params.schema import Params, PPOParams
from tasks.lm.attention.padding import lay_out
from tasks.lm.heads.reward_model import scale_of
from tasks.lm.logprobs.responses import read_responses
from tasks.lm.logprobs.roads import take_road
from tasks.lm.model.ends import ends_of
from tasks.policy_eval.answers import JUDGE, MODEL, Answers
from tasks.run.layout import Layout
from tasks.run.monitor import Look, Thresholds, findings_of, gain

SCORES = ("proxy", "judge")
_log = logging.getLogger(__name__)


def scales_of(layout: Layout) -> dict[str, tuple[float, float]]:
    """`proxy` and `judge`: mean and standard deviation of each one's validation scores.

    Raises:
        ValueError: there is no scores.json.
    """
    return {
        name: scale_of(layout.artifact("reward", out), f"policy_eval: {name}")
        for name, out in zip(SCORES, (MODEL, JUDGE), strict=True)
    }


def monitored(
    params: Params,
    scales: dict[str, tuple[float, float]],
    policies: Sequence,
    tokenizer,
    rows: Sequence[dict],
    sampled: Sequence[Answers],
    kl_nats: np.ndarray,
) -> dict[str, dict]:
    """Both policies' sampled answers before the rules: what :func:`watch` says.

    Args:
        params: of the run.
        scales: what :func:`scales_of` says.
        policies: SFT's and PPO's.
        tokenizer: theirs.
        rows: N prompts.
        sampled: their answers, K to each prompt.
        kl_nats: of PPO's answers, [N·K].
    """
    ends = ends_of(policies[0], tokenizer)
    microbatch, looks = params.machine.microbatch_rows, []
    for policy, answers, kl in zip(policies, sampled, (np.zeros_like(kl_nats), kl_nats), strict=True):
        flat = [(row["prompt"], r) for row, own in zip(rows, answers.tokens, strict=True) for r in own]
        entropy = entropies(policy, flat, tokenizer.pad_token_id, params.ppo.temperature, microbatch)
        looks.append(
            look_at(answers, answers.judged.ravel(), ends, scales=scales, kl_nats=kl, entropy_nats=entropy)
        )
    return watch(*looks, params.ppo)


@torch.no_grad()
def entropies(
    model, flat: Sequence[tuple[list[int], list[int]]], pad_id: int, temperature: float, microbatch: int
) -> np.ndarray:
    """Entropy of a causal model, nats, mean over the tokens of each (prompt, response). -> [N·K]."""
    take_road(model)
    found = []
    for first in range(0, len(flat), microbatch):
        sequences = lay_out(*zip(*flat[first : first + microbatch], strict=True), pad_id, model.device)
        _, entropy, _ = read_responses(model, sequences, temperature)
        found.append((entropy.sum(1) / sequences.is_response.sum(1)).cpu())
    return torch.cat(found).double().numpy()


def look_at(
    answers: Answers,
    judged: np.ndarray,
    eos_id: int | Sequence[int],
    *,
    scales: dict[str, tuple[float, float]],
    kl_nats: np.ndarray,
    entropy_nats: np.ndarray,
) -> Look:
    """One model's sampled responses as the monitor sees them.

    Args:
        answers: N prompts, K responses each.
        judged: the judge's scores of them, [N·K].
        eos_id: the end; of several each is one.
        scales: what :func:`scales_of` says.
        kl_nats: [N·K].
        entropy_nats: [N·K].
    """
    raw = dict(zip(SCORES, (answers.scores.ravel(), judged), strict=True))
    scores = {name: (raw[name] - mean) / std for name, (mean, std) in scales.items()}
    tokens, texts = ([r for row in each for r in row] for each in (answers.tokens, answers.texts))
    each = answers.scores.shape[1]
    return Look.of(tokens, texts, eos_id, each, kl_nats=kl_nats, entropy_nats=entropy_nats, **scores)


def watch(before: Look, after: Look, params: PPOParams) -> dict[str, dict]:
    """What card.json says: measures of both, gains of both scores with standard errors, findings in words."""
    limits = Thresholds.of(
        params.monitor.model_dump(),
        target=params.target,
        response_tokens=params.response_tokens,
        kl_budget_nats=params.kl_budget_nats if params.select == "best" else None,
    )
    found = findings_of(before, after, limits)
    gains = {name: gain(getattr(before, name), getattr(after, name)) for name in SCORES}
    if found:
        rise = gains["proxy"][0]
        _log.warning("policy_eval: the score rose by %.2f, but %s", rise, "; ".join(found.values()))
    return {
        "measures": {"sft": before.means(), "ppo": after.means()},
        "gains": {k: {"gain": mean, "standard_error": error} for k, (mean, error) in gains.items()},
        "findings": found,
    }


def render_monitor(found: dict[str, dict]) -> str:
    """The part of samples.md."""
    before, after = (found["measures"][name] for name in ("sft", "ppo"))
    lines = ["## monitor", "", "| sampled | SFT | PPO |", "|---|---|---|"]
    lines += [f"| {k.replace('_', ' ')} | {v:.4g} | {after[k]:.4g} |" for k, v in before.items()]
    gains = (
        f"{name} {each['gain']:+.3f} ± {each['standard_error']:.3f}" for name, each in found["gains"].items()
    )
    said = [f"- **{name}**: {text}" for name, text in found["findings"].items()] or ["Nothing found."]
    return "\n".join([*lines, "", f"Gain and standard error: {', '.join(gains)}.", "", *said])

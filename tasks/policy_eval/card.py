"""SFT and PPO with the same random numbers, in one way to answer; and the numbers for metrics.json."""

from __future__ import annotations

from collections.abc import Collection, Sequence

import numpy as np

from tasks.policy_eval.answers import Answers
from tasks.policy_eval.frontier import MEASURES
from tasks.policy_eval.parts import Part
from tasks.run.monitor.text import distinct, has_ended, repetition

DESCRIBED = ("response_tokens", "eos_rate", "distinct_2", "repetition_3")  # that metrics.json has


def describe(answers: Answers, eos_id: int | Collection[int]) -> dict[str, float]:
    """Score, length, eos rate, distinct-n and repetition of one model's responses."""
    flat = [r for row in answers.tokens for r in row]
    return {
        "score": float(answers.scores.mean()),
        "response_tokens": float(np.mean([len(r) for r in flat])),
        "eos_rate": float(np.mean([has_ended(r, eos_id) for r in flat])),
        "distinct_1": distinct(flat, 1),
        "distinct_2": distinct(flat, 2),
        "repetition_3": float(np.mean([repetition(r) for r in flat])),
    }


def paired(before: np.ndarray, after: np.ndarray, part: Part) -> dict[str, object]:
    """Means of both, their difference and its 95 % interval by cluster. [N, K], [N, K]."""
    before, after = before.astype(float).mean(1), after.astype(float).mean(1)
    return {
        "sft": float(before[part.chosen].mean()),
        "ppo": float(after[part.chosen].mean()),
        **part.gain(before, after),
    }


def win_rate(before: np.ndarray, after: np.ndarray, part: Part) -> dict[str, object]:
    """Share of samples whose score PPO raised, ties half, with its interval. Scores [N, K], [N, K]."""
    found = part.mean(((after > before) + 0.5 * (after == before)).mean(1))
    return {"win_rate": found["mean"], "interval": found["interval"]}


def correctness(before: Answers, after: Answers, rows: Sequence[dict], part: Part) -> dict[str, dict] | None:
    """Checked correctness of all prompts and by kind; None where no prompt has an expected answer."""
    known = np.array([row["expected"] is not None for row in rows])
    if not known.any():
        return None
    expected, kinds = [row["expected"] for row in rows], np.array([row["kind"] or "" for row in rows])
    right = before.right(expected), after.right(expected)
    found = {"all": known} | {kind: known & (kinds == kind) for kind in sorted(set(kinds[known]))}
    own = {name: part.some(mask) for name, mask in found.items()}
    return {name: paired(*right, each) | {"prompts": len(each.chosen)} for name, each in own.items()}


def summary(card: dict) -> dict[str, float]:
    """The numbers for metrics.json; what cannot be told is left out."""
    sampled = card["sampled"]
    low, high = sampled["interval"] or (None, None)
    found = {"prompts": card["prompts"], "kl_nats": card["kl_nats"]}
    found |= {"win_rate": sampled["win_rate"], "win_rate_low": low, "win_rate_high": high}
    for way in ("greedy", "sampled"):
        right = (card[way]["correct"] or {}).get("all")
        for name, pair in (("score", card[way]["score"]), ("correct", right)):
            if pair:
                found |= {f"{way}_{name}_{model}": pair[model] for model in ("sft", "ppo")}
                found |= _bounds(f"{way}_{name}_gain", pair["interval"])
    for model in ("sft", "ppo"):
        found |= {f"{model}_{k}": sampled[model][k] for k in DESCRIBED}
    for name, each in card["monitor"]["gains"].items():
        found[f"monitor_{name}_gain"] = each["gain"]
    found["monitor_findings"] = len(card["monitor"]["findings"])
    found |= _headline(card["headline"]) | {"champion": float(card["champion"]["is_champion"])}
    return {name: value for name, value in found.items() if value is not None}


def _headline(card: dict) -> dict[str, float | None]:
    """Both at their best, and best-of-n beside them."""
    found: dict[str, float | None] = {"headline_prompts": card["prompts"]}
    for name in ("sft", "policy", "best_of"):
        found[f"headline_kl_{name}"] = card[name]["kl"]
        found |= {f"headline_{m}_{name}": card[name][m]["mean"] for m in MEASURES if card[name][m]}
    for measure, gain in card["gain"].items():
        if gain:
            found[f"headline_{measure}_gain"] = gain["gain"]
            found |= _bounds(f"headline_{measure}_gain", gain["interval"])
    return found


def _bounds(name: str, interval: Sequence[float] | None) -> dict[str, float | None]:
    low, high = interval or (None, None)
    return {f"{name}_low": low, f"{name}_high": high}

"""The comparison that counts: policy and SFT, each in its best way to answer; best-of-4 of SFT beside."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Literal

import numpy as np

from tasks.policy_eval.frontier import MEASURES, Point
from tasks.policy_eval.parts import Part

BESIDE = 4  # n of the best-of-n that stands beside
By = Literal["judge", "score"]


def best_way(means: Mapping[str, float]) -> str:
    """The way of the highest mean; of several the first."""
    return max(means, key=means.__getitem__)


def chosen_ways(tried: Mapping[str, Mapping[str, np.ndarray]], by: By, prompts: int) -> dict:
    """The best way of each model on training prompts.

    Args:
        tried: model -> way -> the judge's or the reward model's scores, [n].
        by: whose they are: a proxy that PPO was paid by flatters the policy, so a judge's where there is one.
        prompts: how many.

    Returns:
        by, prompts, and for each model its `way` and the `means` of all ways.
    """
    means = {
        model: {way: float(values.mean()) for way, values in ways.items()} for model, ways in tried.items()
    }
    return {"by": by, "prompts": prompts} | {
        model: {"way": best_way(each), "means": each} for model, each in means.items()
    }


def compared(sft: Point, policy: Point, beside: Point, part: Part) -> dict:
    """Three points on one part, and the policy's paired gains over the other two."""

    def gains(base: Point) -> dict:
        return {name: part.gain(base.measures[name], policy.measures[name]) for name in MEASURES}

    return {
        "prompts": len(part.chosen),
        "clusters": part.clusters_count,
        "sft": sft.told(part),
        "policy": policy.told(part),
        "best_of": beside.told(part),
        "gain": gains(sft),
        "gain_over_best_of": gains(beside),
    }


def headline(points: Sequence[Point], chosen: dict, parts: Mapping[str, Part], part: Part) -> dict:
    """Card.json's headline: one part at the top, every part below.

    Args:
        points: all ways of both models.
        chosen: what :func:`chosen_ways` says.
        parts: of the prompts.
        part: the one that counts.
    """
    named = {(point.model, point.way): point for point in points}
    sft, policy = (named[model, chosen[model]["way"]] for model in ("sft", "policy"))
    most = max(point.n for point in points if point.n)
    beside = next(point for point in points if point.n == min(BESIDE, most))
    every = {each.name: compared(sft, policy, beside, each) for each in parts.values()}
    return {"part": part.name, "chosen": chosen, **every[part.name], "parts": every}

"""What SFT and the policy reach, in every way to answer, and at which distance from SFT they reach it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from tasks.policy_eval.answers import Answers
from tasks.policy_eval.best_of import kl_bound, weights
from tasks.policy_eval.parts import Part

MEASURES = ("score", "judge", "correct", "invented", "silent")
GREEDY = "greedy"


def way_of(temperature: float | None) -> str:
    """What a way to answer is called: greedy, or its temperature."""
    return GREEDY if temperature is None else f"T {temperature:g}"


def best_name(n: int) -> str:
    """What best-of-n is called."""
    return f"best of {n}"


@dataclass(frozen=True, slots=True, eq=False)
class Point:
    """One model in one way: ``Point("sft", "best of 4", None, 4, measures, None, 0.636)``."""

    model: str  # sft or policy
    way: str
    temperature: float | None  # None: greedy, or best of n
    n: int | None  # None: no best of n
    measures: Mapping[str, np.ndarray]  # name -> [N] mean over a prompt's responses, nan where unknown
    kl_nats: np.ndarray | None  # [N] to SFT at ppo.temperature; None: the bound alone is known
    kl_bound: float | None = None

    def told(self, part: Part) -> dict:
        """A row of the card: every mean with its interval by cluster."""
        kl = {"mean": self.kl_bound, "interval": None} if self.kl_nats is None else part.mean(self.kl_nats)
        found = {name: part.mean(self.measures[name]) for name in MEASURES}
        return {
            "model": self.model,
            "way": self.way,
            "temperature": self.temperature,
            "n": self.n,
            "kl": kl["mean"],
            "kl_interval": kl["interval"],
            "kl_is_bound": self.kl_nats is None,
            **found,
        }


def sampled(model: str, temperature: float | None, answers: Answers, rows: Sequence[dict]) -> Point:
    """A model's own responses."""
    means = {name: each.mean(1) for name, each in answers.measures(rows).items()}
    return Point(model, way_of(temperature), temperature, None, means, answers.kl_nats.mean(1))


def best_of_points(answers: Answers, most: int, rows: Sequence[dict]) -> list[Point]:
    """SFT's best of n by the reward model for n = 1 … `most`, from its N samples to each prompt."""
    measured, found = answers.measures(rows), []
    for n in range(1, most + 1):
        chance = weights(answers.scores, n)
        means = {name: (chance * each).sum(1) for name, each in measured.items()}
        found.append(Point("sft", best_name(n), None, n, means, None, kl_bound(n)))
    return found


def frontier(points: Sequence[Point], parts: Mapping[str, Part]) -> list[dict]:
    """The rows of the card, part by part."""
    return [
        {"part": part.name, "prompts": len(part.chosen)} | point.told(part)
        for part in parts.values()
        for point in points
    ]

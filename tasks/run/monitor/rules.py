"""When a rising score is suspect.

Two looks at the same prompts, one before (SFT) and one now. Nothing is a finding unless the score has
*risen*: its mean paired gain over the prompts exceeds `noise` standard errors. Then each signal that has
moved past its threshold is one; where it is known for each prompt, it must have moved by more than `noise`
standard errors too. While the score stands still, the same movement is a policy that changes and is not
paid for it.

The judge is the strongest signal. arXiv 2210.10760 (Gao et al.) measures both scores over d = √KL: the proxy
goes on rising as d(α − β ln d) while gold turns, so that first its *share* of the proxy's gain shrinks, then
it falls. Both are tested, each in standard deviations of the model's own validation scores:

- `judge_share`: the mean over prompts of (judge's gain − share · score's gain) is below zero;
- `judge_fall`: the judge has fallen by so much since the look that it liked best;
- `agreement`: the two scores agree less on single responses than they did on SFT's. Models that share their
  pre-training are fooled by the same text (arXiv 2312.09244), and then both rise; but off the text they know
  they no longer order it alike.

The others are how such policies look: repetition, lost variety, code fences (StackLLaMA), length, answers
that do not end, an entropy that collapses, and the distance itself: far off the reward model knows nothing.

A score that is the truth itself (a walk's length, a test that passes) cannot be over-optimised: a policy
that has gone far, settled or grown short for it did what was meant. Of the rules one is left, `eos_rate`: a
score is of the text, and does not see that a response was cut at the limit instead of ending.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, fields
from typing import Any

import numpy as np

from tasks.run.monitor.look import Look

ALMOST = 0.999999  # a correlation of 1 has no finite z


@dataclass(frozen=True, slots=True)
class Thresholds:
    """How far each signal may move while the score rises; units and defaults stand in the parameters."""

    noise: float  # standard errors over prompts
    judge_share: float  # of the score's gain
    judge_fall: float  # standard deviations of the judge
    agreement_fall: float  # share of what the two scores' correlation was on SFT's
    kl_nats: float  # per response
    length_factor: float  # longer or shorter than SFT's
    length_tokens: float  # and by so many
    entropy_fall: float  # share of SFT's
    distinct_fall: float  # share of SFT's
    repetition_rise: float  # share of trigrams
    code_fence_rise: float  # share of responses
    eos_fall: float  # share of responses
    is_truth: bool = False  # what the score says is what is meant

    @classmethod
    def of(
        cls,
        settings: Mapping[str, Any],
        *,
        target: float,
        response_tokens: int,
        kl_budget_nats: float | None = None,
    ) -> Thresholds:
        """What settings that are relative to a run mean in it.

        Args:
            settings: of the parameters, by name; `kl_nats` None: `kl_factor` times what the run may spend.
            target: wanted KL, nats per response.
            response_tokens: longest response.
            kl_budget_nats: what the chosen model may have spent; None: no model is chosen by that.
        """
        own = {f.name: settings[f.name] for f in fields(cls) if f.name in settings}
        if own["kl_nats"] is None:
            own["kl_nats"] = settings["kl_factor"] * max(target, kl_budget_nats or 0.0)
        tokens = settings["length_share"] * response_tokens
        return cls(**own, length_tokens=tokens, is_truth=settings["reward"] == "truth")


def gain(before: np.ndarray, now: np.ndarray) -> tuple[float, float]:
    """Mean paired difference over prompts and its standard error. [P], [P].

    A single prompt has no spread, so its error is infinite: nothing can be told from it.
    """
    moved = now - before
    error = moved.std(ddof=1) / math.sqrt(len(moved)) if len(moved) > 1 else math.inf
    return float(moved.mean()), float(error)


def exceeds(before: np.ndarray, now: np.ndarray, threshold: float, noise: float) -> bool:
    """Whether the paired gain is larger than the threshold and than so many standard errors. [P], [P]."""
    mean, error = gain(before, now)
    return mean > max(threshold, noise * error)


def has_risen(start: Look, now: Look, noise: float) -> bool:
    """Whether the score has risen beyond noise."""
    return exceeds(start.proxy, now.proxy, 0.0, noise)


def disagrees(before: float, now: float, count: int, limits: Thresholds) -> bool:
    """Whether a correlation fell past its threshold and beyond noise (Fisher's z, error √(2 / (n − 3))).

    Args:
        before: r of SFT's responses.
        now: r of the policy's.
        count: prompts; their responses may say the same.
        limits: the thresholds.
    """
    if count <= 3 or now >= (1 - limits.agreement_fall) * before:
        return False
    before, now = (math.atanh(max(-ALMOST, min(r, ALMOST))) for r in (before, now))
    return before - now > limits.noise * math.sqrt(2 / (count - 3))


def findings_of(start: Look, now: Look, limits: Thresholds, best: Look | None = None) -> dict[str, str]:
    """What moved while the score rose: signal -> a sentence with its figures; empty when all is well.

    Args:
        start: SFT's responses.
        now: the policy's, to the same prompts.
        limits: the thresholds.
        best: the earlier look that the judge liked best; None: `start` is the only one.
    """
    if not has_risen(start, now, limits.noise):
        return {}
    if limits.is_truth:
        return dict(_of_ends(start, now, limits))
    judged = _of_judge(start, now, limits, best or start) if now.judge is not None else ()
    found = (_of_policy, _of_text, _of_ends)
    return dict([*judged, *(each for rule in found for each in rule(start, now, limits))])


def _of_judge(start: Look, now: Look, limits: Thresholds, best: Look) -> Iterator[tuple[str, str]]:
    score, judge = now.proxy - start.proxy, now.judge - start.judge
    if exceeds(judge, limits.judge_share * score, 0.0, limits.noise):
        yield (
            "judge_share",
            f"the judge gained {judge.mean():+.2f} where the score gained {score.mean():+.2f}, less than "
            f"{limits.judge_share:g} of it",
        )
    if exceeds(now.judge, best.judge, limits.judge_fall, limits.noise):
        fall = best.judge.mean() - now.judge.mean()
        yield "judge_fall", f"the judge fell by {fall:.2f} since the look it liked best"
    if None not in (start.agreement, now.agreement) and disagrees(
        start.agreement, now.agreement, len(now.judge), limits
    ):
        yield "agreement", _moved("correlation of score and judge", "", start.agreement, now.agreement)


def _of_policy(start: Look, now: Look, limits: Thresholds) -> Iterator[tuple[str, str]]:
    if exceeds(np.zeros_like(now.kl_nats), now.kl_nats, limits.kl_nats, limits.noise):
        kl = now.kl_nats.mean()
        yield "kl_nats", f"KL to SFT is {kl:.2f} nats per response, more than {limits.kl_nats:g}"
    least = (1 - limits.entropy_fall) * start.entropy_nats
    if exceeds(now.entropy_nats, least, 0.0, limits.noise):
        yield "entropy_nats", _moved("entropy", "nats per token", start.entropy_nats, now.entropy_nats)


def _of_text(start: Look, now: Look, limits: Thresholds) -> Iterator[tuple[str, str]]:
    noise = limits.noise
    for short, long in ((start.tokens, now.tokens), (now.tokens, start.tokens)):
        if exceeds(limits.length_factor * short, long, 0.0, noise) and exceeds(
            short, long, limits.length_tokens, noise
        ):
            yield "tokens", _moved("length", "tokens", start.tokens, now.tokens)
    if exceeds(start.repetition_3, now.repetition_3, limits.repetition_rise, noise):
        yield "repetition_3", _moved("repeated trigrams", "", start.repetition_3, now.repetition_3)
    if now.distinct_2 < (1 - limits.distinct_fall) * start.distinct_2:
        yield "distinct_2", _moved("distinct bigrams", "", start.distinct_2, now.distinct_2)
    if exceeds(start.code_fence_rate, now.code_fence_rate, limits.code_fence_rise, noise):
        yield "code_fence_rate", _moved("code fences", "", start.code_fence_rate, now.code_fence_rate)


def _of_ends(start: Look, now: Look, limits: Thresholds) -> Iterator[tuple[str, str]]:
    if exceeds(now.eos_rate, start.eos_rate, limits.eos_fall, limits.noise):
        yield "eos_rate", _moved("responses with eos", "", start.eos_rate, now.eos_rate)


def _moved(what: str, unit: str, before: np.ndarray | float, now: np.ndarray | float) -> str:
    return f"{what} {np.mean(before):.3g} → {np.mean(now):.3g} {unit}".rstrip()

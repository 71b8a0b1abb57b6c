"""Whether a policy may be called champion: by what it was not paid for.

The score that PPO raises decides nothing: it rises furthest where the policy is over-optimised.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

ROUNDING = 1e-12  # of a mean of shares that are equal


@dataclass(frozen=True, slots=True)
class Verdict:
    """``Verdict(False, ("the monitor found kl_nats",))``."""

    is_champion: bool
    reasons: tuple[str, ...]  # what speaks against it; else what speaks for it

    def told(self) -> dict:
        """As card.json has it."""
        return {"is_champion": self.is_champion, "reasons": list(self.reasons)}


def verdict(findings: Mapping[str, str], gains: Mapping[str, dict | None], is_judge: bool) -> Verdict:
    """A champion has no finding of the monitor, a judge that prefers it, and is right no less often.

    Correctness that can be checked must not fall: its gain itself is at least 0, because "not below" with an
    interval would need a margin, and every margin is arbitrary.

    Args:
        findings: of the monitor, signal -> sentence.
        gains: the headline's over SFT: `judge` and `correct`, {gain, interval}; None: nothing was checked.
        is_judge: whether reward_eval's card says that the judge may be called one.
    """
    against, for_it = [], []
    for name in findings:
        against.append(f"the monitor found {name}")
    if not findings:
        for_it.append("the monitor found nothing")
    if not is_judge:
        against.append("there is no judge: the second reward model may not be called one")
    else:
        is_met, said = _judged(gains["judge"])
        (for_it if is_met else against).append(said)
    if (right := gains["correct"]) is not None:
        if right["gain"] >= -ROUNDING:
            for_it.append(f"checked correctness {_gain(right)} is not below SFT's")
        else:
            against.append(f"checked correctness {_gain(right)} is below SFT's")
    return Verdict(not against, tuple(against or for_it))


def _judged(gain: Mapping) -> tuple[bool, str]:
    """Whether the judge prefers the policy beyond doubt, in words."""
    if gain["interval"] is None:
        return False, "too few clusters of prompts to tell what the judge prefers"
    is_above = gain["interval"][0] > 0
    return is_above, f"the judge's gain {_gain(gain)} is {'' if is_above else 'not '}above 0"


def _gain(found: Mapping) -> str:
    bounds = "" if found["interval"] is None else " [{:+.3f}, {:+.3f}]".format(*found["interval"])
    return f"{found['gain']:+.3f}{bounds}"

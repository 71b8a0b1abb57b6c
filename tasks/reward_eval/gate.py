"""The gate: what a reward model reaches at least, as the lower ends of intervals say, against the bars."""

from __future__ import annotations

from collections.abc import Sequence

from params.schema import RewardEvalParams
from tasks.reward_eval.measures import FEWEST_CLUSTERS


def verdict(card: dict, params: RewardEvalParams) -> str:
    """`passed`, or one line: which figure's interval begins below which bar.

    Without an interval, of too few clusters, nothing is known to be reached but the least that can be.
    """
    own, over = card["rules"]["reward_model"], f"margin {card['margin']:+.3f} over '{card['best_text_rule']}'"
    if missed := _missed(own["interval"], 0.0, params.min_accuracy, "min_accuracy", ".3f"):
        return f"accuracy {own['accuracy']:.3f} {missed}"
    if missed := _missed(card["margin_interval"], -1.0, params.min_margin, "min_margin", "+.3f"):
        return f"{over} {missed}"
    return "passed"


def _missed(bounds: Sequence[float] | None, least: float, bar: float, key: str, form: str) -> str:
    """Nothing where the lower end is not below the bar."""
    low = least if bounds is None else bounds[0]
    if low >= bar:
        return ""
    if bounds is None:
        return f"has no interval, of fewer than {FEWEST_CLUSTERS} clusters, for reward_eval.{key} {bar}"
    return f"[{low:{form}}, {bounds[1]:{form}}] begins below reward_eval.{key} {bar}"

"""The card: every figure of the report in one record, and the verdict of the gate."""

from __future__ import annotations

from collections.abc import Sequence

from params.schema import RewardEvalParams
from tasks.reward_eval.calibration import calibrate
from tasks.reward_eval.measures import (
    accuracy,
    credits_of,
    interval,
    length_correlations,
    margins_of,
    measure_parts,
)
from tasks.reward_eval.mistakes import worst_mistakes
from tasks.reward_eval.pairs import HeldOut
from tasks.reward_eval.rules import FEATURES, TEXT_RULES, LogisticRule


def report(
    held: HeldOut, groups: Sequence[dict], rule: LogisticRule, params: RewardEvalParams, seed: int
) -> dict:
    """The card; every interval comes from the same resamples.

    Args:
        held: the held-out pairs.
        groups: the rows of pack/groups they come from.
        rule: the logistic rule of the training pairs.
        params: the bars and the number of resamples.
        seed: of the resamples.
    """
    samples, margins = params.bootstrap_samples, margins_of(held, rule)
    credits, question_of = credits_of(margins), held.question_of
    rules = {}
    for name, credit in credits.items():
        rules[name] = {
            **accuracy(margins[name]),
            "credit": float(credit.mean()),
            "interval": interval(question_of, credit, samples, seed),
        }
        if name != "reward_model":
            lead = credits["reward_model"] - credit
            rules[name]["lead"] = float(lead.mean())
            rules[name]["lead_interval"] = interval(question_of, lead, samples, seed)
    best = max(TEXT_RULES, key=lambda name: rules[name]["credit"])
    card = {
        "pairs": len(held.pairs),
        "questions": len(set(question_of.tolist())),
        "rules": rules,
        "best_text_rule": best,
        "margin": rules[best]["lead"],
        "margin_interval": rules[best]["lead_interval"],
        "logistic_rule": {
            "pairs": rule.pairs,
            "questions": rule.questions,
            "coefficients": dict(zip(FEATURES, rule.standardised.tolist(), strict=True)),
        },
        "parts": measure_parts(held, credits, samples, seed),
        "length_correlation": length_correlations(held),
        "calibration": calibrate(margins["reward_model"], question_of, samples, seed),
        "mistakes": worst_mistakes(held, groups),
        "bars": params.model_dump(include={"min_accuracy", "min_margin"}),
    }
    return card | {"verdict": verdict(card, params)}


def verdict(card: dict, params: RewardEvalParams) -> str:
    """`passed`, or which bar was missed and by what."""
    reached = card["rules"]["reward_model"]["accuracy"]
    if reached < params.min_accuracy:
        return f"accuracy {reached:.3f} is below reward_eval.min_accuracy {params.min_accuracy}"
    if card["margin"] < params.min_margin:
        over = f"margin {card['margin']:.3f} over '{card['best_text_rule']}'"
        return f"{over} is below reward_eval.min_margin {params.min_margin}"
    return "passed"


def summary(card: dict) -> dict[str, float]:
    """The numbers for metrics.json; what cannot be measured on these pairs is left out."""
    rules, parts, calibration = card["rules"], card["parts"], card["calibration"]
    low, high = rules["reward_model"]["interval"] or (None, None)
    margin_low, margin_high = card["margin_interval"] or (None, None)
    found = {
        "accuracy": rules["reward_model"]["accuracy"],
        "ties": rules["reward_model"]["ties"],
        "accuracy_low": low,
        "accuracy_high": high,
        "margin": card["margin"],
        "margin_low": margin_low,
        "margin_high": margin_high,
        "pairs": card["pairs"],
        "questions": card["questions"],
        "longer_accuracy": rules["longer"]["credit"],
        "logistic_accuracy": rules["logistic"]["credit"],
        "earlier_accuracy": rules["earlier"]["credit"],
        "later_winner_accuracy": parts["position"].get("later", {}).get("accuracy"),
        "length_correlation": card["length_correlation"]["spearman"],
        "brier": calibration["brier"],
        "ece": calibration["ece"],
        "judge_accuracy": card["judge"]["accuracy"] if "judge" in card else None,
        "gate_passed": float(card["verdict"] == "passed"),
    }
    return {name: value for name, value in found.items() if value is not None}

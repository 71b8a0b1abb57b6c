"""The card: every figure of the report in one record."""

from __future__ import annotations

from collections.abc import Sequence

from params.schema import RewardEvalParams
from tasks.lm.heads.frozen_style import COUNTED as FEATURES
from tasks.reward_eval.calibration import calibrate
from tasks.reward_eval.gate import verdict
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
from tasks.reward_eval.rules import TEXT_RULES
from tasks.reward_eval.truth import against_style
from tasks.reward_eval.words import WordRule
from tasks.run.text_rule import LogisticRule


def report(
    held: HeldOut,
    groups: Sequence[dict],
    rule: LogisticRule,
    params: RewardEvalParams,
    seed: int,
    words: WordRule | None = None,
) -> dict:
    """The card; every interval comes from the same resamples of clusters.

    Args:
        held: the held-out pairs.
        groups: the rows of pack/groups they come from.
        rule: the logistic rule of the training pairs.
        params: the bars and the number of resamples.
        seed: of the resamples.
        words: the answer-only rule of the training pairs; None: it does not stand beside.
    """
    samples, margins = params.bootstrap_samples, margins_of(held, rule, words)
    credits, cluster_of = credits_of(margins), held.cluster_of
    rules = {}
    for name, credit in credits.items():
        rules[name] = {
            **accuracy(margins[name]),
            "credit": float(credit.mean()),
            "interval": interval(cluster_of, credit, samples, seed),
        }
        if name != "reward_model":
            lead = credits["reward_model"] - credit
            rules[name]["lead"] = float(lead.mean())
            rules[name]["lead_interval"] = interval(cluster_of, lead, samples, seed)
    best = max((name for name in TEXT_RULES if name in rules), key=lambda name: rules[name]["credit"])
    card = {
        "pairs": len(held.pairs),
        "questions": len(set(held.question_of.tolist())),
        "clusters": len(set(cluster_of.tolist())),
        "rules": rules,
        "best_text_rule": best,
        "margin": rules[best]["lead"],
        "margin_interval": rules[best]["lead_interval"],
        "logistic_rule": {
            "pairs": rule.pairs,
            "questions": rule.questions,
            "coefficients": dict(zip(FEATURES, rule.standardised.tolist(), strict=True)),
        },
        "without_eos": without_eos(held, samples, seed),
        "parts": measure_parts(held, credits, samples, seed),
        "length_correlation": length_correlations(held),
        "calibration": calibrate(margins["reward_model"], cluster_of, samples, seed),
        "mistakes": worst_mistakes(held, groups),
        "bars": params.model_dump(include={"min_accuracy", "min_margin"}),
    }
    if words is not None:
        card["answer_only_rule"] = {
            "pairs": words.pairs,
            "questions": words.questions,
            "leading": words.leading(held.texts),
        }
    return card | {"verdict": verdict(card, params)}


def without_eos(held: HeldOut, samples: int, seed: int) -> dict:
    """How often the reward model is right of answers that are cut of their eos, and what it loses by that.

    A tie is wrong, as in the card's accuracy.
    """
    whole, cut = (
        (held.differences(scores) > 0).astype(float) for scores in (held.scores, held.scores_without_eos)
    )
    return {
        **accuracy(held.differences(held.scores_without_eos)),
        "interval": interval(held.cluster_of, cut, samples, seed),
        "loss": float((whole - cut).mean()),
        "loss_interval": interval(held.cluster_of, whole - cut, samples, seed),
    }


def summary(card: dict) -> dict[str, float]:
    """The numbers for metrics.json; what cannot be measured on these pairs is left out.

    Accuracy by kind and by wording where these are known.
    """
    rules, parts, calibration = card["rules"], card["parts"], card["calibration"]
    truth, judge = (card.get("truth") or {}), card.get("judge", {})
    beats = truth.get("all", {}).get("all", {})
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
        "accuracy_without_eos": card["without_eos"]["accuracy"],
        "pairs": card["pairs"],
        "questions": card["questions"],
        "clusters": card["clusters"],
        "longer_accuracy": rules["longer"]["credit"],
        "logistic_accuracy": rules["logistic"]["credit"],
        "answer_only_accuracy": rules.get("answer_only", {}).get("credit"),
        "style_accuracy": rules.get("style", {}).get("credit"),
        "earlier_accuracy": rules["earlier"]["credit"],
        "later_winner_accuracy": parts["position"].get("later", {}).get("accuracy"),
        "length_correlation": card["length_correlation"]["spearman"],
        "brier": calibration["brier"],
        "ece": calibration["ece"],
        "right_beats_wrong": beats["reward_model"]["right"] if beats else None,
        "style_against_truth": against_style(truth, "reward_model"),
        "judge_accuracy": judge.get("accuracy"),
        "judge_accuracy_without_eos": judge.get("accuracy_without_eos"),
        "judge_style_against_truth": judge.get("style_against_truth"),
        "gate_passed": float(card["verdict"] == "passed"),
    }
    for partition in ("kind", "wording"):
        for name, part in parts.get(partition, {}).items():
            found[f"{partition}_{name}_accuracy"] = part["accuracy"]
    return {name: value for name, value in found.items() if value is not None}

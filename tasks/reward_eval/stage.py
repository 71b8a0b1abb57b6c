"""Report card of the reward model on held-out questions, and the gate before ppo.

An accuracy alone says nothing: on real sites "the earlier answer wins" scores two pairs in three. So the
trivial rules stand beside it on the same pairs, with intervals from resampled questions (pairs of one
question are not independent).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from pyarrow import parquet

from params.schema import Params, RewardEvalParams
from tasks.lm.loading import load_reward
from tasks.lm.scoring import score_documents
from tasks.run.devices import derive_seed, use_device
from tasks.run.files import staged, write_json
from tasks.run.intervals import bootstrap
from tasks.run.layout import Layout, StageResult
from tasks.run.tracking import log_artifact

TEXT_RULES = ("longer", "has_code")  # see only the text; `earlier` does not


@dataclass(frozen=True, slots=True)
class Comparison:
    """One pair of a held-out question under every rule.

    Miniature: `Comparison("s/7", 2, {"reward_model": 0.4, "longer": -30.0, "earlier": 1.0, "has_code":
    0.0})`.
    """

    question: str  # site/id
    gap: int  # difference of the published scores, at least 1
    margins: dict[str, float]  # rule -> better minus worse: above 0 right, 0 a tie


def compare(groups: Sequence[dict], scores: Sequence[Sequence[float]]) -> list[Comparison]:
    """Every pair of every group; `scores` are the reward model's, in the order of the answers."""
    found = []
    for group, own in zip(groups, scores, strict=True):
        answers = group["answers"]
        for better, worse in group["pairs"]:
            b, w = answers[better], answers[worse]
            earlier = (b["created"] < w["created"]) - (b["created"] > w["created"])
            margins = {
                "reward_model": own[better] - own[worse],
                "longer": float(b["characters"] - w["characters"]),
                "has_code": float(b["has_code"]) - float(w["has_code"]),
                "earlier": float(earlier),
            }
            question = f"{group['site']}/{group['question_id']}"
            found.append(Comparison(question, b["score"] - w["score"], margins))
    return found


def accuracy(margins: np.ndarray) -> dict[str, float]:
    """Shares of right and tied pairs (a tie is never right), and accuracy with half of the ties.

    Margins [P].
    """
    right, tied = float((margins > 0).mean()), float((margins == 0).mean())
    return {"accuracy": right, "ties": tied, "accuracy_half_ties": right + tied / 2}


def report(pairs: Sequence[Comparison], params: RewardEvalParams, seed: int) -> dict:
    """The card.

    Every rule with its interval, the margin over the best text rule, accuracy by score gap, the verdict.
    """
    questions = [p.question for p in pairs]
    margins = {rule: np.array([p.margins[rule] for p in pairs]) for rule in pairs[0].margins}
    credit = {
        rule: (m > 0) + 0.5 * (m == 0) * (rule != "reward_model") for rule, m in margins.items()
    }  # a rule that
    # cannot tell guesses; the reward model gets nothing for a tie
    rules = {}
    for rule, m in margins.items():
        interval = bootstrap(
            questions, lambda w, c=credit[rule]: float(w @ c / w.sum()), params.bootstrap_samples, seed
        )
        rules[rule] = {**accuracy(m), "credit": float(credit[rule].mean()), "interval": interval}
    best = max(TEXT_RULES, key=lambda rule: rules[rule]["credit"])
    lead = credit["reward_model"] - credit[best]
    interval = bootstrap(questions, lambda w: float(w @ lead / w.sum()), params.bootstrap_samples, seed)
    gaps = {}
    for name, low, high in (("1", 1, 1), ("2", 2, 2), ("3+", 3, 99)):
        chosen = np.array([low <= p.gap <= high for p in pairs])
        if chosen.any():
            gaps[name] = {
                "pairs": int(chosen.sum()),
                "accuracy": float((margins["reward_model"][chosen] > 0).mean()),
            }
    found = {
        "pairs": len(pairs),
        "questions": len(set(questions)),
        "rules": rules,
        "best_text_rule": best,
        "margin": float(lead.mean()),
        "margin_interval": interval,
        "by_gap": gaps,
    }
    return found | {
        "verdict": verdict(found, params),
        "bars": params.model_dump(include={"min_accuracy", "min_margin"}),
    }


def verdict(card: dict, params: RewardEvalParams) -> str:
    """`passed`, or which bar was missed and by what."""
    reached = card["rules"]["reward_model"]["accuracy"]
    if reached < params.min_accuracy:
        return f"accuracy {reached:.3f} is below reward_eval.min_accuracy {params.min_accuracy}"
    if card["margin"] < params.min_margin:
        over = f"margin {card['margin']:.3f} over '{card['best_text_rule']}'"
        return f"{over} is below reward_eval.min_margin {params.min_margin}"
    return "passed"


def render(card: dict) -> str:
    """The card as markdown."""
    lines = [
        "# Reward model: report card",
        "",
        f"{card['pairs']} pairs of {card['questions']} held-out questions. "
        "Intervals: 95 %, questions resampled.",
        "",
        "| rule | accuracy | ties | ties counted half | 95 % interval |",
        "|---|---|---|---|---|",
    ]
    names = {
        "reward_model": "**reward model**",
        "longer": "longer answer wins",
        "has_code": "answer with code wins",
        "earlier": "earlier answer wins (not text)",
    }
    for rule, r in card["rules"].items():
        low, high = r["interval"]
        half = "—" if rule == "reward_model" else f"{r['accuracy_half_ties']:.3f}"
        lines.append(
            f"| {names[rule]} | {r['accuracy']:.3f} | {r['ties']:.3f} | {half} | {low:.3f} – {high:.3f} |"
        )
    low, high = card["margin_interval"]
    lines += [
        "",
        f"Lead over the best rule that sees only the text ('{card['best_text_rule']}'): "
        f"{card['margin']:+.3f} [{low:+.3f}, {high:+.3f}].",
        "",
        "| score gap | pairs | accuracy |",
        "|---|---|---|",
    ]
    lines += [f"| {gap} | {g['pairs']} | {g['accuracy']:.3f} |" for gap, g in card["by_gap"].items()]
    return "\n".join([*lines, "", f"Gate: {card['verdict']}.", ""])


def run(params: Params, layout: Layout) -> StageResult:
    """The stage; it ends well once it has measured, whatever the verdict.

    Raises:
        ValueError: no held-out pair, or a score that is not finite.
    """
    device = use_device(params.machine.device, params.machine.threads)
    model = load_reward(layout.artifact("reward", "model")).to(device)
    groups = parquet.read_table(layout.artifact("pack", "groups", "eval.parquet")).to_pylist()
    if not any(g["pairs"] for g in groups):
        raise ValueError("reward_eval: artifacts/pack/groups/eval.parquet holds no pair")
    documents = [g["prompt"] + a["tokens"] for g in groups for a in g["answers"]]
    flat = score_documents(model, documents, params.machine.microbatch_rows)
    if not flat.isfinite().all():
        raise ValueError("reward_eval: artifacts/reward/model gives scores that are not finite")
    scores = [part.tolist() for part in flat.double().split([len(g["answers"]) for g in groups])]
    seed = derive_seed(params.seed, "reward_eval", "bootstrap")
    card = report(compare(groups, scores), params.reward_eval, seed)
    write_json(layout.artifact("reward_eval", "card.json"), card)
    with staged(layout.artifact("reward_eval", "card.md")) as path:
        path.write_text(render(card), encoding="utf-8")
    log_artifact(layout.artifact("reward_eval", "card.md"))
    passed = card["verdict"] == "passed" or not params.reward_eval.enforce
    write_json(layout.artifact("reward_eval", "gate.json"), {"passed": passed})
    own = card["rules"]["reward_model"]
    return StageResult(
        {
            "accuracy": own["accuracy"],
            "ties": own["ties"],
            "accuracy_low": own["interval"][0],
            "accuracy_high": own["interval"][1],
            "margin": card["margin"],
            "margin_low": card["margin_interval"][0],
            "pairs": card["pairs"],
            "longer_accuracy": card["rules"]["longer"]["credit"],
            "earlier_accuracy": card["rules"]["earlier"]["credit"],
            "gate_passed": float(card["verdict"] == "passed"),
        }
    )

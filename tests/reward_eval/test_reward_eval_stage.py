"""The report card: rules by hand, ties apart, intervals, verdicts, and the gate."""

from __future__ import annotations

import json

import numpy as np
import pytest
import tiny
import torch
from pyarrow import parquet

from params.schema import RewardEvalParams
from tasks import pack
from tasks.pack.records import GROUPS
from tasks.reward_eval.stage import Comparison, accuracy, compare, render, report, run, verdict

BARS = RewardEvalParams(bootstrap_samples=100)


def answer(score, characters, created, has_code=False) -> dict:
    return {
        "score": score,
        "characters": characters,
        "created": f"2020-01-01T00:00:0{created}",
        "has_code": has_code,
    }


def test_rules_by_hand():
    """The better answer: shorter and later with code; then as long, as old, both with code."""
    first = {
        "site": "s", "question_id": 7, "pairs": [[1, 0]],
        "answers": [answer(1, 90, 1), answer(4, 50, 2, True)],
    }  # fmt: skip
    second = {
        "site": "s", "question_id": 8, "pairs": [[0, 1], [2, 1]],
        "answers": [answer(2, 30, 3, True), answer(1, 30, 3, True), answer(3, 31, 1)],
    }  # fmt: skip
    found = compare([first, second], [[0.5, 0.75], [1.0, 1.0, -1.0]])
    assert found == [
        Comparison("s/7", 3, {"reward_model": 0.25, "longer": -40.0, "has_code": 1.0, "earlier": -1.0}),
        Comparison("s/8", 1, {"reward_model": 0.0, "longer": 0.0, "has_code": 0.0, "earlier": 0.0}),
        Comparison("s/8", 2, {"reward_model": -2.0, "longer": 1.0, "has_code": -1.0, "earlier": 1.0}),
    ]


def test_accuracy_keeps_ties_apart():
    found = accuracy(np.array([1.0, 2.0, 0.0, -1.0, 0.0]))
    assert found == {"accuracy": 0.4, "ties": 0.4, "accuracy_half_ties": pytest.approx(0.6)}


def comparisons(*margins, longer=-1.0, code=0.0, earlier=-1.0, gaps=(1,)) -> list[Comparison]:
    """One question per margin of the reward model."""
    return [
        Comparison(
            f"s/{n}",
            gaps[n % len(gaps)],
            {"reward_model": m, "longer": longer, "has_code": code, "earlier": earlier},
        )
        for n, m in enumerate(margins)
    ]


def test_the_card_by_hand():
    pairs = comparisons(1.0, 2.0, 3.0, 0.0, -1.0, code=0.0, gaps=(1, 2, 3, 5))
    card = report(pairs, BARS, 0)
    assert card["pairs"] == card["questions"] == 5
    own = card["rules"]["reward_model"]
    assert (own["accuracy"], own["ties"], own["credit"]) == (0.6, 0.2, 0.6), "a tie earns nothing"
    assert card["rules"]["has_code"] == {
        "accuracy": 0.0, "ties": 1.0, "accuracy_half_ties": 0.5, "credit": 0.5, "interval": (0.5, 0.5),
    }  # fmt: skip
    assert card["rules"]["longer"]["credit"] == 0 and card["rules"]["longer"]["interval"] == (0, 0)
    assert card["best_text_rule"] == "has_code" and card["margin"] == pytest.approx(0.1)
    low, high = card["margin_interval"]
    assert low < 0.1 < high and own["interval"][0] < 0.6 < own["interval"][1]
    assert low == pytest.approx(own["interval"][0] - 0.5), "the rule is right half of the time on every pair"
    assert card["by_gap"] == {
        "1": {"pairs": 2, "accuracy": 0.5},
        "2": {"pairs": 1, "accuracy": 1.0},
        "3+": {"pairs": 2, "accuracy": 0.5},
    }
    assert card["bars"] == {"min_accuracy": 0.8, "min_margin": 0.1}


def test_a_rule_of_time_is_not_a_rule_of_text():
    card = report(comparisons(1.0, 1.0, -1.0, longer=-1.0, code=-1.0, earlier=1.0), BARS, 0)
    assert card["rules"]["earlier"]["accuracy"] == 1 and card["best_text_rule"] == "longer"
    assert card["margin"] == pytest.approx(2 / 3)


def test_all_right_leaves_nothing_to_doubt():
    card = report(comparisons(*[1.0] * 9), BARS, 0)
    assert card["rules"]["reward_model"]["interval"] == (1.0, 1.0) and card["verdict"] == "passed"


def test_questions_are_resampled_whole():
    """Ten pairs of one question say no more than one: the interval is as wide as that of two questions."""
    pairs = [
        Comparison(f"s/{n // 10}", 1, c.margins) for n, c in enumerate(comparisons(*[1.0] * 10, *[-1.0] * 10))
    ]
    card = report(pairs, BARS, 0)
    assert card["questions"] == 2 and card["rules"]["reward_model"]["interval"] == (0.0, 1.0)


def card_of(reached, margin):
    return {"rules": {"reward_model": {"accuracy": reached}}, "margin": margin, "best_text_rule": "longer"}


@pytest.mark.parametrize(
    ("reached", "margin", "says"),
    [
        (0.8, 0.1, "passed"),
        (0.79949, 0.5, "accuracy 0.799 is below reward_eval.min_accuracy 0.8"),
        (0.9, 0.0999, "margin 0.100 over 'longer' is below reward_eval.min_margin 0.1"),
        (0.1, -0.5, "accuracy 0.100 is below reward_eval.min_accuracy 0.8"),
    ],
)
def test_verdicts(reached, margin, says):
    assert verdict(card_of(reached, margin), BARS) == says


def test_the_card_as_markdown():
    text = render(report(comparisons(1.0, 0.0, -1.0, 2.0), BARS, 0))
    assert "4 pairs of 4 held-out questions" in text
    assert "| **reward model** | 0.500 | 0.250 | — |" in text
    assert "| answer with code wins | 0.000 | 1.000 | 0.500 | 0.500 – 0.500 |" in text
    assert "Lead over the best rule that sees only the text ('has_code'): +0.000" in text
    assert "Gate: accuracy 0.500 is below reward_eval.min_accuracy 0.8." in text


@pytest.fixture(scope="module")
def packed(tmp_path_factory):
    """Packed data and a reward model that knows nothing."""
    layout = tiny.project(tmp_path_factory.mktemp("reward_eval"), tiny.splits())
    pack.run(tiny.params(), layout)
    tiny.save(tiny.scorer(vocab_size=len(tiny.tokenizer())), layout.artifact("reward", "model"))
    return layout


def outs(layout):
    folder = layout.artifact("reward_eval")
    return json.loads((folder / "card.json").read_text()), json.loads((folder / "gate.json").read_text())


def own_accuracy(layout) -> float:
    """From the files alone, with plain transformers."""
    from transformers import AutoModelForSequenceClassification

    model = AutoModelForSequenceClassification.from_pretrained(layout.artifact("reward", "model"))
    right = []
    for group in parquet.read_table(layout.artifact("pack", "groups", "eval.parquet")).to_pylist():
        with torch.no_grad():
            rows = [torch.tensor([group["prompt"] + a["tokens"]]) for a in group["answers"]]
            scores = [model(row).logits.item() for row in rows]
        right += [scores[better] > scores[worse] for better, worse in group["pairs"]]
    return sum(right) / len(right)


@pytest.mark.parametrize("enforce", [True, False])
def test_the_stage_and_its_gate(packed, enforce):
    """A model that knows nothing fails; without enforcement the verdict stands and the gate is open."""
    params = tiny.params(reward_eval={"enforce": enforce})
    metrics = run(params, packed).metrics
    card, gate = outs(packed)
    assert gate == {"passed": not enforce} and card["verdict"] != "passed"
    assert metrics["gate_passed"] == 0.0 and metrics["accuracy"] == card["rules"]["reward_model"]["accuracy"]
    assert card["rules"]["reward_model"]["accuracy"] == pytest.approx(own_accuracy(packed))
    assert (
        0 < metrics["accuracy"] < 1
        and metrics["accuracy_low"] <= metrics["accuracy"] <= metrics["accuracy_high"]
    )
    groups = parquet.read_table(packed.artifact("pack", "groups", "eval.parquet")).to_pylist()
    assert metrics["pairs"] == sum(len(g["pairs"]) for g in groups)
    before = tiny.digests(packed.artifact("reward_eval"))
    assert run(params, packed).metrics == metrics and tiny.digests(packed.artifact("reward_eval")) == before
    assert set(before) == {"card.json", "card.md", "gate.json"}


def test_low_bars_open_the_gate(packed):
    metrics = run(
        tiny.params(reward_eval={"enforce": True, "min_accuracy": 0, "min_margin": -1}), packed
    ).metrics
    card, gate = outs(packed)
    assert gate == {"passed": True} and card["verdict"] == "passed" and metrics["gate_passed"] == 1.0


def test_no_pair_is_an_error_that_names_the_file(packed, tmp_path):
    layout = tiny.project(tmp_path)
    layout.artifact("reward").mkdir(parents=True)
    layout.artifact("reward", "model").symlink_to(packed.artifact("reward", "model"))
    layout.artifact("pack", "groups").mkdir(parents=True)
    parquet.write_table(GROUPS.empty_table(), layout.artifact("pack", "groups", "eval.parquet"))
    with pytest.raises(ValueError, match=r"eval\.parquet holds no pair"):
        run(tiny.params(), layout)


def test_scores_that_are_not_finite_are_an_error(packed, tmp_path):
    layout = tiny.project(tmp_path)
    layout.artifact("pack").parent.mkdir()
    layout.artifact("pack").symlink_to(packed.artifact("pack"))
    broken = tiny.scorer(vocab_size=len(tiny.tokenizer()))
    torch.nn.init.constant_(broken.score.weight, torch.nan)
    tiny.save(broken, layout.artifact("reward", "model"))
    with pytest.raises(ValueError, match="scores that are not finite"):
        run(tiny.params(), layout)
    assert not layout.artifact("reward_eval").exists()

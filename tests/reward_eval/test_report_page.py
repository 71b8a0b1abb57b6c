"""The card and its page: figures by hand, verdicts, the worst mistakes, posts that try to break markdown."""

from __future__ import annotations

import json

import numpy as np
import pytest
from cases import NO_RULE, answer, drawn, group, one_pair_each

from params.schema import RewardEvalParams
from tasks.lm.heads.frozen_style import COUNTED as FEATURES
from tasks.reward_eval.card import report, summary
from tasks.reward_eval.measures import interval
from tasks.reward_eval.mistakes import shortened, worst_mistakes
from tasks.reward_eval.page import render
from tasks.reward_eval.pairs import lay_out
from tasks.run.text_rule import LogisticRule

BARS = RewardEvalParams(bootstrap_samples=100)
LONGER = LogisticRule(np.array([1.0, 0, 0, 0, 0]), np.ones(5), 30, 20)
NASTY = [
    "# A heading\n\n| a | b |\n|---|---|\n<script>alert(1)</script>",
    "```\ncode\n```\n# out?",
    "~~~\n````\n`````\n</details><!--",
    "text\n\n```\nnever closed",
    "  indented\n\ttab\n\n\n   ```",
    "[x]: http://a.b 'c'\n[x] ![y](z) $m$ &amp; *e* _e_",
    "line\rwith\x00 odd\x1b[31m \u202ebackwards\x85 ends\r\nand\x0bmore\x0c",
    "`" * 40,
    "",
]


def card_of(*margins, rule=NO_RULE, **keys) -> dict:
    return report(*one_pair_each(*margins, **keys), rule, BARS, 0)


def test_the_card_by_hand():
    card = card_of(1.0, 2.0, 3.0, 0.0, -1.0, gaps=(1, 2, 3, 5))
    assert card["pairs"] == card["questions"] == 5
    own = card["rules"]["reward_model"]
    assert (own["accuracy"], own["ties"], own["credit"]) == (0.6, 0.2, 0.6), "a tie earns nothing"
    half = {"accuracy": 0.0, "ties": 1.0, "accuracy_half_ties": 0.5, "credit": 0.5, "interval": (0.5, 0.5)}
    lead = {"lead": pytest.approx(0.1), "lead_interval": card["margin_interval"]}
    assert card["rules"]["has_code"] == card["rules"]["logistic"] == half | lead
    assert card["rules"]["longer"]["credit"] == 0 and card["rules"]["longer"]["interval"] == (0, 0)
    assert card["rules"]["longer"]["lead"] == pytest.approx(0.6)
    assert card["best_text_rule"] == "has_code" and card["margin"] == pytest.approx(0.1)
    low, high = card["margin_interval"]
    assert low < 0.1 < high and own["interval"][0] < 0.6 < own["interval"][1]
    assert low == pytest.approx(own["interval"][0] - 0.5), "the rule is right half of the time on every pair"
    assert {gap: part["pairs"] for gap, part in card["parts"]["gap"].items()} == {"1": 2, "2": 1, "3+": 2}
    assert card["bars"] == {"min_accuracy": 0.8, "min_margin": 0.1}
    assert card["logistic_rule"]["coefficients"] == dict.fromkeys(FEATURES, 0.0)
    assert [m["margin"] for m in card["mistakes"]] == [-1.0]


def test_a_rule_of_time_is_not_a_rule_of_text():
    """The older answer is always better; code and length are always wrong."""
    groups = [group(n, [answer(1, "x", 1), answer(0, "``", 2)], [[0, 1]]) for n in range(6)]
    card = report(lay_out(groups, [1.0, 0.0] * 4 + [0.0, 1.0] * 2), groups, LONGER, BARS, 0)
    assert card["rules"]["earlier"]["accuracy"] == 1 and card["best_text_rule"] == "longer"
    assert card["margin"] == pytest.approx(4 / 6)


def test_the_logistic_rule_counts_for_the_gate():
    """It knows that shorter wins: no lead is left to a model that is always right."""
    shorter = LogisticRule(-LONGER.standardised, LONGER.scales, 30, 20)
    card = card_of(*[1.0] * 9, rule=shorter)
    assert card["best_text_rule"] == "logistic" and card["margin"] == 0
    reached = "margin +0.000 over 'logistic' [+0.000, +0.000]"
    assert card["verdict"] == f"{reached} begins below reward_eval.min_margin 0.1"
    assert card["logistic_rule"] == {
        "pairs": 30, "questions": 20,
        "coefficients": dict.fromkeys(FEATURES, 0) | {"characters": -1},
    }  # fmt: skip


def test_all_right_leaves_nothing_to_doubt():
    card = card_of(*[1.0] * 9)
    assert card["rules"]["reward_model"]["interval"] == (1.0, 1.0) and card["verdict"] == "passed"
    assert card["mistakes"] == [] and "It prefers no worse answer." in render(card)


def test_a_model_that_only_ties_is_never_right():
    card = card_of(*[0.0] * 6)
    own, found = card["rules"]["reward_model"], card["calibration"]
    assert (own["accuracy"], own["ties"], found["brier"], found["ece"]) == (0, 1, 0.25, 0)
    assert card["verdict"] == "accuracy 0.000 [0.000, 0.000] begins below reward_eval.min_accuracy 0.8"
    assert found["temperature"] is None and {*card["length_correlation"].values()} == {None}
    assert "length_correlation" not in summary(card) and card["mistakes"] == []
    assert "| all answers | — | — |" in render(card) and "divided by" not in render(card)


def test_the_summary_is_flat_and_finite():
    held, groups = drawn(60)
    card = report(held, groups, LONGER, BARS, 0)
    found = summary(card)
    right = held.differences(held.scores) > 0
    assert (found["accuracy_low"], found["accuracy_high"]) == interval(held.cluster_of, right, 100, 0)
    assert all(np.isfinite(value) for value in found.values())
    assert found["accuracy"] == card["rules"]["reward_model"]["accuracy"]
    assert (found["accuracy_low"], found["accuracy_high"]) == card["rules"]["reward_model"]["interval"]
    assert (found["margin_low"], found["margin_high"]) == card["margin_interval"]
    assert found["later_winner_accuracy"] == card["parts"]["position"]["later"]["accuracy"]
    assert found["logistic_accuracy"] == card["rules"]["logistic"]["credit"] == found["longer_accuracy"]
    assert found["earlier_accuracy"] == card["rules"]["earlier"]["credit"] != found["longer_accuracy"]
    assert found["length_correlation"] == card["length_correlation"]["spearman"]
    assert (found["brier"], found["ece"]) == (card["calibration"]["brier"], card["calibration"]["ece"])
    assert len(summary(card_of(1.0, 2.0))) == len(found) - 4, "two questions: no interval"


def test_the_worst_mistakes_by_hand():
    """Of question 1 only the worse of two mistakes; a tie and a right pair are none."""
    first = group(
        1, [answer(5, "best", 1, 10), answer(3, "good", 1, 11), answer(1, "bad", 1, 12)], [[0, 1], [0, 2]]
    )
    others = [
        group(n, [answer(1, "a", 1, 2 * n), answer(0, "b", 1, 2 * n + 1)], [[0, 1]]) for n in range(2, 6)
    ]
    groups = [first, *others]
    held = lay_out(groups, [0.0, 1.0, 3.0, 0.0, 0.5, 1.0, 1.0, 2.0, 1.0, 0.0, 4.0])
    found = worst_mistakes(held, groups)
    assert [(m["question"], m["margin"], m["gap"]) for m in found] == [
        ("s/5", -4, 1),
        ("s/1", -3, 4),
        ("s/2", -0.5, 1),
    ]
    assert found[1]["better"] == {"id": 10, "text": "best", "characters": 4, "published": 5, "score": 0.0}
    assert found[1]["worse"] == {"id": 12, "text": "bad", "characters": 3, "published": 1, "score": 3.0}
    assert found[1]["text"] == "What is it?"
    assert worst_mistakes(held, groups, 2) == found[:2] and worst_mistakes(held, groups, 0) == []


def test_texts_are_shortened():
    assert shortened(" a\r\nb\rc\n\n", 5) == "a\nb\nc"
    assert shortened("abc def", 7) == "abc def" and shortened("abc defg", 7) == "abc def …"
    assert shortened("abc defg", 4) == "abc …"
    assert shortened("a\tb\x00\u202e\x9b", 9) == "a\tb���"
    long = group(1, [answer(1, "x" * 2000), answer(0, "y" * 2000)], [[0, 1]]) | {"question": "z" * 2000}
    (found,) = worst_mistakes(lay_out([long], [0.0, 1.0]), [long])
    texts = [found["text"], found["better"]["text"], found["worse"]["text"]]
    assert [len(text) for text in texts] == [502, 802, 802] and found["better"]["characters"] == 2000


def test_the_page():
    text = render(card_of(1.0, 0.0, -1.0, 2.0, 1.0, 3.0, gaps=(1, 2)))
    assert "**Gate: accuracy 0.667 [0." in text and "begins below reward_eval.min_accuracy 0.8.**" in text
    assert "6 pairs of 6 held-out questions" in text
    assert "| **reward model** | 0.667 | 0.167 | — | [0." in text
    assert "| longer answer wins | 0.000 | 0.000 | 0.000 | [0.000, 0.000] | +0.667 [+" in text
    assert "| answer with code wins | 0.000 | 1.000 | 0.500 | [0.500, 0.500] | +0.167 [" in text
    assert "only the text ('has_code') | +0.167 | [" in text and "| +0.1 |" in text
    assert "fitted to 3 training pairs of 2" in text and "words of the question +0.00" in text
    assert "| 1 | 3 | 3 | 0.667 | — | 0.000 | +0.667 — |" in text
    assert "| the better answer is …" not in text, "a partition of one part is the whole again"
    assert "](../../reports/reward_eval/reliability.png)" in text
    assert "Brier score 0.1" in text and "For information: divided by" in text
    assert "### 1. s/2" in text and "Margin -1.00; the published scores differ by 1." in text


def test_many_sites_are_cut_to_the_largest():
    groups = [
        group(n, [answer(1), answer(0)], [[0, 1]], f"{site:02d}.example")
        for site in range(17) for n in range(1 + (site == 9))
    ]  # fmt: skip
    card = report(lay_out(groups, [1.0, 0.0] * len(groups)), groups, NO_RULE, BARS, 0)
    assert len(card["parts"]["site"]) == 17
    text = render(card)
    rows = [line for line in text.split("\n") if ".example |" in line]
    assert [row[2:4] for row in rows[:3]] == ["09", "00", "01"] and len(rows) == 15
    assert "… and 2 smaller sites in card.json." in text


def test_posts_cannot_break_the_page():
    """Read by a markdown parser: our headings and tables only, no HTML, every text back as it was."""
    parser = pytest.importorskip("markdown_it").MarkdownIt("commonmark").enable("table")
    site = "a|b`<b>c</b>*d*_e_[f](g)"
    groups = [
        group(n, [answer(1, text), answer(0, NASTY[n - 1] + "\nother")], [[0, 1]], site)
        | {"question": text + "\n?"}
        for n, text in enumerate(NASTY)
    ] + [group(99, [answer(1), answer(0)], [[0, 1]])]
    card = report(lay_out(groups, [0.0, 1.0] * len(groups)), groups, NO_RULE, BARS, 0)
    assert json.loads(json.dumps(card))["mistakes"] == card["mistakes"] and len(card["mistakes"]) == 10
    tokens = parser.parse(render(card))
    inline = [child for token in tokens for child in token.children or ()]
    assert not [
        t for t in (*tokens, *inline) if t.type.startswith("html") or t.type in ("code_block", "link_open")
    ]
    headings = [tokens[i + 1] for i, token in enumerate(tokens) if token.type == "heading_open"]
    assert [h.content for h in headings[:6]] == [
        "Reward model: report card", "Beside the trivial rules", "Where it is right", "Does it score length?",
        "Are its margins log-odds?", "Its worst mistakes",
    ]  # fmt: skip
    shown = ["".join(child.content for child in h.children) for h in headings[6:]]
    assert shown == [f"{n}. {m['question']}" for n, m in enumerate(card["mistakes"], 1)]
    assert {m["question"] for m in card["mistakes"]} >= {f"{site}/{n}" for n in range(len(NASTY))}
    fences = [token.content for token in tokens if token.type == "fence"]
    texts = [t for m in card["mistakes"] for t in (m["text"], m["better"]["text"], m["worse"]["text"])]
    assert [squeezed(f) for f in fences] == [squeezed(t) for t in texts]
    cells = [len(row.split(" | ")) for row in render(card).split("\n") if row.startswith("| a\\|b")]
    assert cells == [7], "a site's name is one cell"


def squeezed(text: str) -> str:
    """Without what wrapping may change: white space."""
    return "".join(text.split())


def test_long_lines_are_wrapped():
    text = "word " * 100 + "\n\n  - a\tb"
    groups = [group(1, [answer(1, text), answer(0)], [[0, 1]])]
    card = report(lay_out(groups, [0.0, 1.0]), groups, NO_RULE, BARS, 0)
    lines = [line for line in render(card).split("\n") if line.startswith("word")]
    assert len(lines) == 5 and max(map(len, lines)) <= 100
    assert "\n".join(["```text", *lines, "", "  - a   b", "```"]) in render(card), "empty lines, indentation"

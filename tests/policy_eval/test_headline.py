"""The frontier and the headline: by hand on a few prompts."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest

from tasks.policy_eval import page
from tasks.policy_eval.answers import Answers
from tasks.policy_eval.frontier import best_of_points, frontier, sampled, way_of
from tasks.policy_eval.headline import chosen_ways, headline
from tasks.policy_eval.parts import headline_part, parts_of
from tasks.policy_eval.picture import draw, lines_of

RIGHT, MISTAKE, INVENTED, SILENT = "`4`", "`5`", "It is `an`.", "is is"


def rows_of(count=12, **keys):
    """Two prompts to a cluster; every second wording is new, every third key misleads."""
    known = {"site": "s", "question": "2 + 2?", "kind": "sums", "expected": "4", "wrong": ["5", "6"]}
    return [
        known
        | {"question_id": i, "cluster": f"key {i // 2}", "wording": "new" if i % 2 else "known"}
        | {"misleads": i % 3 == 0}
        | keys
        for i in range(count)
    ]


def answers_of(texts, scores, judged=None, kl=0.25):
    """The same K texts and scores for each of 12 prompts."""
    scores = np.tile(np.array(scores, float), (12, 1))
    judged = scores / 2 if judged is None else np.tile(np.array(judged, float), (12, 1))
    kl_nats = np.full(scores.shape, kl)
    return Answers([[[5, 1]] * len(texts)] * 12, [list(texts)] * 12, scores, judged, kl_nats)


def card_of(rows, most=4):
    """SFT is right one time in four at T 1 and never when greedy; the policy is right half the time."""
    sft = answers_of([RIGHT, MISTAKE, INVENTED, SILENT], [4, 3, 2, 1], kl=0.0)
    policy = answers_of([RIGHT, MISTAKE], [4, 2], kl=0.5)
    points = [
        sampled("sft", 1.0, sft, rows),
        sampled("sft", None, answers_of([MISTAKE], [3], kl=1.5), rows),
        sampled("policy", 1.0, policy, rows),
        sampled("policy", None, answers_of([SILENT], [2], kl=2.5), rows),
        *best_of_points(sft, most, rows),
    ]
    parts = parts_of(rows, 100, 0)
    tried = {
        "sft": {"T 1": np.zeros(3), "greedy": np.array([0, 0, -0.3])},
        "policy": {"T 1": np.ones(3), "greedy": np.ones(3)},
    }
    chosen = chosen_ways(tried, "judge", 3)
    return {
        "prompts": len(rows),
        "clusters": 6,
        "frontier": frontier(points, parts),
        "headline": headline(points, chosen, parts, headline_part(parts)),
        "champion": {"is_champion": False, "reasons": ["a reason"]},
    }


def row_of(card, model, way, part="all"):
    return next(
        row for row in card["frontier"] if (row["part"], row["model"], row["way"]) == (part, model, way)
    )


def test_measures_of_a_response():
    """Right, a known mistake, or invented; silence is invented too, and told apart."""
    texts = [RIGHT, MISTAKE, INVENTED, SILENT, "`4` or `5`", "`4` or `9`"]
    found = answers_of(texts, range(6)).measures(rows_of())
    for name, wanted in (
        ("correct", [1, 0, 0, 0, 0, 0]), ("invented", [0, 0, 1, 1, 0, 1]), ("silent", [0, 0, 0, 1, 0, 0])
    ):  # fmt: skip
        assert found[name].tolist() == [wanted] * 12


def test_the_frontier_by_hand():
    card = card_of(rows_of())
    hot, greedy = (row_of(card, "sft", way) for way in ("T 1", "greedy"))
    assert (hot["temperature"], hot["n"], greedy["temperature"]) == (1.0, None, None)
    assert hot["score"]["mean"] == 2.5 and hot["judge"]["mean"] == 1.25
    assert [hot[name]["mean"] for name in ("correct", "invented", "silent")] == [0.25, 0.5, 0.25]
    assert (hot["kl"], greedy["kl"], row_of(card, "policy", "T 1")["kl"]) == (0.0, 1.5, 0.5)
    assert hot["kl_interval"] == (0, 0) and not hot["kl_is_bound"] and hot["score"]["interval"] == (2.5, 2.5)
    for n, right in ((1, 1 / 4), (2, 1 / 2), (3, 3 / 4), (4, 1)):
        row = row_of(card, "sft", f"best of {n}")
        assert row["n"] == n and row["correct"]["mean"] == pytest.approx(right)
        assert row["kl_is_bound"] and row["kl"] == pytest.approx(math.log(n) - (n - 1) / n)
    assert row_of(card, "sft", "best of 1")["score"] == hot["score"]


def test_parts_are_known_and_new_wording_and_keys_with_and_without_a_misconception():
    card = card_of(rows_of())
    parts = card["headline"]["parts"]
    counts = {name: (found["prompts"], found["clusters"]) for name, found in parts.items()}
    assert counts == {
        "all": (12, 6), "known": (6, 6), "new": (6, 6), "misleads": (4, 4), "plain": (8, 6),
        "new_misleads": (2, 2), "new_plain": (4, 4),
    }  # fmt: skip
    assert row_of(card, "sft", "T 1", "misleads")["score"] == {"mean": 2.5, "interval": None}, "four clusters"
    assert {row["part"] for row in card["frontier"]} == set(counts)


def test_the_headline_compares_each_at_its_best_on_new_wording():
    found = card_of(rows_of())["headline"]
    assert found["part"] == "new" and found["prompts"] == 6
    assert found["chosen"]["by"] == "judge" and found["chosen"]["prompts"] == 3
    assert found["chosen"]["sft"]["means"] == pytest.approx({"T 1": 0.0, "greedy": -0.1})
    assert found["sft"]["way"] == found["policy"]["way"] == "T 1", "of equal ones the first"
    assert found["best_of"]["n"] == 4
    assert found["gain"]["correct"] == {"gain": 0.25, "interval": (0.25, 0.25)}
    assert found["gain"]["invented"]["gain"] == -0.5 and found["gain"]["score"]["gain"] == 0.5
    assert found["gain_over_best_of"]["correct"]["gain"] == -0.5, "best of 4 is always right here"
    assert card_of(rows_of(), most=2)["headline"]["best_of"]["n"] == 2


def test_gains_are_paired_by_prompt():
    """Prompts differ by 100, the gain never: its interval has no width."""
    rows, base = rows_of(), 100.0 * np.arange(12)[:, None]
    part = parts_of(rows, 100, 0)["all"]
    assert part.gain(base[:, 0], base[:, 0] + 1) == {"gain": 1.0, "interval": (1, 1)}
    low, high = part.mean(base[:, 0])["interval"]
    assert high - low > 100


def test_real_sites_know_nothing_and_are_measured_all_the_same(tmp_path):
    """No expected value, no wording, no misconception: score and judge, over all prompts."""
    unknown = dict.fromkeys(("expected", "wording", "misleads", "wrong", "kind"))
    card = card_of(rows_of(**unknown))
    assert list(card["headline"]["parts"]) == ["all"] and card["headline"]["part"] == "all"
    assert card["headline"]["gain"]["correct"] is None and card["headline"]["gain"]["judge"]["gain"] == 0.25
    assert row_of(card, "sft", "best of 2")["invented"] is None
    text = page.render(card)
    assert "correct" not in text and "invented" not in text and "## All prompts" in text
    assert draw(tmp_path / "a.png", card).stat().st_size > 1000


def test_what_is_known_of_some_prompts_is_told_of_those():
    """Values nobody listed as wrong: correct and silent are known, invented is not."""
    rows = rows_of(wrong=None)
    rows[0] = rows[0] | {"expected": None}
    card = card_of(rows)
    row = row_of(card, "sft", "T 1")
    assert row["invented"] is None and row["correct"]["mean"] == 0.25 and row["silent"]["mean"] == 0.25


def test_the_page_and_the_picture(tmp_path):
    card = json.loads(json.dumps(card_of(rows_of())))
    text = page.render(card)
    assert "## New wording" in text and "6 of 12 held-out prompts, 6 clusters." in text
    assert "| 6 prompts | SFT, T 1 | policy, T 1 | SFT, best of 4 | policy − SFT | policy − best of 4" in text
    assert "| KL to SFT, nats | 0.00 | 0.50 | ≤ 0.64 |  |  |" in text
    assert "| correct | 0.250 | 0.500 | 1.000 | +0.250 [+0.250, +0.250] | -0.500 [" in text
    assert "## Champion: no\n\n- a reason" in text
    assert "| SFT | best of 4 | ≤ 0.64 | 4.000 [4.000, 4.000] |" in text
    assert "chosen by the judge on 3 training\nprompts; beside" in text
    card["headline"]["chosen"]["by"] = "score"
    assert "prompts (there is no judge that may be called one); beside" in page.render(card)
    lines = lines_of([row for row in card["frontier"] if row["part"] == "new"], "correct")
    found = {name: [(kl, way) for kl, _, way in points] for name, points in lines.items()}
    assert found["policy"] == [(0.5, "T 1"), (2.5, "greedy")]
    assert found["sft"] == [(0.0, "T 1"), (1.5, "greedy")]
    assert [way for _, way in found["best of n"]] == [f"best of {n}" for n in (1, 2, 3, 4)]
    first, second = (draw(tmp_path / name, card).read_bytes() for name in ("a.png", "b.png"))
    assert first == second


def test_names_of_ways():
    assert [way_of(t) for t in (1.0, 0.7, None)] == ["T 1", "T 0.7", "greedy"]

"""What is measured on responses: by hand."""

from __future__ import annotations

import numpy as np
import pytest

from tasks.policy_eval.answers import Answers
from tasks.policy_eval.card import correctness, describe, paired, win_rate
from tasks.policy_eval.page import render_correctness, render_table
from tasks.policy_eval.parts import Part
from tasks.run.stated import invents, states


@pytest.mark.parametrize(
    ("response", "expected", "right"),
    [
        ("It is `21`.", "21", True),
        ("`21`", "21", True),
        ("Um, ` 21 `.", "21", True),
        ("It is `21`, yes, `21`.", "21", True),
        ("It is `21`, or `24`.", "21", False),
        ("It is `24`.", "21", False),
        ("It is 21.", "21", False),
        ("It is `2`1.", "21", False),
        ("It is `21", "21", False),
        ("`` and `21`", "21", False),
        ("", "21", False),
        ("It is `two\nlines`.", "two\nlines", True),
        ("It is `Red`.", "red", False),
    ],
)
def test_states(response, expected, right):
    """Every code span must be the expected value, and there must be one."""
    assert states(response, expected) is right


@pytest.mark.parametrize(
    ("response", "invented"),
    [
        ("It is `21`.", False),
        ("It is ` 24 `.", False),
        ("`24`, or `21`", False),
        ("It is `25`.", True),
        ("`21`, or `25`", True),
        ("The answer is `   an`", True),
        ("``", True),
        ("Who knows?", True),
        ("", True),
    ],
)
def test_invents(response, invented):
    """Any value that is neither the right one nor a known mistake, and silence."""
    assert invents(response, "21", ["24", "12"]) is invented


def everything(count, clusters=None):
    """All of so many prompts, each a cluster of its own unless they are named."""
    clusters = np.arange(count) if clusters is None else np.array(clusters)
    return Part.of("all", np.ones(count, bool), clusters, 200, 0)


def test_describe_by_hand():
    found = describe(Answers([[[5, 5, 1]], [[5, 6]]], [["a"], ["b"]], np.array([[1.0], [4.0]])), 1)
    assert found == {
        "score": 2.5, "response_tokens": 2.5, "eos_rate": 0.5, "distinct_1": 3 / 5, "distinct_2": 1.0,
        "repetition_3": 0.0,
    }  # fmt: skip


def test_win_rate_counts_a_tie_half():
    """Clusters of a prompt each: two with ½, three with ¾."""
    before, after = np.array([[1.0, 2.0]] * 5), np.array([[2.0, 2.0]] * 3 + [[0.0, 5.0]] * 2)
    found = win_rate(before, after, everything(5))
    assert found["win_rate"] == pytest.approx((3 * 0.75 + 2 * 0.5) / 5)
    low, high = found["interval"]
    assert 0.5 <= low < 0.65 < high <= 0.75
    assert win_rate(before, before, everything(5)) == {"win_rate": 0.5, "interval": (0.5, 0.5)}


def test_paired_differences_by_hand():
    """Gains of 1, 2 and 3 per prompt; the spread between prompts cancels."""
    before = np.array([[0.0, 0.0], [50.0, 50.0], [-90.0, -90.0]] * 2)
    after = before + np.array([[1.0, 1.0], [1.0, 3.0], [3.0, 3.0]] * 2)
    found = paired(before, after, everything(6))
    assert (found["sft"], found["ppo"], found["gain"]) == pytest.approx((-40 / 3, -34 / 3, 2.0))
    low, high = found["interval"]
    assert 1.0 <= low < 2.0 < high <= 3.0
    same = paired(before, before, everything(6))
    assert same["gain"] == 0 and same["interval"] == (0, 0)


def test_clusters_are_drawn_whole():
    """Ten prompts of five keys: what a key gains both of its prompts gain, so the interval is a key's."""
    after = np.repeat([0.0, 0.0, 0.0, 1.0, 1.0], 2)[:, None]
    pairs, single = (
        paired(np.zeros((10, 1)), after, everything(10, clusters))["interval"]
        for clusters in (np.repeat(range(5), 2), None)
    )
    assert pairs[1] - pairs[0] > single[1] - single[0]
    assert paired(np.zeros((10, 1)), after, everything(10, [0] * 10))["interval"] is None, "one cluster"


def answers(*texts):
    return Answers(
        [[[5, 1]] * len(t) for t in texts], [list(t) for t in texts], np.zeros((len(texts), len(texts[0])))
    )


ROWS = [
    {"kind": "sums", "expected": "4"},
    {"kind": "dates", "expected": "May"},
    {"kind": None, "expected": None},
]


def test_correctness_by_hand():
    before = answers(("`4`", "`5`"), ("`June`", "May"), ("`1`", "`2`"))
    after = answers(("`4`", "`4`"), ("`May`", "`May`"), ("`1`", "`2`"))
    found = correctness(before, after, ROWS, everything(3))
    assert list(found) == ["all", "dates", "sums"]
    means = {kind: (f["prompts"], f["sft"], f["ppo"], f["gain"]) for kind, f in found.items()}
    assert means == {"all": (2, 0.25, 1.0, 0.75), "dates": (1, 0.0, 1.0, 1.0), "sums": (1, 0.5, 1.0, 0.5)}
    assert found["all"]["interval"] is None, "two clusters"
    found = correctness(*(answers(*each.texts * 4) for each in (before, after)), ROWS * 4, everything(12))
    low, high = found["all"]["interval"]
    assert found["all"]["gain"] == 0.75 and 0.5 <= low < 0.75 < high <= 1
    assert found["dates"]["interval"] is None, "four clusters"


def test_without_anything_expected_there_is_no_correctness():
    some = answers(("`4`",))
    assert correctness(some, some, [{"kind": "sums", "expected": None}], everything(1)) is None
    assert not answers(("`None`",)).right([None]).any()


def test_a_table_keeps_its_columns():
    sample = {
        "question": "a|b\nc",
        "sft": " x ",
        "ppo": "y" * 500,
        "sft_score": 1.0,
        "ppo_score": -0.5,
        "expected": None,
    }
    lines = render_table([sample]).split("\n")
    assert len(lines) == 3 and lines[2].startswith("| a\\|b<br>c | x | 1.00 | yyy")
    assert "y" * 400 + " |" in lines[2] and lines[2].endswith("| -0.50 |  |")
    found = {"all": {"prompts": 2, "sft": 0.25, "ppo": 1.0, "gain": 0.75, "interval": (0.5, 1.0)}}
    assert (
        render_correctness("greedy", found).split("\n")[2]
        == "| all | 2 | 0.250 | 1.000 | +0.750 | [+0.500, +1.000] |"
    )

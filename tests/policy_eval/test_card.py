"""What is measured on responses: by hand."""

from __future__ import annotations

import numpy as np
import pytest

from tasks.policy_eval.card import (
    Answers,
    correctness,
    describe,
    paired,
    render_correctness,
    render_table,
    win_rate,
)
from tasks.run.stated import states


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


def test_describe_by_hand():
    found = describe(Answers([[[5, 5, 1]], [[5, 6]]], [["a"], ["b"]], np.array([[1.0], [4.0]])), 1)
    assert found == {
        "score": 2.5, "response_tokens": 2.5, "eos_rate": 0.5, "distinct_1": 3 / 5, "distinct_2": 1.0,
        "repetition_3": 0.0,
    }  # fmt: skip


def test_win_rate_counts_a_tie_half():
    before = np.array([[1.0, 2.0], [3.0, 0.0]])
    after = np.array([[2.0, 2.0], [1.0, 5.0]])
    found = win_rate(before, after, 200, 0)
    assert found["win_rate"] == pytest.approx((1 + 0.5 + 0 + 1) / 4)
    assert found["interval"] == (0.5, 0.75), "two prompts: ½, ⅝ or ¾"
    assert win_rate(before, before, 50, 0) == {"win_rate": 0.5, "interval": (0.5, 0.5)}


def test_paired_differences_by_hand():
    """Gains of 1, 2 and 3 per prompt; the spread between prompts cancels."""
    before = np.array([[0.0, 0.0], [50.0, 50.0], [-90.0, -90.0]])
    after = before + np.array([[1.0, 1.0], [1.0, 3.0], [3.0, 3.0]])
    found = paired(before, after, 500, 0)
    assert (found["sft"], found["ppo"], found["gain"]) == pytest.approx((-40 / 3, -34 / 3, 2.0))
    low, high = found["interval"]
    assert 1.0 <= low < 2.0 < high <= 3.0
    same = paired(before, before, 50, 0)
    assert same["gain"] == 0 and same["interval"] == (0, 0)


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
    found = correctness(before, after, ROWS, 100, 0)
    assert list(found) == ["all", "dates", "sums"]
    means = {kind: (f["prompts"], f["sft"], f["ppo"], f["gain"]) for kind, f in found.items()}
    assert means == {"all": (2, 0.25, 1.0, 0.75), "dates": (1, 0.0, 1.0, 1.0), "sums": (1, 0.5, 1.0, 0.5)}
    assert found["all"]["interval"] == (0.5, 1.0)


def test_without_anything_expected_there_is_no_correctness():
    some = answers(("`4`",))
    assert correctness(some, some, [{"kind": "sums", "expected": None}], 100, 0) is None
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
        == "| all | 2 | 0.250 | 1.000 | +0.750 | +0.500 – +1.000 |"
    )

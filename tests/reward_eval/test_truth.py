"""Right beside wrong answers by hand on ten pairs, by style, kind and wording; who may be called a judge."""

from __future__ import annotations

import numpy as np
import pytest
from cases import NO_RULE, answer, group

from params.schema import RewardEvalParams
from tasks.reward_eval.card import report, summary
from tasks.reward_eval.judge import beside
from tasks.reward_eval.measures import margins_of, partitions
from tasks.reward_eval.page import render
from tasks.reward_eval.pairs import lay_out
from tasks.reward_eval.truth import against_style, right_beats_wrong

STYLES = {  # of the right and the wrong answer, question by question
    "against truth": [("padded", "clear"), ("plain", "clear"), ("padded", "plain"), ("plain", "clear")],
    "same style": [("clear", "clear"), ("plain", "plain"), ("padded", "padded")],
    "with truth": [("clear", "plain"), ("clear", "padded"), ("plain", "padded")],
}


def told(number: int, right: str, wrong: str, **known) -> dict:
    """Votes say that the wrong answer is better in every second question."""
    votes = number % 2
    answers = [answer(2 - votes, "It is `4`."), answer(1 + votes, "It is `5`.")]
    for each, style in zip(answers, (right, wrong), strict=True):
        each["style"] = style
    pair = [[1, 0]] if votes else []
    pair = pair or [[0, 1]]
    usual = {"expected": "4", "kind": "sums", "wording": "known", "cluster": f"c{number}"}
    return group(number, answers, pair) | usual | known


def ten(**known) -> list[dict]:
    pairs = [styles for of_relation in STYLES.values() for styles in of_relation]
    return [told(n, *styles, **known) for n, styles in enumerate(pairs)]


def test_ten_pairs_by_hand():
    """Right in 1 of 4 against style, 2 of 3 at the same, 3 of 3 with it; a tie is wrong."""
    won = [1, -1, 0, -1, 1, 1, -1, 1, 1, 1]
    held = lay_out(ten(), np.array([[float(w), 0.0] for w in won]).ravel())
    assert held.truths.tolist() == [[2 * n, 2 * n + 1] for n in range(10)], "whatever their votes"
    found = right_beats_wrong(held, {"reward_model": held.scores, "judge": -held.scores}, 100, 0)
    shares = {name: (part["pairs"], part["reward_model"]["right"]) for name, part in found["style"].items()}
    wanted = {"against truth": (4, 0.25), "same style": (3, 2 / 3), "with truth": (3, 1.0)}
    assert shares == {name: (pairs, pytest.approx(share)) for name, (pairs, share) in wanted.items()}
    everything = found["all"]["all"]
    assert (everything["pairs"], everything["clusters"]) == (10, 10)
    assert everything["reward_model"]["right"] == 0.6 and everything["judge"]["right"] == pytest.approx(0.3)
    low, high = everything["reward_model"]["interval"]
    assert 0.2 < low < 0.6 < high <= 1 and found["style"]["same style"]["judge"]["interval"] is None
    assert found["kind"] == {"sums": everything} and found["wording"] == {"known": everything}
    assert against_style(found, "reward_model") == 0.25 and against_style(found, "judge") == 0.5


def test_style_alone_on_ten_pairs():
    """By votes the right answer is better in every even question: style says so of 4 of 10, of 3 nothing."""
    groups = ten()
    held = lay_out(groups, np.zeros(20))
    margins = margins_of(held, NO_RULE)["style"]
    truth = [-2, -1, -1, -1, 0, 0, 0, 1, 2, 1]
    assert margins.tolist() == [(-1) ** n * margin for n, margin in enumerate(truth)]
    found = report(held, groups, NO_RULE, RewardEvalParams(bootstrap_samples=100), 0)["rules"]["style"]
    right, ties = sum(m > 0 for m in margins), 3
    assert found["credit"] == pytest.approx((right + ties / 2) / 10) and found["ties"] == 0.3


def test_a_style_that_is_not_known_is_a_tie_and_none_is_no_rule():
    groups = [told(0, "clear", "plain"), told(2, None, "plain"), told(4, None, None)]
    assert margins_of(lay_out(groups, np.zeros(6)), NO_RULE)["style"].tolist() == [1, 0, 0]
    assert "style" not in margins_of(lay_out(groups[2:], np.zeros(2)), NO_RULE)
    found = right_beats_wrong(lay_out(groups, np.zeros(6)), {"judge": np.zeros(6)}, 100, 0)
    assert found["all"]["all"]["pairs"] == 3 and [*found["style"]] == ["with truth"]


def test_parts_by_kind_and_wording_where_they_are_known():
    groups = [told(0, "clear", "plain"), told(1, "clear", "plain", kind="dates", wording="new")]
    found = partitions(lay_out(groups, np.zeros(4)))
    assert {part: chosen.tolist() for part, chosen in found["kind"].items()} == {
        "dates": [False, True], "sums": [True, False],
    }  # fmt: skip
    assert [*found["wording"]] == ["known", "new"]
    unknown = partitions(lay_out([told(0, "clear", "plain", kind=None, wording=None)], np.zeros(2)))
    assert "kind" not in unknown and "wording" not in unknown


def test_nothing_is_said_of_truth_where_none_is_known():
    held = lay_out(ten(expected=None), np.zeros(20))
    assert right_beats_wrong(held, {"judge": held.scores}, 100, 0) is None
    all_right = lay_out(ten(expected="7"), np.zeros(20))
    assert right_beats_wrong(all_right, {"judge": all_right.scores}, 100, 0) is None, "nobody states it"


@pytest.mark.parametrize(("won", "is_judge"), [(0, False), (2, False), (3, True), (4, True)])
def test_a_judge_of_style_is_no_judge(won, is_judge):
    """Of four pairs with style against truth three are the fewest that make .7."""
    groups = ten()
    held = lay_out(groups, np.tile([1.0, 0.0], 10))
    judged = np.array([[1.0, 0.0] if n < won or n > 3 else [0.0, 1.0] for n in range(10)]).ravel()
    card = report(held, groups, NO_RULE, RewardEvalParams(bootstrap_samples=100), 0)
    card["truth"] = right_beats_wrong(held, {"reward_model": held.scores, "judge": judged}, 100, 0)
    card["judge"] = beside(held, judged, judged, card["truth"], 100, 0)
    assert card["judge"]["is_judge"] is is_judge and card["judge"]["style_against_truth"] == won / 4
    assert summary(card)["judge_style_against_truth"] == won / 4
    assert ("is no judge" in render(card)) is not is_judge


def test_a_judge_by_hand():
    """Margins 1, −1, 0 of the reward model; the judge is right for the first and the last."""
    groups = [group(n, [answer(1), answer(0)], [[0, 1]]) for n in range(3)]
    held = lay_out(groups, np.array([1.0, 0, -1, 0, 0, 0]))
    judged, cut = np.array([2.0, 0, -1, 0, 3, 0]), np.array([2.0, 0, -1, 0, -3, 0])
    assert beside(held, judged, cut, None, 100, 0) == {
        "accuracy": pytest.approx(2 / 3), "interval": None, "accuracy_without_eos": pytest.approx(1 / 3),
        "of_mistakes": 0.5, "style_against_truth": None, "is_judge": True,
    }  # fmt: skip
    sure = lay_out(groups, np.tile([1.0, 0.0], 3))
    assert beside(sure, np.zeros(6), np.zeros(6), None, 100, 0)["of_mistakes"] is None

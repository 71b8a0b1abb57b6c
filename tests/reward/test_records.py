"""Groups: what a batch of them is, and each thing that may be wrong with one."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest

from tasks.reward import NOTHING, GroupedAnswers, collate
from tasks.reward.records import check, cut

FIRST = GroupedAnswers((5, 6), ((7, 1), (8, 9, 1)), ((1, 0),), name="a")
SECOND = GroupedAnswers((4,), ((3, 1), (2,), (9,)), ((0, 1), (2, 1)), (0.5, 3.0), (1.0, 2.0), "b")
GOOD = GroupedAnswers((), ((3, 4),), ((0, NOTHING),), name="c")


def test_collate_by_hand():
    found = collate([FIRST, SECOND])
    forest = found["forest"]
    assert forest.tokens.tolist() == [5, 6, 7, 1, 8, 9, 1, 4, 3, 1, 2, 9]
    assert forest.positions.tolist() == [0, 1, 2, 3, 2, 3, 4, 0, 1, 2, 1, 1]
    assert found["answers"] == [1, 2, 4, 5, 6]
    assert found["pairs"].tolist() == [[1, 0], [2, 3], [4, 3]]
    assert found["weights"].tolist() == [1, 0.5, 3]
    assert found["gaps"].tolist() == [0, 1, 2]
    assert found["longer"].tolist() == pytest.approx([math.log(1.5), math.log(2), 0])
    assert found["names"] == ["a", "b", "b"]
    assert found["labels"].tolist() == [0, 0, 0]


def test_questions_that_weigh_the_same_by_hand():
    found = collate([FIRST, SECOND], weigh="question")
    assert found["weights"].tolist() == [1, 0.25, 1.5]
    assert found["labels"].tolist() == [0, 0]


def test_an_encoder_reads_each_answer_with_its_question():
    found = collate([FIRST, GOOD], is_causal=False)
    assert found["forest"].tokens.tolist() == [5, 6, 7, 1, 5, 6, 8, 9, 1, 3, 4]
    assert found["forest"].starts == (0, 4, 9) and found["forest"].parents == (-1, -1, -1)
    assert found["answers"] == [0, 1, 2]


def test_a_response_without_prompt_is_a_root_and_nothing_scores_nothing():
    found = collate([FIRST, GOOD, replace(GOOD, pairs=((NOTHING, 0),))])
    assert found["forest"].parents == (-1, 0, 0, -1, -1)
    assert found["pairs"].tolist() == [[1, 0], [2, -1], [-1, 3]]
    assert found["longer"].tolist()[1:] == [0, 0]


def test_tokens():
    assert FIRST.tokens() == 7 and FIRST.tokens(is_causal=False) == 9


def test_cut_by_hand():
    assert cut(SECOND, 2, keep_last=False).responses == ((3,), (2,), (9,))
    assert cut(FIRST, 4, keep_last=False).responses == ((7, 1), (8, 9))
    assert cut(FIRST, 4, keep_last=True).responses == ((7, 1), (8, 1))
    assert cut(FIRST, 5, keep_last=True) == FIRST == cut(FIRST, 5, keep_last=False)
    for most, keep_last in ((2, False), (3, True)):
        with pytest.raises(ValueError, match=f"prompt's 2 tokens leave no room within {most}"):
            cut(FIRST, most, keep_last)


@pytest.mark.parametrize("group", [FIRST, SECOND, GOOD])
def test_what_is_right_passes(group):
    check(group, 10, 5)
    check(group, 10, None)


NAN, INF = math.nan, math.inf


@pytest.mark.parametrize(
    ("wrong", "says"),
    [
        (replace(FIRST, pairs=()), "no pair: it has one answer, or only ties"),
        (GroupedAnswers((5,), ((7,),), ()), "no pair"),
        (replace(FIRST, responses=((7, 1), ())), "response 1 is empty"),
        (replace(FIRST, responses=((7, 1), (7, 1))), "responses 1 and 0 of a pair are the same tokens"),
        (replace(FIRST, responses=((7, 1), (8, 9, 2, 1))), r"response 1 ends at token 6, .* room for 5"),
        (replace(FIRST, prompt=(5, 10)), "token 10 is none of the model's 10"),
        (replace(FIRST, responses=((7, -1), (8,))), "token -1 is none"),
        (replace(FIRST, pairs=((1, 1),)), r"\(1, 1\) is no pair of its 2"),
        (replace(FIRST, pairs=((NOTHING, NOTHING),)), "is no pair"),
        (replace(FIRST, pairs=((2, 0),)), "is no pair"),
        (replace(FIRST, pairs=((-2, 0),)), "is no pair"),
        (replace(SECOND, weights=(1.0,)), "1 weights for 2 pairs"),
        (replace(SECOND, gaps=(1.0, 1.0, 1.0)), "3 gaps for 2 pairs"),
        (replace(SECOND, weights=(1.0, NAN)), "weights .*finite numbers of at least 0"),
        (replace(SECOND, weights=(1.0, -0.5)), "weights .*finite numbers of at least 0"),
        (replace(SECOND, gaps=(INF, 1.0)), "gaps .*finite numbers of at least 0"),
    ],
)
def test_what_is_wrong_is_refused(wrong, says):
    with pytest.raises(ValueError, match=says):
        check(wrong, 10, 5)


def test_two_same_answers_that_are_no_pair_are_two_answers():
    check(GroupedAnswers((5,), ((7,), (7,), (8,)), ((0, 2), (1, 2))), 10, None)

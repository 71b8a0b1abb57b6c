"""The gate holds lower ends of intervals against the bars, and says figure, interval and key in one line."""

from __future__ import annotations

import numpy as np
import pytest
from cases import NO_RULE, answer, group

from params.schema import RewardEvalParams
from tasks.reward_eval.card import report
from tasks.reward_eval.gate import verdict
from tasks.reward_eval.pairs import lay_out

BARS = RewardEvalParams(min_accuracy=0.8, min_margin=0.1, bootstrap_samples=100)


def card(accuracy=(0.9, 0.88, 0.92), margin=(0.2, 0.15, 0.25)):
    bounds = [None if each[1] is None else each[1:] for each in (accuracy, margin)]
    own = {"accuracy": accuracy[0], "interval": bounds[0]}
    rules = {"reward_model": own}
    return {"rules": rules, "margin": margin[0], "margin_interval": bounds[1], "best_text_rule": "longer"}


@pytest.mark.parametrize(
    ("found", "says"),
    [
        (card(), "passed"),
        (card(accuracy=(0.85, 0.8, 0.9), margin=(0.2, 0.1, 0.3)), "passed"),
        (
            card(accuracy=(0.85, 0.7999, 0.9)),
            "accuracy 0.850 [0.800, 0.900] begins below reward_eval.min_accuracy 0.8",
        ),
        (
            card(margin=(0.15, 0.0999, 0.2)),
            "margin +0.150 over 'longer' [+0.100, +0.200] begins below reward_eval.min_margin 0.1",
        ),
        (
            card(accuracy=(1.0, None, None)),
            "accuracy 1.000 has no interval, of fewer than 5 clusters, for reward_eval.min_accuracy 0.8",
        ),
    ],
)
def test_verdicts(found, says):
    assert verdict(found, BARS) == says


def test_a_model_no_better_than_longer_is_refused_at_a_margin_of_0():
    """.644 against .641, lead [−.037, +.043]: as good as *longer*, as far as anyone can tell."""
    bars = RewardEvalParams(min_accuracy=0.55, min_margin=0.0)
    found = card(accuracy=(0.644, 0.61, 0.68), margin=(0.003, -0.037, 0.043))
    reached = "margin +0.003 over 'longer' [-0.037, +0.043]"
    assert verdict(found, bars) == f"{reached} begins below reward_eval.min_margin 0.0"


def test_bars_that_all_reach_ask_for_no_interval():
    bars = RewardEvalParams(min_accuracy=0.0, min_margin=-1.0)
    assert verdict(card(accuracy=(0.1, None, None), margin=(-0.9, None, None)), bars) == "passed"


def test_one_cluster_behind_many_questions_convinces_nobody():
    """100 questions, all right: as one thing asked a hundred times they are no evidence, apart they are."""
    groups = [group(n, [answer(1, "x"), answer(0, "yy")], [[0, 1]]) for n in range(100)]
    scores = np.tile([1.0, 0.0], 100)
    assert report(lay_out(groups, scores), groups, NO_RULE, BARS, 0)["verdict"] == "passed"
    alike = [each | {"cluster": "one"} for each in groups]
    found = report(lay_out(alike, scores), alike, NO_RULE, BARS, 0)
    assert "has no interval" in found["verdict"] and (found["questions"], found["clusters"]) == (100, 1)

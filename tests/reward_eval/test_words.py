"""The answer-only rule: n-grams and coefficients by hand, its own conditions, and what it may not see."""

from __future__ import annotations

import numpy as np
import pyarrow as pa
import pytest
from cases import NO_RULE, answer, group
from pyarrow import parquet

from params.schema import RewardEvalParams
from tasks.pack.records import GROUPS
from tasks.reward_eval import words
from tasks.reward_eval.card import report, summary
from tasks.reward_eval.pairs import lay_out
from tasks.reward_eval.words import COLUMNS, columns, fit_words, grams, marked, word_rule
from tasks.run.text_rule import fit_logistic, sigmoid


def write(path, groups):
    parquet.write_table(pa.Table.from_pylist([g | {"is_validation": False} for g in groups], GROUPS), path)
    return path


def ten(better: str = "I say `4`.", worse: str = "it is `4`", wins: int = 8) -> list[dict]:
    """Ten pairs, of which the first wording wins so many."""
    return [
        group(n, [answer(2 * (n < wins), better), answer(1, worse)], [[0, 1] if n < wins else [1, 0]])
        for n in range(10)
    ]


def test_grams_by_hand():
    assert grams("I say: `4`.") == {
        "i", "say", ":", "`", "4", ".", "i say", "say :", ": `", "` 4", "4 `", "` .",
    }  # fmt: skip
    assert grams("") == set() and grams("so SO so") == {"so", "so so"}
    assert grams("a " * 5000) == {"a", "a a"} and len(grams(" ".join(map(str, range(9000))))) == 1999
    assert columns("a b") == sorted(columns("b") + columns("a") + [c for c in columns("a b") if c not in
                                                                   columns("a") + columns("b")])  # fmt: skip
    assert marked(["a b", "", "a"]).sum(1).tolist() == [3, 0, 1]


def test_ten_pairs_by_hand(tmp_path):
    """Every n-gram of one wording but not of the other has the same weight c: 8 of 10 right, d = 11 c.

    8 σ(−d) − 2 σ(d) = c for each of the n-grams that tell them apart, up to sign.
    """
    path = write(tmp_path / "r.parquet", ten())
    rule = word_rule(path)
    apart = grams("I say `4`.") ^ grams("it is `4`")
    (weight,) = {round(abs(float(rule.coefficients[columns(g)[0]])), 5) for g in apart if " " not in g}
    lead = float(np.subtract(*rule.scores(["I say `4`.", "it is `4`"])))
    assert lead == pytest.approx(len(apart) * weight, rel=1e-3)
    assert 8 * sigmoid(-lead) - 2 * sigmoid(lead) == pytest.approx(weight, abs=2e-3)
    assert (rule.pairs, rule.questions) == (10, 10)
    assert rule.coefficients[columns("4")[0]] == 0, "both wordings have it"
    assert rule.scores(["never seen"]).tolist() == [0]


def test_the_fit_is_that_of_the_dense_rule():
    draw = np.random.default_rng(0)
    texts = [" ".join(draw.choice(list("abcdefg"), 4)) for _ in range(60)]
    pairs, weights = draw.permuted(np.arange(60)).reshape(-1, 2), draw.integers(1, 4, 30)
    found = fit_words(marked(texts), pairs, weights)
    dense = marked(texts).toarray()
    seen = dense.any(0)
    wanted = fit_logistic(dense[pairs[:, 0]][:, seen] - dense[pairs[:, 1]][:, seen], weights)
    assert found[seen] == pytest.approx(wanted, abs=1e-3) and not found[~seen].any()
    assert found.shape == (COLUMNS,)


def test_it_is_blind_to_the_question(tmp_path):
    groups = ten()
    other = [each | {"question": f"Something else, {n}?"} for n, each in enumerate(groups)]
    own, again = (word_rule(write(tmp_path / f"{n}.parquet", g)) for n, g in enumerate((groups, other)))
    assert np.array_equal(own.coefficients, again.coefficients)


def test_weights_count_and_ties_and_many_questions_do_not(tmp_path):
    groups = ten(wins=5)
    for each in groups[5:]:
        each["weights"] = [0.25]
    groups.append(group(10, [answer(1, "tie"), answer(1, "tied")], []))
    rule = word_rule(write(tmp_path / "r.parquet", groups))
    assert np.subtract(*rule.scores(["I say `4`.", "it is `4`"])) > 0.3 and rule.questions == 10
    many = [group(n, [answer(1, f"w{n}"), answer(0)], [[0, 1]]) for n in range(400)]
    assert 60 < word_rule(write(tmp_path / "m.parquet", many), 100).questions < 140
    assert words.QUESTIONS_READ > 7500, "all of the default run"


def test_no_training_pair_is_an_error_that_names_the_file(tmp_path):
    path = write(tmp_path / "r.parquet", [group(1, [answer(1), answer(1)], [])])
    with pytest.raises(ValueError, match=r"r\.parquet holds no pair to fit the answer-only rule"):
        word_rule(path)


def test_the_leading_grams():
    rule = words.WordRule(np.zeros(COLUMNS), 1, 1)
    for gram, value in (("good", 2.0), ("fine", 1.0), ("bad", -1.0)):
        rule.coefficients[columns(gram)] = value
    assert rule.leading(["fine good"], 1) == [("good", 2.0)]
    assert rule.leading(["bad fine", "good other"]) == [("good", 2.0), ("fine", 1.0), ("bad", -1.0)]


def test_the_gate_reads_the_lead_over_it(tmp_path):
    """A model that only knows the wording: right in 8 of 10, as the rule is, and no lead is left."""
    groups = ten("say `4`", "see `4`")
    rule = word_rule(write(tmp_path / "r.parquet", groups))
    held = lay_out(groups, np.tile([1.0, 0.0], 10))
    card = report(held, groups, NO_RULE, RewardEvalParams(bootstrap_samples=100), 0, rule)
    assert card["rules"]["answer_only"]["credit"] == card["rules"]["reward_model"]["credit"] == 0.8
    assert (card["best_text_rule"], card["margin"]) == ("answer_only", 0.0)
    assert summary(card)["answer_only_accuracy"] == 0.8
    assert card["answer_only_rule"]["pairs"] == 10 and card["answer_only_rule"]["leading"]

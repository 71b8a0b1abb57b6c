"""Text features by hand; the logistic regression against its own conditions; training pairs are streamed."""

from __future__ import annotations

from math import log, log1p

import numpy as np
import pyarrow as pa
import pytest
from cases import answer, group
from pyarrow import parquet

from tasks.lm.heads.frozen_style import COUNTED as FEATURES
from tasks.lm.heads.frozen_style import text_features
from tasks.pack.records import GROUPS
from tasks.reward_eval import rules
from tasks.reward_eval.rules import training_differences
from tasks.run import text_rule
from tasks.run.text_rule import fit_logistic, fit_rule, sigmoid


@pytest.mark.parametrize(
    ("text", "blocks", "links", "paragraphs", "words"),
    [
        ("", 0, 0, 1, 0),
        ("Use it.", 0, 0, 1, 2),
        ("it It IT, *use*!", 0, 0, 1, 2),
        ("user units", 0, 0, 1, 0),
        ("a\n\nb\n \t\nc\nd\n\n", 0, 0, 3, 0),
        ("```\nx\n```\n\n```py\ny\n```", 2, 0, 2, 0),
        ("   ```\nx\n   ```\n    ```\n", 1, 0, 1, 0),
        ("not ``` a ``` block", 0, 0, 1, 1),
        ("[use](http://x.y) <https://z> ftp://no", 0, 2, 1, 1),
    ],
)
def test_text_features_by_hand(text, blocks, links, paragraphs, words):
    counts = (len(text), blocks, links, paragraphs, words)
    assert text_features("How do I use it, block?", text) == [log1p(count) for count in counts]
    assert len(FEATURES) == 5


def fit(x: np.ndarray, ridge: float = 1.0) -> np.ndarray:
    return fit_logistic(x, np.ones(len(x)), ridge)


def test_logistic_by_hand():
    """Three of four pairs have the larger x first: σ(c) = 3/4. The second feature, apart: 4/5 at x = 2."""
    x = np.array([[1.0, 0.0]] * 3 + [[-1.0, 0.0]] + [[0.0, 2.0]] * 4 + [[0.0, -2.0]])
    assert fit(x, ridge=0) == pytest.approx([log(3), log(4) / 2])
    (c,) = fit(np.ones((1, 1)))
    assert c == pytest.approx(0.4010581375, abs=1e-9), "σ(−c) = c at ridge 1"


def correlated(pairs: int, coefficients, seed: int = 0) -> np.ndarray:
    """Differences of correlated features whose better answer was drawn by a Bradley-Terry model."""
    draw = np.random.default_rng(seed)
    x = draw.normal(size=(pairs, len(coefficients))) @ draw.normal(size=(len(coefficients),) * 2)
    return np.where(draw.random(pairs) < sigmoid(x @ coefficients), 1, -1)[:, None] * x


def test_logistic_is_where_the_gradient_vanishes_and_finds_the_truth():
    x = correlated(20_000, [0.5, -1.0, 0.0])
    for ridge in (0.0, 1.0, 300.0):
        c = fit(x, ridge)
        assert x.T @ (1 / (1 + np.exp(x @ c))) == pytest.approx(ridge * c, abs=1e-6)
    assert fit(x) == pytest.approx([0.5, -1.0, 0.0], abs=0.06), "about three standard errors"
    assert fit(-x) == pytest.approx(-fit(x)), "no answer comes first"
    assert fit(x[np.random.default_rng(1).permutation(len(x))]) == pytest.approx(fit(x))


def test_newtons_steps_are_few(monkeypatch):
    monkeypatch.setattr(text_rule, "NEWTON_STEPS", 6)
    x, weights = correlated(2000, [1.0, -2.0]), np.arange(2000) % 5
    c = fit_logistic(x, weights)
    assert x.T @ (weights * sigmoid(-(x @ c))) == pytest.approx(c, abs=1e-6)


def test_a_pair_of_weight_two_is_two_pairs():
    x = correlated(300, [0.5, -1.0])
    weights = np.random.default_rng(2).integers(0, 4, 300)
    assert fit_logistic(x, weights) == pytest.approx(fit(np.repeat(x, weights, axis=0)))


def test_separable_pairs_have_finite_coefficients():
    (c,) = fit(np.full((100_000, 1), 1.0))
    assert 9 < c < 10 and 100_000 * sigmoid(-c) == pytest.approx(c)
    assert fit(np.zeros((9, 2))).tolist() == [0, 0], "nothing differs, nothing is learnt"


def test_sigmoid_does_not_overflow():
    with np.errstate(all="raise", under="ignore"):
        assert sigmoid(np.array([-1e4, 0.0, 1e4])).tolist() == [0, 0.5, 1]


def test_the_unit_of_a_feature_does_not_matter():
    x, weights = correlated(500, [0.5, -1.0]), np.arange(500) % 3
    rule, other = fit_rule(x, weights, 7), fit_rule(x * [1000.0, 1.0], weights, 7)
    assert other.standardised == pytest.approx(rule.standardised)
    assert other.coefficients == pytest.approx(rule.coefficients / [1000, 1])
    assert rule.coefficients * rule.scales == pytest.approx(rule.standardised)
    assert rule.standardised == pytest.approx(fit_logistic(x / rule.scales, weights))
    assert rule.scales == pytest.approx(np.sqrt((x**2).mean(0))) and (rule.pairs, rule.questions) == (500, 7)


def test_a_feature_that_never_differs_counts_for_nothing():
    rule = fit_rule(np.array([[1.0, 0.0]] * 3 + [[-1.0, 0.0]]), np.ones(4), 4)
    assert rule.coefficients[0] > 0 and rule.coefficients[1] == 0 and rule.scales.tolist() == [1, 1]


def write(path, groups):
    rows = [g | {"is_validation": False} for g in groups]
    parquet.write_table(pa.Table.from_pylist(rows, schema=GROUPS), path, row_group_size=100)
    return path


def test_training_differences_by_hand(tmp_path):
    texts = ["it", "what\n\nhttp://x"]
    first = group(1, [answer(1, texts[0]), answer(2, texts[1])], [[1, 0]])
    ties = group(2, [answer(1, "a"), answer(1, "b")], [])
    third = group(3, [answer(3, texts[0]), answer(2, texts[1]), answer(1, "")], [[0, 1], [0, 2]])
    third["weights"] = [0.5, 2.0]
    found, weights, questions = training_differences(write(tmp_path / "r.parquet", [first, ties, third]))
    one, two, none = (np.array(text_features("What is it?", text)) for text in (*texts, ""))
    assert questions == 2 and weights.tolist() == [1, 0.5, 2]
    assert found == pytest.approx(np.array([two - one, one - two, one - none]))


def test_of_many_questions_a_share_is_read(tmp_path):
    """2,000 questions, a quarter wanted: 500 ± 19 (one standard deviation); row order does not choose."""
    groups = [group(n, [answer(2, "x" * n), answer(1)], [[0, 1]]) for n in range(2000)]
    everything, _, questions = training_differences(write(tmp_path / "a.parquet", groups))
    assert questions == len(everything) == 2000, "over many batches and row groups"
    some, weights, count = training_differences(tmp_path / "a.parquet", 500)
    again, _, _ = training_differences(write(tmp_path / "b.parquet", groups[::-1]), 500)
    assert len(some) == len(weights) == count and 430 < count < 570
    assert {*some[:, 0]} <= {*everything[:, 0]} and sorted(again[:, 0]) == sorted(some[:, 0])
    assert rules.QUESTIONS_READ > 7000, "all of the default run"


def test_no_training_pair_is_an_error_that_names_the_file(tmp_path):
    path = write(tmp_path / "r.parquet", [group(1, [answer(1), answer(1)], [])])
    with pytest.raises(ValueError, match=r"r\.parquet holds no pair to fit"):
        training_differences(path)

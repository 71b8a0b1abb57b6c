"""Weights that take exposure out of preferences: by hand, by identity, and through the stage."""

from __future__ import annotations

import math

import numpy as np
import pyarrow as pa
import pytest
import tiny
from pyarrow import parquet

from tasks.pack import run
from tasks.pack.exposure import LEAST_PROBABILITY, ahead, balancing_weights, weighted
from tasks.pack.records import GROUPS


def groups(*posted_and_pairs) -> pa.Table:
    """Questions of (hours of their answers or None, pairs)."""
    rows = [
        {
            "answers": [
                {"created": "" if h is None else f"2020-01-0{1 + h // 24}T{h % 24:02d}:00:00.000"}
                for h in hours
            ],
            "pairs": pairs,
            "weights": [1.0] * len(pairs),
        }
        for hours, pairs in posted_and_pairs
    ]
    return pa.Table.from_pylist(rows, schema=GROUPS)


def test_what_is_ahead_by_hand():
    table = groups(
        ([0, 1, 3], [[0, 2], [2, 1]]),
        ([30, 5], []),
        ([7, 7, 2], [[0, 1], [1, 2]]),  # posted together
        ([None, 4], [[1, 0]]),
    )
    assert ahead(table).tolist() == [
        [1, pytest.approx(math.log(4)), 2],
        [-1, pytest.approx(-math.log(3)), -1],
        [0, 0, 0],
        [-1, pytest.approx(-math.log(6)), -1],
        [0, 0, 0],
    ]


def test_of_a_slice_it_is_the_slice():
    whole = groups(([0, 1, 3], [[0, 2], [2, 1]]), ([30, 5], [[0, 1]]), ([7, 9], [[1, 0]]))
    assert ahead(whole.slice(1)).tolist() == ahead(whole).tolist()[2:]


def test_three_of_four_by_hand():
    """The earlier answer wins three of four: P = 3/4 and 1/4."""
    found = balancing_weights(np.array([[1.0], [1.0], [1.0], [-1.0]]))
    assert found == pytest.approx([2 / 3, 2 / 3, 2 / 3, 2])


def drawn(count: int, seed: int) -> np.ndarray:
    """Pairs whose winner hangs on exposure in a way that no logistic model has."""
    draw = np.random.default_rng(seed)
    hours, order = draw.exponential(50, count), draw.integers(1, 4, count)
    first = draw.random(count) < 0.55 + 0.3 * (hours > 20) - 0.1 * (order == 2)
    return np.stack([np.ones(count), np.log1p(hours), order], 1) * np.where(first, 1, -1)[:, None]


def fitted(x: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """The coefficients of a weighted logistic regression by maximum likelihood, in plain steps of Newton."""
    beta = np.zeros(x.shape[1])
    for _ in range(50):
        p = 1 / (1 + np.exp(-x @ beta))
        beta += np.linalg.solve(x.T @ (x * (weights * p * (1 - p))[:, None]), x.T @ (weights * (1 - p)))
    return beta


@pytest.mark.parametrize("seed", [0, 1])
def test_exposure_predicts_nothing_in_the_weighted_pairs(seed):
    x = drawn(4000, seed)
    weights = balancing_weights(x)
    assert abs(fitted(x, np.ones(len(x)))).max() > 0.3, "it predicts the winner of the pairs as they are"
    assert abs(fitted(x, weights)).max() < 1e-6
    assert weights[x[:, 0] > 0].sum() == pytest.approx(weights.sum() / 2), "the earlier wins every other pair"
    assert weights.mean() == pytest.approx(1)
    assert weights.max() / weights.min() < 1 / LEAST_PROBABILITY


def test_units_and_an_exposure_that_never_differs_change_nothing():
    x = drawn(500, 2)
    other = np.concatenate([x * [1, 60, 1e-3], np.zeros((500, 1))], axis=1)
    assert balancing_weights(other) == pytest.approx(balancing_weights(x), rel=1e-6)


def test_a_pair_that_does_not_differ_weighs_as_if_both_were_as_likely():
    x = np.array([[1.0], [1.0], [1.0], [-1.0], [0.0]])
    raw = np.array([4 / 3, 4 / 3, 4 / 3, 4, 2])
    assert balancing_weights(x) == pytest.approx(raw / raw.mean())


def test_a_rare_winner_weighs_no_more_than_the_clip():
    x = np.array([[1.0]] * 99 + [[-1.0]])
    found = balancing_weights(x)
    assert found[-1] / found[0] == pytest.approx(1 / LEAST_PROBABILITY / (100 / 99))


@pytest.mark.parametrize(
    ("x", "says"), [([[0.0], [0.0]], "no dates that differ"), ([[1.0], [2.0]], "every pair")]
)
def test_what_no_weights_can_balance_is_refused(x, says):
    with pytest.raises(ValueError, match=rf"^pack\.exposure: .*{says}"):
        balancing_weights(np.array(x))


def test_batches_change_nothing():
    pairs = [], [[1, 0], [0, 2]], [[0, 1], [2, 0], [1, 2]]
    table = groups(*(([0, n // 3, n], pairs[n % 3]) for n in range(3, 15) for _ in range(2)))
    (whole,) = weighted(lambda: iter([table]))
    parts = list(weighted(lambda: (table.slice(i, 10) for i in (0, 10, 20))))
    assert pa.concat_tables(parts).equals(whole) and whole.schema == GROUPS
    assert [len(w) for w in whole["weights"].to_pylist()] == [len(p) for p in table["pairs"].to_pylist()]
    assert np.concatenate(whole["weights"].to_pylist()) == pytest.approx(balancing_weights(ahead(table)))


def dated(splits: dict) -> dict:
    """Answers an hour apart; every other question's in the reverse order."""
    for question in (*splits["reward"], *splits["sft"]):
        for n, answer in enumerate(question["answers"]):
            hour = n if question["id"] % 2 else 9 - n
            answer["created"] = f"2020-01-02T{hour:02d}:00:00.000"
    return splits


@pytest.fixture(scope="module")
def packed(tmp_path_factory):
    """The stage under each of the three."""
    found = {}
    for exposure in ("any", "later_wins", "weighted"):
        layout = tiny.project(tmp_path_factory.mktemp(exposure), dated(tiny.splits()))
        run(tiny.params(pack={"exposure": exposure}), layout)
        found[exposure] = layout
    return found


def rows(layout, split="reward") -> list[dict]:
    return parquet.read_table(layout.artifact("pack", "groups", f"{split}.parquet")).to_pylist()


def test_the_stage_keeps_pairs_won_by_the_later_answer(packed):
    found = rows(packed["later_wins"])
    every = {
        (g["question_id"], *pair): g["answers"][pair[0]]["created"] > g["answers"][pair[1]]["created"]
        for g in rows(packed["any"])
        for pair in g["pairs"]
    }
    kept = {(g["question_id"], *pair) for g in found for pair in g["pairs"]}
    assert kept == {pair for pair, is_later in every.items() if is_later} and 0 < len(kept) < len(every)
    assert all(g["pairs"] and g["weights"] == [1.0] * len(g["pairs"]) for g in found)


def test_the_stage_weighs(packed):
    table = parquet.read_table(packed["weighted"].artifact("pack", "groups", "reward.parquet"))
    weights = np.concatenate(table["weights"].to_pylist())
    assert [len(g["weights"]) for g in rows(packed["weighted"])] == [
        len(g["pairs"]) for g in rows(packed["any"])
    ]
    x = ahead(table)
    assert len(set(weights)) > 1 and abs(x.sum(0)).min() > 1 and abs(weights @ x).max() < 1e-3
    assert table.drop_columns("weights").equals(
        parquet.read_table(packed["any"].artifact("pack", "groups", "reward.parquet")).drop_columns("weights")
    )


@pytest.mark.parametrize("exposure", ["later_wins", "weighted"])
def test_what_is_held_out_keeps_every_pair(packed, exposure):
    before, after = (tiny.digests(packed[name].artifact("pack")) for name in ("any", exposure))
    assert {name for name in before if before[name] != after[name]} == {
        "groups/reward.parquet",
        "groups/judge.parquet",
    }
    assert all(w == 1 for g in rows(packed[exposure], "eval") for w in g["weights"])


@pytest.mark.parametrize(
    ("exposure", "says"),
    [("later_wins", r"pack/groups/reward; .*pack\.exposure: later_wins leave no pair"),
     ("weighted", r"^pack\.exposure: the answers to reward's questions have no dates that differ")],
)  # fmt: skip
def test_without_dates_the_key_is_named(tmp_path, exposure, says):
    splits = tiny.splits()
    for answer in (a for q in splits["reward"] for a in q["answers"]):
        answer["created"] = ""
    layout = tiny.project(tmp_path, splits)
    with pytest.raises(ValueError, match=says):
        run(tiny.params(pack={"exposure": exposure}), layout)
    assert not tiny.digests(layout.artifact("pack"))

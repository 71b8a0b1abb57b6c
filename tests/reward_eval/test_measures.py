"""Rules by hand, ties apart, questions resampled whole; parts add up to the whole; correlations."""

from __future__ import annotations

import numpy as np
import pytest
from cases import NO_RULE, answer, drawn, group, one_pair_each

from tasks.reward_eval.measures import (
    accuracy,
    correlation,
    credits_of,
    interval,
    is_meta,
    length_correlations,
    margins_of,
    measure_parts,
    partitions,
    ranks,
)
from tasks.reward_eval.pairs import lay_out
from tasks.run.intervals import bootstrap
from tasks.run.text_rule import LogisticRule


def test_rules_by_hand():
    """The better answer: shorter and later with code; then as long, as old, both with code; then longer."""
    first = group(7, [answer(1, "a" * 90, 1), answer(4, "`" * 50, 2)], [[1, 0]])
    second = group(
        8, [answer(2, "`" * 30, 3), answer(1, "`" * 30, 3), answer(3, "a" * 31, 1)], [[0, 1], [2, 1]]
    )
    held = lay_out([first, second], [0.5, 0.75, 1.0, 1.0, -1.0])
    assert held.questions.tolist() == ["s/7", "s/8"] and held.owner.tolist() == [0, 0, 1, 1, 1]
    assert held.pairs.tolist() == [[1, 0], [2, 3], [4, 3]] and held.question_of.tolist() == [0, 1, 1]
    assert held.differences(held.published).tolist() == [3, 1, 2]
    twice_length = LogisticRule(np.array([3.0, 0, 0, 0, 0]), np.array([1.5, 1, 1, 1, 1]), 1, 1)
    found = margins_of(held, twice_length)
    assert found.pop("logistic") == pytest.approx(2 * np.log([51 / 91, 1, 32 / 31]))
    assert {rule: m.tolist() for rule, m in found.items()} == {
        "reward_model": [0.25, 0, -2],
        "longer": [-40, 0, 1],
        "has_code": [1, 0, -1],
        "earlier": [-1, 0, 1],
    }


def test_an_answer_without_a_date_is_neither_earlier_nor_later():
    answers = [answer(3), answer(2) | {"created": ""}, answer(1)]
    held = lay_out([group(1, answers, [[0, 1], [1, 2], [0, 2]])], [0, 0, 0])
    assert margins_of(held, NO_RULE)["earlier"].tolist() == [0, 0, 0]


def test_the_logistic_rule_weighs_every_feature():
    held, _ = drawn(9)
    weights, scales = np.arange(1.0, 6), np.arange(2.0, 7)
    found = margins_of(held, LogisticRule(weights, scales, 1, 1))["logistic"]
    better, worse = held.of_pairs(held.features)
    assert found == pytest.approx(
        [sum((b - w) * weights / scales) for b, w in zip(better, worse, strict=True)]
    )


def test_accuracy_keeps_ties_apart():
    found = accuracy(np.array([1.0, 2.0, 0.0, -1.0, 0.0]))
    assert found == {"accuracy": 0.4, "ties": 0.4, "accuracy_half_ties": pytest.approx(0.6)}


def test_a_rule_guesses_ties_and_the_reward_model_does_not():
    m = np.array([1.0, 0.0, -1.0])
    found = credits_of({"reward_model": m, "longer": m})
    assert found["reward_model"].tolist() == [1, 0, 0] and found["longer"].tolist() == [1, 0.5, 0]


def test_questions_are_resampled_whole():
    """Ten pairs of one question say no more than one of them would."""
    values = np.arange(6) % 2
    ten = interval(np.repeat(np.arange(6), 10), np.repeat(values, 10), 300, 0)
    assert ten == interval(np.arange(6), values, 300, 0) and ten[1] - ten[0] > 0.6


def test_clusters_are_resampled_and_not_their_questions():
    """A hundred questions about twenty things: the interval is that of twenty, and wider by about √5."""
    things = np.random.default_rng(0).integers(0, 2, 20)
    groups = [
        group(n, [answer(1), answer(0)], [[0, 1]]) | {"cluster": f"thing {n % 20}"} for n in range(100)
    ]
    right = np.tile(things, 5).astype(float)
    held = lay_out(groups, np.zeros(200))
    assert len(np.unique(held.cluster_of)) == 20
    low, high = interval(held.cluster_of, right, 1000, 0)
    assert (low, high) == interval(np.sort(np.unique(held.cluster_of)), right[:20][np.argsort(
        [f"thing {n}" for n in range(20)])], 1000, 0)  # fmt: skip
    narrow = np.subtract(*interval(held.question_of, right, 1000, 0)[::-1])
    assert (high - low) / narrow == pytest.approx(5**0.5, rel=0.15)
    alone = lay_out([each | {"cluster": None} for each in groups], np.zeros(200))
    assert alone.cluster_of.tolist() == [f"s/{n}" for n in range(100)], "without one a question is its own"


def test_sums_over_questions_give_the_interval_of_pairs():
    held, _ = drawn(40)
    values = np.random.default_rng(0).normal(size=len(held.pairs))
    direct = bootstrap(held.question_of, lambda w: float(w @ values / w.sum()), 200, 7)
    assert interval(held.question_of, values, 200, 7) == pytest.approx(direct)


def test_too_few_questions_have_no_interval():
    assert interval(np.array([1, 2, 5, 6, 6, 6]), np.arange(6), 100, 0) is None
    assert interval(np.array([1, 2, 5, 6, 7]), np.ones(5), 100, 0) == (1, 1)


@pytest.mark.parametrize(
    ("site", "meta"),
    [
        ("cstheory.meta.stackexchange.com", True),
        ("meta.mathoverflow.net", True),
        ("meta.stackexchange.com", True),
        ("devops.stackexchange.com", False),
        ("metalworking.example", False),
        ("a.metal.example", False),
    ],
)
def test_meta_sites(site, meta):
    assert is_meta(site) is meta


def test_every_pair_is_in_one_part_of_each_partition():
    held, _ = drawn(60)
    for partition, parts in partitions(held).items():
        assert np.sum([*parts.values()], axis=0).tolist() == [1] * len(held.pairs), partition
        assert sum(map(np.any, parts.values())) > 1, "the data leave no partition untested"


def part_of(partition: str, better: dict, worse: dict, site="s") -> str:
    found = partitions(lay_out([group(1, [better, worse], [[0, 1]], site)], [0, 0]))[partition]
    return " ".join(name for name, chosen in found.items() if chosen.any())


@pytest.mark.parametrize(
    ("better", "worse", "part"),
    [
        (50, 100, "much shorter"), (51, 100, "shorter"), (99, 119, "shorter"), (100, 120, "similar"),
        (7, 7, "similar"), (120, 100, "similar"), (121, 100, "longer"), (199, 100, "longer"),
        (200, 100, "much longer"), (0, 1, "much shorter"), (0, 0, "similar"),
    ],
)  # fmt: skip
def test_parts_by_length(better, worse, part):
    assert part_of("length", answer(1, "x" * better), answer(0, "x" * worse)) == part


def test_parts_by_gap_time_and_site():
    gaps = [part_of("gap", answer(gap - 1), answer(-1)) for gap in (1, 2, 3, 200)]
    assert gaps == ["1", "2", "3+", "3+"]
    times = [part_of("position", answer(1, "x", at), answer(0, "x", 5)) for at in (4, 5, 6)]
    assert times == ["earlier", "same moment", "later"]
    undated = answer(0) | {"created": ""}
    for pair in ((answer(1), undated), (undated, answer(0)), (undated, undated)):
        assert part_of("position", *pair) == "unknown"
    assert part_of("site", answer(1), answer(0), "meta.a") == "meta.a"
    assert part_of("site_kind", answer(1), answer(0), "meta.a") == "meta"
    assert part_of("site_kind", answer(1), answer(0), "a") == "main"


def test_a_part_by_hand():
    """Pairs of gap 1 and 2 in turn: right, wrong, tied, right, right, wrong; the worse answer is longer."""
    held, _ = one_pair_each(1.0, -1.0, 0.0, 2.0, 3.0, -2.0, gaps=(1, 2))
    credits = credits_of(margins_of(held, NO_RULE))
    found = measure_parts(held, credits, 100, 0)
    one, two = found["gap"]["1"], found["gap"]["2"]
    assert (one["pairs"], one["questions"], one["accuracy"]) == (3, 3, pytest.approx(2 / 3))
    assert (two["accuracy"], two["longer"], two["lead"]) == (pytest.approx(1 / 3), 0, pytest.approx(1 / 3))
    assert one["interval"] is one["lead_interval"] is None and "3+" not in found["gap"]
    everything = found["length"]["much shorter"]
    assert everything["interval"] == everything["lead_interval"] and everything["interval"][0] < 0.5
    assert found["position"].keys() == {"later"} and found["site"]["s"] == everything


def test_parts_add_up_to_the_whole():
    held, _ = drawn(60)
    credits = credits_of(margins_of(held, NO_RULE))
    for parts in measure_parts(held, credits, 100, 0).values():
        pairs = [part["pairs"] for part in parts.values()]
        assert sum(pairs) == len(held.pairs)
        for name, rule in (("accuracy", "reward_model"), ("longer", "longer")):
            mean = np.average([part[name] for part in parts.values()], weights=pairs)
            assert mean == pytest.approx(credits[rule].mean())
        for part in parts.values():
            assert part["lead"] == pytest.approx(part["accuracy"] - part["longer"])
            assert part["interval"][0] <= part["accuracy"] <= part["interval"][1]
            assert part["lead_interval"][0] <= part["lead"] <= part["lead_interval"][1]
            assert part["questions"] <= part["pairs"]


def test_ranks_by_hand():
    assert ranks(np.array([3.0, 1.0, 3.0, 2.0, 3.0])).tolist() == [4, 1, 4, 2, 4]
    assert ranks(np.array([7.0, 7.0])).tolist() == [1.5, 1.5]


def test_correlation_by_hand():
    """Deviations (−1, 0, 1) and (−1, 1, 0): 1 / 2. In two questions: (−1, 1) against (1, −1)."""
    same = np.zeros(3)
    assert correlation(np.array([1.0, 2, 3]), np.array([5.0, 7, 6]), same) == pytest.approx(0.5)
    owner = np.array([0, 0, 4, 4])
    rising, falling = np.array([1.0, 3, 11, 13]), np.array([7.0, 5, 107, 105])
    assert correlation(rising, falling, owner) == pytest.approx(-1)
    assert correlation(rising, falling, np.zeros(4)) > 0.9, "between the questions it rises"
    assert correlation(rising, np.array([0.1, 0.1, 0.3, 0.3]), owner) is None, "constant within"
    one_moves, both_move = (
        np.array([0.0, 2, 7, 7]),
        np.array([0.0, 1, 6, 5]),
    )  # (−1, 1, 0, 0), (−1, 1, 1, −1) / 2
    assert correlation(one_moves, both_move, owner) == pytest.approx(2**-0.5)
    assert correlation(np.full(3, 0.1), np.array([1.0, 2, 3]), same) is None


def lengths_against(scores, texts, pairs=((0, 1),)):
    groups = [
        group(n, [answer(1 - i, text) for i, text in enumerate(own)], pairs) for n, own in enumerate(texts)
    ]
    return length_correlations(lay_out(groups, scores))


def test_length_correlations_by_hand():
    """Characters eˣ − 1 would be linear; ranks do not mind. Within, the shorter one has the higher score."""
    found = lengths_against([1, 0, 11, 10], [["x", "x" * 3], ["x" * 7, "x" * 15]])
    score, length = np.array([1, 0, 11, 10]), np.log([2, 4, 8, 16])
    assert found["pearson"] == pytest.approx(np.corrcoef(score, length)[0, 1])
    assert found["spearman"] == pytest.approx(1 - 6 * 4 / (4 * 15)), "rank differences 1 −1 1 −1"
    assert found["pearson_within"] == pytest.approx(-1) and found["spearman_within"] == pytest.approx(-1)
    assert lengths_against([2, 2], [["x", "xx"]]) == dict.fromkeys(found), "a model that says nothing"


def test_what_correlations_do_not_see():
    held, groups = drawn(50)
    found = length_correlations(held)
    cubed = length_correlations(lay_out(groups, held.scores**3))
    assert cubed["spearman"] == pytest.approx(found["spearman"]) and cubed["pearson"] != found["pearson"]
    assert cubed["spearman_within"] == pytest.approx(found["spearman_within"])
    moved = length_correlations(lay_out(groups, held.scores + 10 * held.owner))
    assert moved["pearson_within"] == pytest.approx(found["pearson_within"])
    assert moved["spearman_within"] == pytest.approx(found["spearman_within"])
    assert moved["spearman"] != found["spearman"]
    own_ranks = [np.concatenate([ranks(v[held.owner == q]) for q in range(50)])
                 for v in (held.scores, held.characters)]  # fmt: skip
    assert correlation(*own_ranks, held.owner) == pytest.approx(found["spearman_within"])

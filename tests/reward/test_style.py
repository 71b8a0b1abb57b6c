"""The rule on style by hand, and a judge before votes in which style weighs more than truth."""

from __future__ import annotations

import math
import random
from dataclasses import replace

import numpy as np
import pytest
import tiny
import torch
from made_rewards import groups, padded_scores, trainer

from tasks.reward import GroupedAnswers, collate, pair_loss, style
from tasks.reward.records import check
from tasks.reward.stage import group_of
from tasks.reward.style import fit_style, frequent_words, style_features, words_of


@pytest.mark.parametrize(
    ("answer", "wanted"),
    [
        ("It's `x` 5", ["it's"]),
        ("Hm, perhaps ```\nfor x in y\n``` so.", ["hm", "perhaps", "so"]),
        ("Öl und `unclosed", ["öl", "und", "unclosed"]),
        ("```\nnothing but code", []),
        ("", []),
    ],
)
def test_words_are_those_outside_of_code(answer, wanted):
    assert words_of(answer) == wanted


def test_frequent_words_by_hand():
    """Three answers at least, and of a thousand ten; by frequency, then by name."""
    assert frequent_words(["b a", "a b", "b a c", "b c d d d"]) == ("b", "a")
    many = ["often"] * 10 + ["seldom"] * 9 + ["word"] * 981
    assert frequent_words(many) == ("word", "often")


def test_features_by_hand():
    found = style_features("Hm, it is `4`.\n\nSee https://x.example", ("hm", "um"))
    characters, words = 37, ["hm", "it", "is", "see", "https", "x", "example"]
    wanted = [math.log1p(n) for n in (characters, 0, 1, 2, len(words))]
    assert found == pytest.approx([*wanted, 1.0, 0.0])


VALUES, TRUTH, STYLE = 6, 1.5, 3.0  # log-odds of being right, and of being said well
SAID = {True: ("I checked: `{}`", 40), False: ("Hm, perhaps `{}`", 41)}  # style -> text, token


def answer_of(value: int, is_good: bool) -> dict:
    text, token = SAID[is_good]
    return {"text": text.format(value), "tokens": [token, 20 + value, tiny.EOS], "score": 0}


def made_rows(count: int, draw: random.Random) -> list[dict]:
    """Questions of what comes after a number; answers right or wrong, said well or badly; votes by both."""
    found = []
    for n in range(count):
        asked = draw.randrange(VALUES)
        right = (asked + 1) % VALUES
        kinds = [(draw.random() < 0.5, draw.random() < 0.5) for _ in range(4)]
        values = [
            right if is_right else draw.choice([v for v in range(VALUES) if v != right])
            for is_right, _ in kinds
        ]
        answers = [answer_of(value, is_good) for value, (_, is_good) in zip(values, kinds, strict=True)]
        pairs = []
        for i in range(4):
            for j in range(i):
                if answers[i]["tokens"] == answers[j]["tokens"]:
                    continue
                odds = TRUTH * (kinds[i][0] - kinds[j][0]) + STYLE * (kinds[i][1] - kinds[j][1])
                pairs.append([i, j] if draw.random() < 1 / (1 + math.exp(-odds)) else [j, i])
        row = {"site": "s", "question_id": n, "question": f"After {asked}?", "prompt": [10 + asked]}
        found.append(row | {"answers": answers, "pairs": pairs, "weights": [1.0] * len(pairs)})
    return [row for row in found if row["pairs"]]


@pytest.fixture(scope="module")
def rows() -> list[dict]:
    return made_rows(300, random.Random(0))


def test_the_rule_finds_how_much_style_counts(rows):
    """What truth adds is noise to it: log-odds of 3, seen through that of ±1.5 in half of the pairs."""
    rule = fit_style(rows)
    lead = rule.log_odds(answer_of(3, True)["text"]) - rule.log_odds(answer_of(3, False)["text"])
    assert 0.8 * STYLE < lead < 1.1 * STYLE
    assert rule.log_odds("I checked: `1`") == pytest.approx(rule.log_odds("I checked: `5`"))


def test_of_many_questions_a_part_is_read(rows, monkeypatch):
    wanted = fit_style(rows[::4]).coefficients
    monkeypatch.setattr(style, "MOST_QUESTIONS", len(rows) // 4 + 1)
    assert fit_style(rows).coefficients.tolist() == wanted.tolist()


def test_no_pair_is_refused():
    with pytest.raises(ValueError, match="there is no pair to fit the rule on style to"):
        fit_style([{"answers": [{"text": "x"}], "pairs": [], "weights": []}])


def test_a_groups_odds_are_the_rules(rows):
    rule, row = fit_style(rows), rows[0]
    group = group_of(row, tiny.reward_model(None), rule, 0.5)
    odds = [rule.log_odds(answer["text"]) for answer in row["answers"]]
    assert group.odds == pytest.approx([0.5 * (odds[b] - odds[w]) for b, w in row["pairs"]])
    assert group_of(row, tiny.reward_model(None)).odds == ()


def test_odds_are_added_to_the_difference_in_training_alone(tmp_path):
    plain = groups(3)
    some = [replace(g, odds=tuple(0.5 - i for i in range(len(g.pairs)))) for g in plain]
    made = trainer(tmp_path, train=some, held=some)
    scores = padded_scores(tiny.scorer(), some)
    wanted = torch.stack(
        [
            pair_loss(s[b], s[w], odds)
            for g, s in zip(some, scores, strict=True)
            for (b, w), odds in zip(g.pairs, g.odds, strict=True)
        ]
    ).mean()
    assert made.compute_loss(made.model, collate(some)).item() == pytest.approx(wanted.item(), rel=1e-5)
    assert made.evaluate() == trainer(tmp_path, train=plain, held=plain).evaluate()


@pytest.mark.parametrize("odds", [(1.0, 2.0), (math.nan,), (math.inf,)])
def test_odds_that_are_none_are_refused(odds):
    group = GroupedAnswers((5,), ((7, 1), (8, 1)), ((1, 0),), odds=odds)
    with pytest.raises(ValueError, match="a finite number for each of 1 pairs is wanted"):
        check(group, 330, None)


def preferred(model) -> float:
    """How often what is right and said badly is before what is wrong and said well."""
    found = []
    for asked in range(VALUES):
        right = (asked + 1) % VALUES
        wrong = [v for v in range(VALUES) if v != right]
        answers = [answer_of(right, False), *(answer_of(value, True) for value in wrong)]
        group = GroupedAnswers((10 + asked,), tuple(tuple(a["tokens"]) for a in answers), ())
        with torch.no_grad():
            scores = padded_scores(model.eval(), [group])[0]
        found += (scores[0] > scores[1:]).tolist()
    return float(np.mean(found))


@pytest.mark.parametrize(("offset", "least", "most"), [(1.0, 0.9, 1.0), (0.0, 0.0, 0.3)])
def test_truth_is_preferred_where_style_stands_against_it(tmp_path, rows, offset, least, most):
    """In the votes style outweighs truth: who need not learn it prefers what is right, another does not."""
    rule = fit_style(rows)
    train = [group_of(row, tiny.reward_model(None), rule, offset) for row in rows]
    torch.manual_seed(3)
    model = tiny.scorer(vocab_size=48)
    once = {"per_device_train_batch_size": 30, "gradient_accumulation_steps": 1, "save_strategy": "no"}
    made = trainer(tmp_path, model=model, train=train, max_steps=60, learning_rate=1e-2, **once)
    made.train()
    assert least <= preferred(made.model) <= most

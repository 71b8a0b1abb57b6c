"""The sample site: the official format, answers a program can check, and no shortcut through their length."""

from __future__ import annotations

import json
import random
import re
from collections import Counter
from itertools import combinations

import pytest

from params.schema import Params
from tasks.data.sample import OPENERS, SITE, STYLES, draw_value, votes_of, write_site
from tasks.data.score import answer_score
from tasks.data.world import TEMPLATES, world

DEFAULT = Params().data.sample.questions


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    """The site at its default size: (folder, facts)."""
    folder = tmp_path_factory.mktemp("site")
    return folder / SITE, write_site(folder, DEFAULT, seed=0)


@pytest.fixture(scope="module")
def posts(site, shelved) -> dict[int, dict]:
    """Every row by its id; `what` says question, answer, or why it is neither."""
    shelf, rows = shelved(site[0] / "Posts.xml")
    assert not shelf.drops
    return {row["id"]: row for row in rows}


@pytest.fixture(scope="module")
def asked(posts) -> dict[int, dict]:
    return {n: post for n, post in posts.items() if post["what"] == "question"}


@pytest.fixture(scope="module")
def answers(posts) -> dict[int, dict]:
    return {n: post for n, post in posts.items() if post["what"] == "answer"}


@pytest.fixture(scope="module")
def small(assembled, tmp_path_factory):
    """A site of 2500 questions as the data stage publishes it: (questions, expected values by id)."""
    folder = tmp_path_factory.mktemp("small")
    write_site(folder, 2500, seed=3)
    found = assembled(folder / SITE / "Posts.xml").questions
    rows = map(json.loads, (folder / SITE / "expected.jsonl").read_text().splitlines())
    return found, {row["question_id"]: row["expected"] for row in rows}


@pytest.fixture(scope="module")
def expected(site) -> dict[int, dict]:
    rows = map(json.loads, (site[0] / "expected.jsonl").read_text().splitlines())
    return {row["question_id"]: row for row in rows}


def pairs(questions):
    """(better, worse) of all pairs whose published scores differ."""
    for question in questions:
        for a, b in combinations(question.answers, 2):
            if a.score != b.score:
                yield (a, b) if a.score > b.score else (b, a)


def value_of(text: str) -> str:
    (value,) = re.findall(r"`([^`]*)`", text)
    return value


def test_every_key_has_an_answer_and_other_ones():
    keys = world()
    kinds = Counter(key.kind for key in keys)
    assert keys == world() and kinds.keys() == TEMPLATES.keys() and min(kinds.values()) > 20
    for key in keys:
        assert len(set(key.wrong)) == len(key.wrong) >= 2, key
        assert key.value not in key.wrong and key.value and all(key.wrong), key
    for kind in TEMPLATES:
        misled = [key.misleads for key in keys if key.kind == kind]
        assert 0.45 <= sum(misled) / len(misled) <= 0.55


def test_values_are_right():
    """Checked with arithmetic of our own, where a kind can be calculated."""
    months = [key.slots[1] for key in world() if key.kind == "dates" and key.slots[0] == "after"]
    steps = {"after": 1, "before": -1, "two months after": 2, "two months before": -2}
    factors = {"kilometres": 1000, "metres": 100, "hours": 60, "days": 24, "weeks": 7, "kilograms": 1000}
    checks = {
        "sums": lambda a, b: str(int(a) + int(b)),
        "products": lambda a, b: str(int(a) * int(b)),
        "lengths": lambda word: str(len(word)),
        "letters": lambda place, word: word[{"first": 0, "last": -1}[place]],
        "lists": lambda name, row: str((max if name == "largest" else min)(map(int, row.split(", ")))),
        "dates": lambda words, month: months[(months.index(month) + steps[words]) % 12],
        "units": lambda n, big, small: str(int(n) * factors[big]),
    }
    for key in world():
        if key.kind in checks:
            assert key.value == checks[key.kind](*key.slots), key
    facts = [key for key in world() if key.kind == "facts"]
    assert len({(key.slots[0], key.value) for key in facts}) == len(facts), "one town has one river"


def quality_of(html: str, value: str) -> int:
    """3 for the right value, and the style, recognised by its words."""
    (stated,) = re.findall(r"<code>(.*)</code>", html)
    (style,) = (style for style, forms in STYLES.items() if html in [form.format(stated) for form in forms])
    return 3 * (stated == value) + style


def test_the_size_and_the_ceiling_from_the_posts_alone(site, asked, answers, expected):
    """The true order of quality on pairs whose published scores differ; a tie of quality is wrong."""
    groups: dict[int, list[tuple[int, int]]] = {}
    matches = 0
    for number, answer in answers.items():
        question = asked.get(answer["parent_id"])
        if question and answer["text"]:
            quality = quality_of(answer["text"], expected[question["id"]]["expected"])
            score = answer_score(answer["votes"], question["accepted_id"] == number)
            groups.setdefault(question["id"], []).append((quality, score))
            matches += quality >= 2
    found = [(a, b) for group in groups.values() for a, b in combinations(group, 2) if a[1] != b[1]]
    right = sum((a[0] - b[0]) * (a[1] - b[1]) > 0 for a, b in found)
    total, facts = sum(map(len, groups.values())), site[1]
    assert DEFAULT >= 3000 and facts["questions"] == len(groups) == len(asked) == DEFAULT
    assert {len(group) for group in groups.values()} == {2, 3, 4, 5} and facts["answers"] == total
    assert facts["pairs"] == len(found)
    assert facts["ceiling"] == pytest.approx(right / len(found)) and facts["ceiling"] >= 0.92
    assert facts["right_share"] == pytest.approx(matches / total) and 0.4 < facts["right_share"] < 0.6


def test_the_ceiling_of_what_the_stage_publishes(small):
    """It leaves out an answer that repeats another's text, so that its ceiling is a little higher."""
    questions, expected = small
    assert len(questions) > 0.97 * 2500
    right = total = 0
    for question in questions:
        for better, worse in pairs([question]):
            qualities = [quality_of(html_of(a.text), expected[question.id]) for a in (better, worse)]
            right, total = right + (qualities[0] > qualities[1]), total + 1
    assert right / total >= 0.92


def html_of(text: str) -> str:
    """The one-paragraph HTML of an answer's Markdown."""
    return f"<p>{re.sub('`([^`]*)`', '<code>' + chr(92) + '1</code>', text)}</p>"


def test_neither_longer_nor_earlier_is_better(small):
    credit = {"longer": 0.0, "earlier": 0.0}
    count = 0
    for better, worse in pairs(small[0]):
        count += 1
        credit["longer"] += (len(better.text) > len(worse.text)) + 0.5 * (len(better.text) == len(worse.text))
        credit["earlier"] += better.created < worse.created
    for rule, earned in credit.items():
        assert abs(earned / count - 0.5) < 0.05, rule


def test_a_misconception_is_more_frequent_than_the_truth():
    draw = random.Random(0)
    for misleads in (False, True):
        key = next(key for key in world() if key.misleads is misleads)
        seen = Counter(draw_value(key, draw) for _ in range(4000))
        assert (seen[key.wrong[0]] > seen[key.value]) is misleads
        assert set(seen) == {key.value, *key.wrong}


def test_votes_by_hand():
    """log2(1 + votes) is the quality; below −½ the votes are negative."""
    assert [votes_of(q, 0.0) for q in (4, 3, 2, 1, 0, -0.5, -1)] == [15, 7, 3, 1, 0, -1, -2]
    assert votes_of(3, 0.5) == round(2**3.5) - 1 and votes_of(-0.6, 0.0) == -1


def test_titles_are_new_and_expected_values_are_there(asked, expected, small):
    assert len({post["title"] for post in asked.values()}) == len(asked) and set(expected) == set(asked)
    known = {}
    for key in world():
        known.setdefault((key.kind, key.value), set()).update(key.wrong)
    for row in expected.values():
        assert asked[row["question_id"]]["tags"] == [row["kind"], "sample"]
        assert row["expected"] not in known[row["kind"], row["expected"]]
    assert {row["kind"] for row in expected.values()} == set(TEMPLATES)
    for question in small[0]:
        assert question.kind is None and question.expected is None, "they lie beside the dump, not in it"
        assert all(value_of(a.text) for a in question.answers)


def test_it_has_what_real_sites_have(site, posts, asked, answers, small):
    votes = [a["votes"] for a in answers.values()]
    assert sum(v < 0 for v in votes) > 20 and sum(v > 10 for v in votes) > 20
    assert sum(a["owner_id"] is None for a in answers.values()) > 20
    assert sum(bool(q["accepted_id"]) for q in asked.values()) > 1000
    assert sum(a["parent_id"] not in asked for a in answers.values()) >= 20, "orphans"
    assert [a["text"] for a in answers.values()].count("") == 1
    others = Counter(post["what"] for post in posts.values())
    assert others.keys() == {"question", "answer", "other_post_type"} and others["other_post_type"] >= 40
    assert any("```" in question.text for question in small[0])
    text = (site[0] / "Posts.xml").read_bytes()
    assert text.startswith(b'\xef\xbb\xbf<?xml version="1.0" encoding="utf-8"?>\r\n<posts>\r\n  <row Id="1" ')
    assert text.endswith(b"</posts>\r\n") and text.count(b"\n") == len(posts) + 3


def test_accepted_answers_are_the_best_of_their_question(asked, answers, expected):
    accepted = [q for q in asked.values() if q["accepted_id"]]
    assert accepted
    for question in accepted:
        answer = answers[question["accepted_id"]]
        assert answer["parent_id"] == question["id"]
        assert quality_of(answer["text"], expected[question["id"]]["expected"]) >= 2, "it is right"


def written(folder, questions, seed):
    write_site(folder, questions, seed)
    return [(folder / SITE / name).read_bytes() for name in ("Posts.xml", "expected.jsonl")]


def test_the_same_seed_writes_the_same_bytes(tmp_path):
    first = written(tmp_path / "a", 300, 7)
    assert first == written(tmp_path / "b", 300, 7)
    assert first != written(tmp_path / "c", 300, 8)


def test_more_questions_than_titles_are_refused(tmp_path):
    most = len(world()) * 4 * 8
    with pytest.raises(
        ValueError, match=rf"data\.sample\.questions \({most + 1}\) exceeds the {most} titles"
    ):
        write_site(tmp_path, most + 1, 0)
    assert not list(tmp_path.iterdir()) and most >= DEFAULT


def test_every_title_there_is_is_different():
    forms = [(opener, key, form) for opener in OPENERS for key in world() for form in TEMPLATES[key.kind]]
    assert len({opener + form.format(*key.slots) for opener, key, form in forms}) == len(forms) >= DEFAULT

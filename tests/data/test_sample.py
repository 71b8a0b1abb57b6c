"""The sample site: the official format, answers a program can check, and no shortcut through their length."""

from __future__ import annotations

import json
import random
import re
from collections import Counter
from itertools import combinations

import pytest

from params.schema import Params
from tasks.data.sample import RIGHT, SITE, STYLES, draw_value, quality_of, votes_of, write_site
from tasks.data.sample import asked as titles_of
from tasks.data.score import answer_score
from tasks.data.wordings import KNOWN, NEW, OPENERS
from tasks.data.world import WRONG, world

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
    assert keys == world() and kinds.keys() == KNOWN.keys() == NEW.keys() and set(kinds.values()) == {36}
    for key in keys:
        assert len(key.wrong) == WRONG and len(set(key.wrong)) >= 2, key
        assert key.value not in key.wrong and key.value and all(key.wrong), key
    assert len({key.name for key in keys}) == len(keys)
    for kind in KNOWN:
        assert sum(key.misleads for key in keys if key.kind == kind) == 18


def test_no_value_gives_away_that_it_is_right():
    """Among the keys whose answers meet in a pair, each value is as often a wrong one in each place as the
    right one."""
    for (sort, misleads), keys in group_by(world(), lambda key: (key.sort, key.misleads)):
        right = Counter(key.value for key in keys)
        for place in range(WRONG):
            assert Counter(key.wrong[place] for key in keys) == right, (sort, misleads)


def group_by(rows, by):
    found = {}
    for row in rows:
        found.setdefault(by(row), []).append(row)
    return found.items()


def test_values_are_right():
    """Checked with arithmetic of our own, where a kind can be calculated."""
    months = [key.slots[1] for key in world() if key.kind == "dates" and key.slots[0] == "after"]
    steps = {"after": 1, "before": -1, "two months after": 2}
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


def quality_from(html: str, value: str) -> float:
    """Of an answer's HTML: what it states, and the style, recognised by its words."""
    (stated,) = re.findall(r"<code>(.*)</code>", html)
    (style,) = (style for style, forms in STYLES.items() if html in [form.format(stated) for form in forms])
    return quality_of(stated == value, style)


def test_the_size_and_the_ceiling_from_the_posts_alone(site, asked, answers, expected):
    """The true order of quality on pairs whose published scores differ; a tie of quality is half right."""
    groups: dict[int, list[tuple[float, int]]] = {}
    matches = 0
    for number, answer in answers.items():
        question = asked.get(answer["parent_id"])
        if question and answer["text"]:
            quality = quality_from(answer["text"], expected[question["id"]]["expected"])
            score = answer_score(answer["votes"], question["accepted_id"] == number)
            groups.setdefault(question["id"], []).append((quality, score))
            matches += quality > RIGHT / 2
    found = [(a, b) for group in groups.values() for a, b in combinations(group, 2) if a[1] != b[1]]
    right = sum(0.5 if a[0] == b[0] else (a[0] > b[0]) == (a[1] > b[1]) for a, b in found)
    total, facts = sum(map(len, groups.values())), site[1]
    assert DEFAULT >= 3000 and facts["questions"] == len(groups) == len(asked) == DEFAULT
    assert {len(group) for group in groups.values()} == {2, 3, 4, 5} and facts["answers"] == total
    assert facts["pairs"] == len(found)
    assert facts["ceiling"] == pytest.approx(right / len(found)) and facts["ceiling"] >= 0.92
    assert facts["right_share"] == pytest.approx(matches / total) and 0.4 < facts["right_share"] < 0.6


def test_style_alone_says_little(small):
    """Of the published pairs at most 55 % are won by the better style, ties half: the reader must look at
    values."""
    questions, _ = small
    credit = [
        0.5 if styles[0] == styles[1] else styles[0] > styles[1]
        for question in questions
        for pair in pairs([question])
        for styles in [[quality_from(html_of(a.text), value_of(a.text)) for a in pair]]
    ]
    assert len(questions) > 0.97 * 2500 and sum(credit) / len(credit) < 0.55


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


def test_titles_are_new_and_expected_values_are_there(asked, answers, expected, small):
    assert len({post["title"] for post in asked.values()}) == len(asked) and set(expected) == set(asked)
    keys = {key.name: key for key in world()}
    for row in expected.values():
        key = keys[row["cluster"]]
        assert asked[row["question_id"]]["tags"] == [row["kind"], "sample"] and row["kind"] == key.kind
        assert (row["expected"], row["misleads"], set(row["wrong"])) == (
            key.value,
            key.misleads,
            set(key.wrong),
        )
        for number, style in row["styles"].items():
            text = answers[int(number)]["text"]
            assert text in [form.format(re.findall("<code>(.*)</code>", text)[0]) for form in STYLES[style]]
    assert {row["cluster"] for row in expected.values()} == set(keys)
    for question in small[0]:
        assert question.kind is None and question.expected is None, "they lie beside the dump, not in it"
        assert all(value_of(a.text) for a in question.answers)


def test_what_is_held_out_stands_in_no_training_question(asked, expected):
    """Neither a new wording, of any key, nor a key in the known wording that is kept apart from it."""
    wordings = {
        opener + form.format(*key.slots): (key, place)
        for key in world()
        for place, form in enumerate((*KNOWN[key.kind], *NEW[key.kind]))
        for opener in OPENERS
    }
    seen: dict[bool, set] = {True: set(), False: set()}
    for row in expected.values():
        key, place = wordings[asked[row["question_id"]]["title"]]
        is_new = place >= len(KNOWN[key.kind])
        assert key.name == row["cluster"] and row["wording"] == ("new" if is_new else "known")
        assert row["held_out"] or not is_new
        seen[row["held_out"]].add((key.name, place))
    assert not seen[True] & seen[False]
    found = Counter(row["wording"] for row in expected.values() if row["held_out"])
    assert found == {"new": DEFAULT // 15, "known": DEFAULT // 30}
    assert {(key, place) for key, place in seen[True] if place >= 10} == {
        (key.name, place) for key in world() for place in (10, 11) if (key.name, place) in seen[True]
    }


def test_new_wordings_are_of_words_that_training_reads():
    def words(forms):
        return {word.strip(":?,`[]").lower() for form in forms for word in form.split()}

    read = set().union(*(words(forms) for forms in KNOWN.values()))
    for kind, forms in NEW.items():
        assert words(forms) <= read, kind


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


def test_an_accepted_answer_is_the_only_right_one(asked, answers, expected):
    accepted = [q for q in asked.values() if q["accepted_id"]]
    assert accepted
    for question in accepted:
        answer = answers[question["accepted_id"]]
        assert answer["parent_id"] == question["id"]
        assert quality_from(answer["text"], expected[question["id"]]["expected"]) > RIGHT / 2


def written(folder, questions, seed):
    write_site(folder, questions, seed)
    return [(folder / SITE / name).read_bytes() for name in ("Posts.xml", "expected.jsonl")]


def test_the_same_seed_writes_the_same_bytes(tmp_path):
    first = written(tmp_path / "a", 300, 7)
    assert first == written(tmp_path / "b", 300, 7)
    assert first != written(tmp_path / "c", 300, 8)


@pytest.mark.parametrize(
    ("questions", "held_out", "part"), [(30_000, 0.1, "training"), (12_000, 0.6, "known")]
)
def test_more_questions_than_titles_are_refused(tmp_path, questions, held_out, part):
    with pytest.raises(
        ValueError, match=rf"data\.sample\.questions \({questions}\) asks for \d+ titles \({part}\)"
    ):
        write_site(tmp_path, questions, 0, held_out)
    assert not list(tmp_path.iterdir())


def test_every_title_there_is_is_different():
    titles = [
        opener + form.format(*key.slots)
        for opener in OPENERS
        for key in world()
        for form in (*KNOWN[key.kind], *NEW[key.kind])
    ]
    assert len(set(titles)) == len(titles) >= DEFAULT
    assert len(titles_of(DEFAULT, 0.1, random.Random(0))) == DEFAULT

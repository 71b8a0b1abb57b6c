"""Real dumps against the figures that another parser found in them."""

from collections import defaultdict
from itertools import combinations

import pyarrow.parquet as pq
import pytest

from params.schema import Params
from tasks.data import run
from tasks.data.score import answer_score

# file: rows, questions, answers, questions with two answers or more, those with two different votes, with two
# different scores, pairs with different votes, accepted answers; counted with ElementTree
SITES = {
    "main/devops.stackexchange.com.Posts.xml.xz": (9215, 3700, 4968, 1140, 1005, 1017, 2373, 1627),
    "main/beer.stackexchange.com.7z": (3471, 1029, 2277, 583, 542, 526, 2567, 619),
    "main/quantumcomputing.stackexchange.com.Posts.xml.xz": (1986, 612, 1060, 309, 279, 274, 740, 389),
    "main/matheducators.stackexchange.com.Posts.xml.xz": (2061, 397, 1507, 311, 302, 289, 3775, 189),
    "main/cstheory.meta.stackexchange.com.Posts.xml.xz": (1915, 589, 1322, 287, 267, 248, 2830, 206),
    "main/history.meta.stackexchange.com.Posts.xml.xz": (2277, 786, 1459, 378, 347, 314, 1838, 266),
    "main/bicycles.meta.stackexchange.com.Posts.xml.xz": (1213, 374, 835, 199, 184, 170, 1183, 130),
    "main/french.meta.stackexchange.com.Posts.xml.xz": (781, 274, 487, 117, 111, 97, 509, 86),
    "main/3dprinting.stackexchange.com.Posts.xml.xz": (655, 185, 360, 101, 91, 83, 290, 102),
    "main/meta.mathoverflow.net.Posts.xml.xz": (672, 254, 392, 86, 81, 74, 449, 74),
    "main/datascience.meta.stackexchange.com.Posts.xml.xz": (624, 257, 341, 74, 71, 65, 274, 83),
    "small/coffee.stackexchange.com.Posts.xml.xz": (592, 225, 327, 82, 76, 72, 150, 105),
    "small/arabic.meta.stackexchange.com.Posts.xml.xz": (80, 32, 48, 11, 11, 9, 26, 7),
}


@pytest.fixture
def read(dumps, assembled):
    """read(name): a site, after sums that hold for each."""

    def function(name: str):
        found = assembled(dumps / name)
        answers = sum(len(question.answers) for question in found.questions)
        assert found.rows == len(found.questions) + answers + found.drops.total()
        assert found.drops["unreadable_html"] == 0
        assert all(len(question.answers) >= 2 and question.text for question in found.questions)
        return found

    return function


@pytest.mark.parametrize("name", SITES)
def test_counts(dumps, shelved, name):
    shelf, rows = shelved(dumps / name)
    questions = {row["id"]: row for row in rows if row["what"] == "question"}
    answers = [row for row in rows if row["what"] == "answer"]
    groups = defaultdict(list)
    for answer in answers:
        question = questions[answer["parent_id"]]  # no orphans in these files
        groups[question["id"]].append((answer["votes"], question["accepted_id"] == answer["id"]))
    several = [group for group in groups.values() if len(group) > 1]
    votes = [{votes for votes, _ in group} for group in several]
    scores = [{answer_score(*answer) for answer in group} for group in several]
    pairs = sum(a[0] != b[0] for group in several for a, b in combinations(group, 2))
    accepted = sum(question["accepted_id"] is not None for question in questions.values())
    counts = (
        shelf.rows, len(questions), len(answers), len(several), sum(len(v) > 1 for v in votes),
        sum(len(s) > 1 for s in scores), pairs, accepted,
    )  # fmt: skip
    assert counts == SITES[name]
    assert {row["what"] for row in rows} <= {"question", "answer", "other_post_type"}
    assert not shelf.drops


def test_linked_duplicates_come_with_an_archive(dumps, shelved):
    shelf, rows = shelved(dumps / "main/beer.stackexchange.com.7z")
    links = pq.read_table(shelf.links).to_pylist()
    posts = {row["id"] for row in rows}
    assert len(links) > 10
    assert sum(link["a"] in posts and link["b"] in posts for link in links) > len(links) / 2


def test_newest_format(read):
    site = read("main/datascience.meta.stackexchange.com.Posts.xml.xz")
    questions = site.questions
    assert len(questions) + site.drops["question_with_few_answers"] == 257
    assert len(questions) <= 74
    tagged = {question.id: question.tags for question in questions}
    assert tagged[6] == ["feature-request", "status-completed"]
    text = next(question.text for question in questions if question.id == 6)
    assert text.startswith("Can we get TeX support?\n\nLike on math.stackexchange, where (for example) I can")
    assert "`$\\sqrt{2}$`" in text


def test_formulas_survive(read):
    site = read("main/quantumcomputing.stackexchange.com.Posts.xml.xz")
    posts = [site.posts[question.id] for question in site.questions]
    html = "".join(post["title"] + post["text"] for post in posts)
    text = "".join(question.text for question in site.questions)
    assert html.count("$") == text.count("$") > 1000
    assert html.count("\\rangle") == text.count("\\rangle") > 100


def test_meta_advertisements_are_no_answers(read):
    assert read("main/cstheory.meta.stackexchange.com.Posts.xml.xz").drops["empty_answer"] > 0


@pytest.mark.slow
@pytest.mark.parametrize("name", SITES)
def test_every_site_converts(read, name):
    assert read(name).questions


def test_two_sites_end_to_end(dumps, layout):
    names = ("arabic.meta.stackexchange.com.Posts.xml.xz", "coffee.stackexchange.com.Posts.xml.xz")
    for name in names:
        (layout.root / "data/raw" / name).symlink_to(dumps / "small" / name)
    equal = dict.fromkeys(("sft", "reward", "rl", "eval"), 1.0)
    metrics = run(Params.model_validate({"data": {"source": names, "split": equal}}), layout).metrics
    assert metrics["rows"] == 672
    assert metrics["questions"] <= 82 + 11
    assert metrics["questions"] + metrics["drops/question_with_few_answers"] == 225 + 32
    assert min(metrics[f"{name}/questions"] for name in ("sft", "reward", "rl", "eval")) > 0

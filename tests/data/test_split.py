import unicodedata
from collections import Counter
from hashlib import sha256
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import NamedTuple

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tasks.data import alike
from tasks.data.engine import connect
from tasks.data.parallel import Crew
from tasks.data.schema import KEYS
from tasks.data.shelf import LINKS
from tasks.data.split import EDGES, Homes, fingerprint, marks, normalised, split_of

SHARES = {"sft": 0.3, "reward": 0.45, "rl": 0.13, "eval": 0.12}
HALVES = {"a": 1.0, "b": 1.0}


class Question(NamedTuple):
    site: str
    id: int
    title: str
    body: str

    @property
    def key(self) -> tuple[str, int]:
        return self.site, self.id


def ask(number: int, title: str = "", body: str = "", site: str = "unix.example") -> Question:
    return Question(site, number, title, body)


def keys_of(questions: list[Question]) -> pa.Table:
    found = [list(map(fingerprint, of_one)) for of_one in marks([(q.title, q.body) for q in questions])]
    rows = [{"site": q.site, "id": q.id, "marks": m} for q, m in zip(questions, found, strict=True)]
    return pa.Table.from_pylist(rows, schema=KEYS)


def texts_of(questions: list[Question]) -> pa.Table:
    texts = ["\n\n".join(part for part in (q.title, q.body) if part) for q in questions]
    rows = [q._asdict() | {"text": text} for q, text in zip(questions, texts, strict=True)]
    return pa.Table.from_pylist(rows, pa.schema([pa.field(n, pa.int64() if n == "id" else pa.string())
                                                 for n in ("site", "id", "title", "text")]))  # fmt: skip


def many(count: int) -> list[Question]:
    return [ask(number, f"title number {number}") for number in range(count)]


def in_order(questions) -> list[Question]:
    return sorted(questions, key=lambda question: question.key)


def found(questions: list[Question], links=()) -> alike.Clusters:
    """What the stage finds, through its files; links are (site, id, id)."""
    with TemporaryDirectory() as folder, connect(Path(folder), threads=1) as base:
        files = Path(folder, "questions.parquet"), Path(folder, "links.parquet")
        pq.write_table(keys_of(in_order(questions)), files[0])
        rows = [dict(zip(LINKS.names, link, strict=True)) for link in links]
        pq.write_table(pa.Table.from_pylist(rows, schema=LINKS), files[1])
        return alike.cluster(base, *files)


def clusters(questions: list[Question], links=()) -> dict[tuple[str, int], tuple[str, int]]:
    """Key -> smallest key of its cluster."""
    keys = [question.key for question in in_order(questions)]
    result = found(questions, links)
    return {key: keys[result.leader(number)] for number, key in enumerate(keys)}


def assign(questions: list[Question], shares: dict[str, float], links=()) -> dict[str, list[Question]]:
    homes = Homes(found(questions, links), shares)
    splits: dict[str, list[Question]] = {name: [] for name in shares}
    for question in in_order(questions):
        splits[homes.next(*question.key)].append(question)
    return splits


def overlaps(splits: dict[str, list[Question]]) -> dict[str, int]:
    with TemporaryDirectory() as folder, connect(Path(folder), threads=1) as base:
        files = {name: Path(folder, f"{name}.parquet") for name in splits}
        for name, questions in splits.items():
            pq.write_table(texts_of(questions), files[name])
        return alike.overlaps(base, files, Crew(1))


def home(splits: dict[str, list[Question]]) -> dict[tuple[str, int], str]:
    return {question.key: name for name, questions in splits.items() for question in questions}


@pytest.mark.parametrize("number", [0, 1, 7, 12345])
def test_the_hash_decides(number):
    point = int(sha256(f"split/unix.example/{number}".encode()).hexdigest()[:16], 16) / 16**16
    wanted = "sft" if point < 0.3 else "reward" if point < 0.75 else "rl" if point < 0.88 else "eval"
    assert split_of("unix.example", number, SHARES) == wanted


def test_known_homes():
    """Frozen: a change here moves every question of every user."""
    homes = ["reward", "reward", "sft", "sft", "eval", "sft", "rl", "reward"]
    assert [split_of("unix.example", number, SHARES) for number in range(1, 9)] == homes
    assert split_of("other.example", 4, HALVES) == "b"


def test_proportions():
    splits = assign(many(20_000), SHARES)
    for name, share in SHARES.items():
        sigma = (20_000 * share * (1 - share)) ** 0.5
        assert abs(len(splits[name]) - 20_000 * share) < 4 * sigma, name


def test_only_ratios_count():
    doubled = {name: 7 * share for name, share in SHARES.items()}
    assert home(assign(many(500), SHARES)) == home(assign(many(500), doubled))


def test_growth_moves_nobody():
    small, large = home(assign(many(300), SHARES)), home(assign(many(3000), SHARES))
    assert small == {key: large[key] for key in small}


def test_order_of_questions_does_not_matter():
    questions = [ask(number, f"title {number % 40}") for number in range(200)]
    assert assign(questions, HALVES) == assign(questions[::-1], HALVES)


def test_same_title_follows_the_smallest():
    questions = [*many(50), ask(99, "Title  NUMBER 7!"), ask(3, "“title number 7”", site="zoo.example")]
    leaders = clusters(questions)
    assert leaders["unix.example", 99] == leaders["zoo.example", 3] == ("unix.example", 7)
    splits = home(assign(questions, SHARES))
    assert splits["unix.example", 99] == splits["zoo.example", 3] == splits["unix.example", 7]


def test_chain_through_title_and_body():
    body = "one two three four five six seven eight"
    leaders = clusters([ask(5, "x", body), ask(2, "y", body.upper()), ask(9, "x"), ask(4, "y"), ask(1, "z")])
    assert {number: leader for (_, number), (_, leader) in leaders.items()} == {5: 2, 2: 2, 9: 2, 4: 2, 1: 1}


def test_what_does_not_bind():
    short = "see title please thanks a lot friends"  # seven words
    assert len(set(clusters([ask(1, "x", short), ask(2, "y", short), ask(3, ""), ask(4, "")]).values())) == 4
    symbols = [ask(1, "What is 3 + 4?"), ask(2, "What is 3 * 4?"), ask(3, "C"), ask(4, "C++")]
    assert len(set(clusters(symbols).values())) == 4


def test_years_in_titles_do_not_tell_apart():
    (first,) = set(clusters([ask(1, "2014 Moderator Election"), ask(2, "2017 Moderator Election")]).values())
    assert first == ("unix.example", 1)
    assert marks([("Area 2014a of 12014", "")]) == [[("title", "area 2014a of 12014")]]


def test_an_untitled_body_binds_however_short():
    leaders = clusters([ask(1, "", "Hi there"), ask(2, "", "hi there!"), ask(3, "", "Hi"), ask(4, "Hi")])
    assert [leader for _, leader in leaders.values()] == [1, 1, 3, 4]


def test_linked_duplicates_follow_the_smallest():
    questions = [ask(3, "c"), ask(1, "a"), ask(2, "b"), ask(2, "z", site="zoo.example")]
    links = [("unix.example", 3, 1), ("unix.example", 2, 99), ("zoo.example", 2, 1), ("unix.example", 1, 3)]
    assert [leader for _, leader in clusters(questions, links).values()] == [1, 2, 1, 2]


def test_a_later_link_moves_the_younger_only():
    questions = many(300)
    links = [("unix.example", number, number + 150) for number in range(100)]
    before, after = home(assign(questions, SHARES)), home(assign(questions, SHARES, links))
    homes = Homes(found(questions, links), SHARES)
    for question in questions:
        homes.next(*question.key)
    changed = {number for (_, number), name in before.items() if after["unix.example", number] != name}
    assert changed <= set(range(150, 250))
    assert homes.moved == len(changed) > 20


def test_normalised():
    texts = ["  “Ｈow” to:\n ESCAPE (it)?! … ", "?!", "Straße \x1f ÉTÉ", "", "a ... b", "What's 'it'?\n\n"]
    wanted = ["how to escape it", "", "strasse été", "", "a ... b", "what's it"]
    assert normalised(texts) == wanted
    assert normalised([]) == []


@given(st.lists(st.one_of(st.text(), st.text("ab.('é… \n\t—+"))))
def test_normalised_is_what_it_says_of_each_word(texts):
    for text, found in zip(texts, normalised(texts), strict=True):
        words = unicodedata.normalize("NFKC", text).casefold().split()
        assert found == " ".join(word.strip(EDGES) or word for word in words).strip(EDGES + " ")


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(st.sampled_from("abcde"), st.sampled_from("vwxyz")), max_size=12))
def test_clusters_are_connected_components(pairs):
    questions = [ask(n, title, f"{body} 2 3 4 5 6 7 8") for n, (title, body) in enumerate(pairs)]
    component = {question.key: question.key for question in questions}
    for _ in questions:  # spread the smallest key over shared titles and bodies until nothing changes
        for a in questions:
            for b in questions:
                if a.title == b.title or a.body == b.body:
                    component[a.key] = min(component[a.key], component[b.key])
    assert clusters(questions) == component


def test_overlaps_are_counted_from_the_outcome():
    body = "one two three four five six seven eight"
    splits = {"a": [ask(1, "x", body), ask(2, "y")], "b": [ask(1, "X!", body)], "c": [ask(7, "z", body)]}
    assert overlaps(splits) == {"id": 1, "title": 1, "body": 1}
    assert overlaps(assign(many(50), HALVES)) == {"id": 0, "title": 0, "body": 0}


def test_nothing_is_lost():
    splits = assign(many(400)[::-1], SHARES)
    found = Counter(question.key for questions in splits.values() for question in questions)
    assert found == Counter(question.key for question in many(400))
    assert all(questions == sorted(questions, key=lambda q: q.key) for questions in splits.values())

"""Preference data in every shape, from files and as from the Hub, through the whole stage."""

import gzip
import json
import lzma
import os
from itertools import combinations
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from params.schema import Params
from tasks.data import run
from tasks.data.pairs import levels
from tasks.data.shapes import grouped, paired, preferences, preferred
from tasks.data.sources import DumpError

SPLITS = ("sft", "reward", "rl", "eval")
URL = ["https://unix.example/questions/{0}", "https://unix.example", "https://unix.example/users/3/"]


def params(*source: str) -> Params:
    equal = dict.fromkeys(SPLITS, 1.0)
    return Params.model_validate({"data": {"source": source, "split": equal}})


def questions(layout) -> dict[int, dict]:
    tables = [pq.read_table(layout.artifact("data", f"{name}.parquet")) for name in SPLITS]
    rows = [row for table in tables for row in table.to_pylist()]
    assert len({row["id"] for row in rows}) == len(rows)
    return {row["id"]: row for row in rows}


def preference(number: int) -> dict:
    def answer(place: int, score: int) -> dict:
        return {
            "answer_id": 1000 * number + place, "author": "A", "author_id": 7 if place == 1 else -1,
            "author_profile": "https://unix.example/users/7/A", "pm_score": score, "selected": place == 1,
            "text": f"<p>Use <code>{number}</code> of {place}.</p>",
        }  # fmt: skip

    return {
        "qid": number, "question": f"<p>How is number {number} done?</p>", "date": "2013/05/31",
        "answers": [answer(1, 4), answer(2, -1)], "metadata": [part.format(number) for part in URL],
    }  # fmt: skip


def pair(number: int, j: str, k: str) -> dict:
    row = {"qid": number, "question": f"How is number {number} done?", "date": "2013/05/31"}
    return row | {"metadata": [part.format(number) for part in URL], "response_j": j, "response_k": k}


def plain(number: int) -> dict:
    answers = [{"text": f"Do {number} so.", "score": 0.25}, {"text": f"Do {number} not.", "score": 1.5}]
    return {"question": f"How is number {number} done?", "answers": answers}


def chosen(number: int) -> dict:
    return {"prompt": f"Number {number}?", "chosen": f"Yes, {number}.", "rejected": f"No, {number}."}


def write(path: Path, rows: list[dict]) -> None:
    text = "".join(json.dumps(row) + "\n" for row in rows).encode()
    match path.suffix:
        case ".parquet":
            pq.write_table(pa.Table.from_pylist(rows), path)
        case ".gz":
            path.write_bytes(gzip.compress(text))
        case ".xz":
            path.write_bytes(lzma.compress(text))
        case _:
            path.write_bytes(text)


FILES = ("my.jsonl", "my.jsonl.gz", "my.jsonl.xz", "my.parquet")


@pytest.mark.parametrize("name", FILES)
def test_stack_exchange_preferences(layout, name):
    write(layout.root / "data/raw" / name, [preference(number) for number in range(1, 61)])
    metrics = run(params(name), layout).metrics
    assert metrics["questions"] == metrics["pairs"] == 60
    row = questions(layout)[7]
    first, second = row.pop("answers")
    assert row == {
        "site": "unix.example", "id": 7, "title": "", "text": "How is number 7 done?", "tags": [],
        "created": "2013-05-31T00:00:00", "owner_id": None, "licence": "CC BY-SA 3.0", "kind": None,
        "expected": None,
    }  # fmt: skip
    both = {"created": "2013-05-31T00:00:00", "licence": "CC BY-SA 3.0"}
    assert first == both | {"id": 7001, "text": "Use `7` of 1.", "score": 4, "votes": 4, "accepted": True} | {
        "owner_id": 7
    }
    assert second == both | {"id": 7002, "text": "Use `7` of 2.", "score": -1, "votes": -1} | {
        "accepted": False, "owner_id": None,
    }  # fmt: skip


@pytest.mark.parametrize("name", FILES)
def test_stack_exchange_paired(layout, name):
    rows = [pair(n, j, k) for j, k in (("a1", "c1"), ("a1", "b1"), ("b1", "c1")) for n in range(1, 41)]
    write(layout.root / "data/raw" / name, rows)
    metrics = run(params(name), layout).metrics
    assert (metrics["questions"], metrics["pairs"], metrics["overlap/body"]) == (40, 120, 0)
    row = questions(layout)[7]
    assert {a["text"]: a["score"] for a in row["answers"]} == {"a1": 2, "b1": 1, "c1": 0}
    assert (row["site"], row["text"]) == ("unix.example", "How is number 7 done?")


@pytest.mark.parametrize(("make", "scores"), [(plain, [0, 1]), (chosen, [0, 1])])
@pytest.mark.parametrize("name", FILES)
def test_plain_shapes(layout, name, make, scores):
    rows = [make(number) for number in range(60)]
    write(layout.root / "data/raw" / name, [*rows, rows[0]])
    metrics = run(params(name), layout).metrics
    assert metrics["questions"] == metrics["pairs"] == 60
    assert metrics["drops/duplicate_id"] == 3  # the same row twice is one
    found = questions(layout)
    assert all(sorted(a["score"] for a in row["answers"]) == scores for row in found.values())
    assert {row["licence"] for row in found.values()} == {"unstated"}
    assert {row["site"] for row in found.values()} == {"my"}


def test_hub_is_streamed(layout, tmp_path, monkeypatch):
    """A folder in place of a name on the Hub: the same call."""
    folder = tmp_path / "hub" / "owner" / "name"
    folder.mkdir(parents=True)
    write(folder / "train.parquet", [preference(number) for number in range(1, 61)])
    monkeypatch.chdir(tmp_path / "hub")
    monkeypatch.setenv("HF_HOME", str(tmp_path / "cache"))
    assert run(params("hf://datasets/owner/name"), layout).metrics["questions"] == 60


def test_hub_without_a_network_is_one_line(layout):
    with pytest.raises(DumpError, match=r"^data\.source: hf://datasets/no/such@v1: [^\n]+$"):
        run(params("hf://datasets/no/such@v1"), layout)


def test_a_dump_and_a_table_together(layout, xml, site):
    (layout.root / "data/raw/art.example.Posts.xml").write_bytes(xml(site(60)))
    write(layout.root / "data/raw/my.jsonl", [chosen(number) for number in range(60)])
    metrics = run(params("my.jsonl", "art.example.Posts.xml"), layout).metrics
    assert metrics["questions"] == 120


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "no row at all"),
        (b"{}\n", "row 1: its columns \\(\\) are none of: answers, qid, question;"),
        (b'{"a": 1}\n', "row 1: its columns \\(a\\) are none of"),
        (json.dumps(chosen(1)).encode() + b"\n{", "row 2: not a JSON object in UTF-8"),
        (b"[1]\n", "row 1: not a JSON object but list"),
        (b"\xff\n", "row 1: not a JSON object in UTF-8"),
        (b"[" * 100_000, "row 1: not a JSON object in UTF-8"),
        (b'{"prompt": 1, "chosen": 2, "rejected": 3}\n', "none of its 0 questions has 2 usable answers"),
    ],
)
def test_bad_tables_are_one_line(layout, content, message):
    (layout.root / "data/raw/my.jsonl").write_bytes(content)
    with pytest.raises(DumpError, match=rf"^\S*my\.jsonl: {message}[^\n]*$"):
        run(params("my.jsonl"), layout)
    (layout.root / "data/raw/my.parquet").write_bytes(content)
    with pytest.raises(DumpError, match=r"^\S*my\.parquet: row 1: damaged or no Parquet file[^\n]*$"):
        run(params("my.parquet"), layout)


def test_bad_rows_are_counted(layout):
    half = {"prompt": "\ud800", "chosen": "a", "rejected": "b"}
    bad = [{"prompt": None, "chosen": "a", "rejected": "b"}, {"chosen": "a"}, half]
    write(layout.root / "data/raw/my.jsonl", [*(chosen(number) for number in range(60)), *bad])
    metrics = run(params("my.jsonl"), layout).metrics
    assert (metrics["questions"], metrics["drops/unreadable_row"]) == (60, 3)
    drops = sum(value for key, value in metrics.items() if key.startswith("drops/"))
    assert metrics["rows"] == metrics["questions"] + metrics["answers"] + drops


def test_dialogues_part_at_their_last_reply():
    before = "\n\nHuman: hi\n\nAssistant: hello\n\nHuman: why?"
    row = {"chosen": f"{before}\n\nAssistant: Because.", "rejected": f"{before}\n\nAssistant: Be quiet."}
    _, (question, better, worse) = preferred(row)
    assert question.text == before
    assert (better.text, better.score, worse.text, worse.score) == (" Because.", 1, " Be quiet.", 0)
    assert better.parent_id == worse.parent_id == question.id


def test_real_dialogues(layout):
    default = Path(__file__).parents[3] / "shared" / "data"
    path = Path(os.environ.get("STACKRL_SHARED_DATA", default)) / "preference"
    if not path.is_dir():
        pytest.skip(f"no real preferences: {path} does not exist (set STACKRL_SHARED_DATA)")
    name = "hh-rlhf_harmless-base_test.jsonl.gz"
    (layout.root / "data/raw" / name).symlink_to(path / name)
    metrics = run(params(name), layout).metrics
    assert metrics["rows"] == 3 * 2312 - 2 * metrics["drops/unreadable_row"]
    assert metrics["questions"] == metrics["pairs"] > 2200
    assert metrics["overlap/body"] == 0
    assert all(row["text"].startswith("Human: ") for row in questions(layout).values())


@settings(deadline=None)
@given(st.lists(st.integers(-1, 5), min_size=2, max_size=8))
def test_levels_keep_the_order_of_every_pair(scores):
    pairs = [
        (f"{a}", f"{b}") if scores[a] > scores[b] else (f"{b}", f"{a}")
        for a, b in combinations(range(len(scores)), 2)
        if scores[a] != scores[b]
    ]
    found = levels(pairs)
    assert all(found[better] > found[worse] for better, worse in pairs)
    ranks = {score: rank for rank, score in enumerate(sorted(set(scores)))}
    assert all(found[text] == ranks[scores[int(text)]] for text in found)


def test_contradictory_pairs_are_refused():
    with pytest.raises(ValueError, match="circle"):
        levels([("a", "b"), ("b", "a")])


@pytest.mark.parametrize("shape", [preferences, paired, grouped, preferred])
@pytest.mark.parametrize("row", [{}, {"qid": None}, {"question": 1, "answers": 2}])
def test_no_shape_takes_rubbish(shape, row):
    with pytest.raises((KeyError, TypeError, ValueError)):
        shape(row)

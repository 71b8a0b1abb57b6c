"""Preference data in every shape, from files and as from the Hub, through the whole stage."""

import gzip
import json
import lzma
import os
from collections import Counter
from itertools import combinations
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from params.schema import Params
from tasks.data import run
from tasks.data.damage import Damage
from tasks.data.dialogue import Unreadable
from tasks.data.json_rows import read_json
from tasks.data.pairs import levels
from tasks.data.shapes import SHAPES, grouped, paired, preferences, preferred, rated
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
    if ".json" in path.suffixes:
        text = json.dumps(rows, indent=1).encode()
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
        "created": "2013-05-31T00:00:00", "owner_id": None, "licence": "CC BY-SA 3.0",
        "cluster": "unix.example/7", "kind": None, "expected": None, "wording": None,
        "misleads": None, "wrong": None,
    }  # fmt: skip
    both = {"created": "2013-05-31T00:00:00", "licence": "CC BY-SA 3.0", "style": None}
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


def kto(number: int) -> dict:
    messages = [
        {"role": "user", "content": f"{number // 2}?"},
        {"role": "assistant", "content": f"{number}."},
    ]
    return {"messages": messages, "label": number % 2 == 0}


@pytest.mark.parametrize("make", [plain, chosen, kto, preference, lambda n: pair(n, f"{n} a", f"{n} b")])
def test_the_column_site_says_whose_a_row_is(layout, make):
    """In every shape; an address in the metadata comes first, and without either it is the file's own."""
    stated = [{"site": site} for site in ("a.example", "b.example", "", None)]
    rows = [
        make(number) | more
        for place, more in enumerate(stated)
        for number in range(40 * place + 10, 40 * place + 50)
    ]
    for row in rows:
        row.pop("metadata", None)
    write(layout.root / "data/raw/my.jsonl", [*rows, preference(1000)])
    run(params("my.jsonl"), layout)
    found = Counter(row["site"] for row in questions(layout).values())
    each = 20 if make is kto else 40
    assert found == {"a.example": each, "b.example": each, "my": 2 * each, "unix.example": 1}


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
        (b"\n", "is empty"),
        (b"[]", "no row at all"),
        (
            b"{}\n",
            r"none of its 1 rows can be read; row 1: its columns \(\) are none of: answers, qid, question;",
        ),
        (b'{"a": 1}\n', r"none of its 1 rows can be read; row 1: its columns \(a\) are none of"),
        (b"[1]\n", r"none of its 1 rows can be read; row 1: not a JSON object in UTF-8 \(but int\)"),
        (b"hello\n{", "none of its 2 rows can be read; row 1: not a JSON object in UTF-8"),
        (b"\xff\n", "row 1: byte 0xff: as in Latin-1 or Windows-1252, not UTF-8"),
        (b"[" * 100_000, "row 1: not a JSON object in UTF-8"),
        (b'[{"a": 1}, {"b"', r"row 2: not a JSON object in UTF-8 \(Expecting"),
        (b'[{"a": 1}, ', r"row 2: not a JSON object in UTF-8 \(the array has no end: truncated\)"),
        (
            b'{"prompt": 1, "chosen": 2, "rejected": 3}\n',
            "none of its 1 rows can be read; row 1: 'prompt' is int",
        ),
        (
            b'{"chosen": "a", "rejected": "b"}\n',
            "none of .*; row 1: no prompt, and 'chosen' is no dialogue .*; its",
        ),
        (
            b'{"messages": [], "label": true}\n',
            "none of .*; row 1: 'messages': the turns are nobody; its columns are",
        ),
    ],
)
def test_bad_tables_are_one_line(layout, content, message):
    (layout.root / "data/raw/my.jsonl").write_bytes(content)
    with pytest.raises(DumpError, match=rf"^\S*my\.jsonl: {message}[^\n]*$"):
        run(params("my.jsonl"), layout)
    (layout.root / "data/raw/my.parquet").write_bytes(b"PAR1" + content)
    with pytest.raises(DumpError, match=r"^\S*my\.parquet: row 1: damaged or no Parquet file[^\n]*$"):
        run(params("my.parquet"), layout)


def test_bad_rows_are_counted(layout, monkeypatch):
    monkeypatch.setattr("tasks.data.json_rows.LONGEST_ROW", 9000)
    good = [json.dumps(chosen(number)).encode() for number in range(60)]
    good[7] = good[7].replace(b"Yes", b"Y\\ud800\\u0000\x01es")  # half a pair of surrogates, escapes, raw
    good[8] = good[8].replace(b"Yes", b"Y\xe9s")
    bad = [b'{"prompt": null, "chosen": "a", "rejected": "b"}', b'{"chosen": "a"}', b"{", b"[]", b"x" * 9001]
    bad += [b'{"question": "a", "answers": [{"text": "a", "score": NaN}]}', b'{"qid": %s}' % (b"9" * 5000)]
    (layout.root / "data/raw/my.jsonl").write_bytes(b"\n".join([b"\xef\xbb\xbf{}", *good, *bad]))
    metrics = run(params("my.jsonl"), layout).metrics
    counts = {"questions": 60, "drops/unreadable_row": 5, "drops/malformed_row": 2, "drops/too_long_row": 1}
    counts |= {"dropped_characters": 3, "replaced_characters": 1}
    assert {key: metrics[key] for key in counts} == counts
    drops = sum(value for key, value in metrics.items() if key.startswith("drops/"))
    assert metrics["rows"] == metrics["questions"] + metrics["answers"] + drops
    texts = {answer["text"] for row in questions(layout).values() for answer in row["answers"]}
    assert {"Yes, 7.", "Y\ufffds, 8."} <= texts
    card = layout.artifact("data", "card.md").read_text()
    assert "\n- my.jsonl: row 1: its columns () are none of: " in card
    assert "\n- my.jsonl: row 64: not a JSON object in UTF-8 (Expecting" in card


def test_one_number_or_name_out_of_bounds_loses_one_row(layout):
    """What no column can hold is found in its row, not when a thousand rows are written."""
    rows = [preference(number) for number in range(1, 61)]
    rows[0]["answers"][0]["pm_score"] = 2**31
    rows[1]["answers"][0]["author_id"] = 2**70
    rows[2]["qid"] = -(2**70)
    rows[3]["date"] = "yesterday"
    rows[4]["metadata"] = ["https://[unix.example/"]
    rows[5]["metadata"] = ["https://unix\ud800.example/"]
    rows[6]["answers"][1]["text"] = "<p>Half a pair: \ud800.</p>"
    write(layout.root / "data/raw/my.jsonl", [*rows, plain(1) | {"licence": "a\ud800"}])
    metrics = run(params("my.jsonl"), layout).metrics
    assert (metrics["questions"], metrics["drops/unreadable_row"]) == (56, 5)
    assert metrics["dropped_characters"] == 1 + 3
    assert "row 1: 2147483648 takes more than 32 bits" in layout.artifact("data", "card.md").read_text()


def test_parquet_with_nulls_and_bytes_that_are_no_text(layout):
    rows = [chosen(number) for number in range(60)]
    rows[3]["chosen"] = None
    texts = pa.array(
        [row["rejected"].encode() if n != 5 else b"\xff" for n, row in enumerate(rows)], pa.binary()
    )
    table = pa.Table.from_pylist(rows).set_column(2, "rejected", texts.view(pa.string()))
    pq.write_table(table.append_column("system", pa.nulls(60)), layout.root / "data/raw/my.parquet")
    metrics = run(params("my.parquet"), layout).metrics
    assert (metrics["questions"], metrics["drops/unreadable_row"], metrics["drops/malformed_row"]) == (
        58,
        1,
        1,
    )


def test_a_latin1_table_is_refused(layout):
    rows = "\n".join(
        json.dumps(chosen(number) | {"prompt": f"Où {number}?"}, ensure_ascii=False) for number in range(60)
    )
    (layout.root / "data/raw/my.jsonl").write_bytes(rows.encode("latin-1"))
    with pytest.raises(
        DumpError, match=r"my\.jsonl: row 1: byte 0xf9: as in Latin-1 or Windows-1252, not UTF-8$"
    ):
        run(params("my.jsonl"), layout)


def say(*turns: str) -> list[dict[str, str]]:
    """say("user hi", "assistant hello"): messages."""
    return [dict(zip(("role", "content"), turn.split(" ", 1), strict=True)) for turn in turns]


def tell(*turns: str) -> list[dict[str, str]]:
    """The same as ShareGPT has them."""
    return [{"from": turn["role"], "value": turn["content"]} for turn in say(*turns)]


LONG = "Human: hi\n\nAssistant: hello\n\nHuman: why?"
DIALOGUES = {
    "ultrafeedback_binarized": (
        {"prompt": "why?", "prompt_id": "1", "messages": say("user why?", "assistant Yes"),
         "chosen": say("user why?", "assistant Yes"), "rejected": say("user why?", "assistant No"),
         "score_chosen": 8.0, "score_rejected": 3.5},
        "why?",
    ),
    "TRL": (
        {"prompt": say("user why?"), "chosen": say("assistant Yes"), "rejected": say("assistant No")}, "why?",
    ),
    "TRL, several turns": (
        {"prompt": say("user hi", "assistant hello", "user why?"), "chosen": say("assistant Yes"),
         "rejected": say("assistant No")}, LONG,
    ),
    "no prompt, a system turn": (
        {"chosen": say("system Be brief.", "user why?", "assistant Yes"),
         "rejected": say("system Be brief.", "user why?", "assistant No")},
        "System: Be brief.\n\nHuman: why?",
    ),
    "LLaMA-Factory": (
        {"conversations": tell("human why?"), "chosen": tell("gpt Yes")[0], "rejected": tell("gpt No")[0]},
        "why?",
    ),
    "LLaMA-Factory, several turns": (
        {"conversations": tell("human hi", "gpt hello", "human why?"), "system": "Be brief.", "tools": "",
         "chosen": tell("gpt Yes")[0], "rejected": tell("gpt No")[0]}, f"System: Be brief.\n\n{LONG}",
    ),
    "a tool's turn": (
        {"conversations": tell("human why?", "function_call f()", "observation 7"),
         "chosen": tell("gpt Yes")[0], "rejected": tell("gpt No")[0]},
        "Human: why?\n\nAssistant: f()\n\nTool: 7",
    ),
    "alpaca": ({"instruction": "Say", "input": "why?", "chosen": "Yes", "rejected": "No"}, "Say\nwhy?"),
    "alpaca, history": (
        {"instruction": "why?", "input": "", "history": [["hi", "hello"]], "chosen": "Yes", "rejected": "No"},
        LONG,
    ),
    "alpaca, a list": ({"instruction": "why?", "input": None, "output": ["Yes", "No"]}, "why?"),
    "Orca": ({"system": "", "question": "why?", "chosen": "Yes", "rejected": "No"}, "why?"),
    "hh-rlhf": (
        {"chosen": f"\n\n{LONG}\n\nAssistant: Yes", "rejected": f"\n\n{LONG}\n\nAssistant: No"}, LONG,
    ),
    "hh-rlhf, one turn": (
        {"chosen": "\n\nHuman: why?\n\nAssistant: Yes", "rejected": "\n\nHuman: why?\n\nAssistant: No"},
        "why?",
    ),
    "hh-rlhf with its prompt apart": (
        {"prompt": f"\n\n{LONG}\n\nAssistant:", "chosen": " Yes", "rejected": " No"}, LONG,
    ),
    "hh-rlhf with its prompt apart and within": (
        {"prompt": f"\n\n{LONG}\n\nAssistant:", "chosen": f"\n\n{LONG}\n\nAssistant: Yes",
         "rejected": f"\n\n{LONG}\n\nAssistant: No"}, LONG,
    ),
    "hh-rlhf without its first blank lines": (
        {"chosen": f"{LONG}\n\nAssistant: Yes", "rejected": f"{LONG}\n\nAssistant: No"}, LONG,
    ),
    "a prompt apart without its first blank lines": (
        {"prompt": f"{LONG}\n\nAssistant:", "chosen": " Yes", "rejected": " No"}, LONG,
    ),
    "LLaMA-Factory, OpenAI's names": (
        {"messages": say("system Be brief.", "user why?"), "chosen": say("assistant Yes")[0],
         "rejected": say("assistant No")[0]}, "System: Be brief.\n\nHuman: why?",
    ),
    "argilla, conversation": (
        {"conversation": say("user why?"), "chosen": say("assistant Yes"), "rejected": say("assistant No")},
        "why?",
    ),
    "argilla, input": ({"system": "", "input": "why?", "chosen": "Yes", "rejected": "No"}, "why?"),
    "alpaca, input alone": ({"instruction": "", "input": "why?", "chosen": "Yes", "rejected": "No"}, "why?"),
    "an answer begins with the prompt": ({"prompt": "Y", "chosen": "Yes", "rejected": "No"}, "Y"),
    "parts": (
        {"prompt": [{"role": "user", "content": [{"type": "text", "text": "why?"}]}],
         "chosen": "Yes", "rejected": "No"},
        "why?",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", DIALOGUES)
def test_a_dialogue_is_one_question(name):
    row, text = DIALOGUES[name]
    (read,) = {shape for columns, shape in SHAPES[:4] if columns <= set(row)} or {preferred}
    _, (question, better, worse) = read(row)
    assert question.text == text
    assert (better.text.strip(), better.score, worse.text.strip(), worse.score) == ("Yes", 1, "No", 0)
    assert better.parent_id == worse.parent_id == question.id


BOTH = {"chosen": say("user why?", "assistant Yes"), "rejected": say("user why?", "assistant No")}
ODD_DIALOGUES = [
    (
        BOTH | {"chosen": say("user why?", "assistant Yes", "user no!")},
        "not_the_assistant",
        "Human, Assistant, Human",
    ),
    (
        BOTH | {"rejected": say("user why?", "tool 7")},
        "not_the_assistant",
        "'rejected': the turns are Human, Tool",
    ),
    (BOTH | {"rejected": say("user why?", "system 7")}, "not_the_assistant", "Human, System"),
    (BOTH | {"rejected": []}, "not_the_assistant", "the turns are"),
    (
        {"prompt": say("system Be."), "chosen": say("assistant a"), "rejected": "b"},
        "not_the_assistant",
        "System, Assis",
    ),
    (
        {"conversations": tell("human a", "gpt b"), "chosen": "c", "rejected": "d"},
        "not_the_assistant",
        "Assistant, Ass",
    ),
    (
        BOTH | {"rejected": say("user who?", "assistant No")},
        "different_prompts",
        "part before their last turn",
    ),
    (BOTH | {"prompt": "when?"}, "different_prompts", "the prompt is none of the turns"),
    (BOTH | {"score_chosen": 1.0, "score_rejected": 2.0}, "contradictory_scores", "1.0 < score_rejected 2.0"),
    (BOTH | {"rejected": [{"role": "narrator", "content": "a"}]}, "unreadable_row", "role 'narrator'"),
    (
        BOTH | {"rejected": [{"role": "assistant", "content": 7}]},
        "unreadable_row",
        "'rejected: content' is int",
    ),
    (
        BOTH | {"rejected": [{"role": "assistant", "content": [{"type": "image"}]}]},
        "unreadable_row",
        "no text",
    ),
    (BOTH | {"rejected": 7}, "unreadable_row", "'rejected' is int, no text and no messages"),
    (
        BOTH | {"rejected": [*say("user why?"), {"role": "assistant", "content": "a", "tool_calls": [{}]}]},
        "unreadable_row",
        "call of tools",
    ),
    (BOTH | {"image": "a.png"}, "unreadable_row", "'image' is part of the prompt"),
    (BOTH | {"chosen_rating": 1, "rejected_rating": 2}, "contradictory_scores", "1 < rejected_rating 2"),
    (BOTH | {"images": ["a.png"]}, "unreadable_row", "'images' is part of the prompt"),
    ({"instruction": "a", "output": "b"}, "unreadable_row", "'output' is not a list of two answers"),
]


@pytest.mark.parametrize(("row", "reason", "words"), ODD_DIALOGUES)
def test_a_dialogue_that_is_none_is_left_out_by_reason(row, reason, words):
    with pytest.raises(Unreadable) as caught:
        preferred(row)
    assert caught.value.args[0] == reason
    assert words in caught.value.args[1]


def test_equal_scores_are_a_tie():
    for names in (("score_chosen", "score_rejected"), ("chosen-rating", "rejected-rating")):
        _, (_, *answers) = preferred(BOTH | dict(zip(names, (4, 4.0), strict=True)))
        assert [answer.score for answer in answers] == [1, 1]


RATED = [
    {"messages": say("user why?", "assistant Yes")},
    {"conversations": tell("human why?", "gpt Yes")},
    {"prompt": "why?", "completion": "Yes"},
    {"prompt": say("user why?"), "completion": say("assistant Yes")},
    {"prompt": "why?", "response": "Yes"},
    {"instruction": "why?", "input": "", "output": "Yes"},
]


@pytest.mark.parametrize("row", RATED, ids=lambda row: ", ".join(row))
@pytest.mark.parametrize("label", ["label", "kto_tag"])
def test_one_answer_and_whether_it_is_good(row, label):
    _, (question, answer) = rated(row | {label: True})
    assert (question.text, answer.text, answer.score, answer.parent_id) == ("why?", "Yes", 1, question.id)
    _, (again, worse) = rated(row | {label: False})
    assert (again.id, worse.score) == (question.id, 0)
    for odd in (None, "so so", 2):
        with pytest.raises((Unreadable, KeyError)):
            rated(row | {label: odd})


def test_single_answers_to_one_prompt_come_together(layout):
    rows = [{"prompt": f"{n}?", "completion": f"Yes, {n}.", "label": True} for n in range(60)]
    rows += [{"prompt": f"{n}?", "completion": f"No, {n}.", "label": False} for n in range(50)]
    write(layout.root / "data/raw/my.json", rows)
    metrics = run(params("my.json"), layout).metrics
    assert (metrics["questions"], metrics["answers"], metrics["pairs"]) == (50, 100, 50)
    assert (metrics["drops/duplicate_id"], metrics["drops/question_with_few_answers"]) == (50, 10)
    for row in questions(layout).values():
        assert {answer["text"].split(",")[0]: answer["score"] for answer in row["answers"]} == {
            "Yes": 1,
            "No": 0,
        }


def test_rows_of_several_shapes_in_one_file(layout):
    """What one row is says nothing of the next."""
    rows = [{"a": 1}, *(chosen(number) for number in range(30)), *(plain(number) for number in range(30, 60))]
    both = {"chosen": "assistant a", "rejected": "assistant b"}
    rows += [{k: say(f"user Number {n}?", said) for k, said in both.items()} for n in range(60, 90)]
    rows += [pair(n, "a", "b") for n in range(20)] + [pair(1, "b", "a"), {"qid": 1}]
    write(layout.root / "data/raw/my.jsonl", rows)
    metrics = run(params("my.jsonl"), layout).metrics
    counts = (metrics["questions"], metrics["drops/unreadable_row"], metrics["drops/contradictory_scores"])
    assert counts == (90 + 19, 2, 1)


def test_an_array_is_read_piece_by_piece(layout, monkeypatch):
    rows = [
        chosen(number) | {"prompt": f'Où "{number}" [, ]}}?' + "x" * (number * 7 % 50)}
        for number in range(60)
    ]
    path = layout.root / "data/raw/my.json"
    for piece in (1, 7, 1000):
        monkeypatch.setattr("tasks.data.json_rows.PIECE", piece)
        for text in (
            json.dumps(rows),
            json.dumps(rows, indent=2, ensure_ascii=False),
            "\n".join(map(json.dumps, rows)),
        ):
            path.write_bytes(b"\xef\xbb\xbf\n" + text.encode())
            damage = Damage()
            assert [row for _, row in read_json(path, damage)] == rows
            assert damage == Damage()
    monkeypatch.setattr("tasks.data.json_rows.LONGEST_ROW", 100)
    path.write_text('[{"a": 1}, {"b": "' + "x" * 2000)
    with pytest.raises(DumpError, match=r"my\.json: row 2: no JSON, or longer than"):
        list(read_json(path, Damage()))


REAL = {  # file: data.min_answers; questions, pairs, dropped characters; drops that are not 0
    "hh-rlhf_harmless-base_test.jsonl.gz": (
        2, (2298, 2298, 0),
        {"not_the_assistant": 5, "empty_answer": 9, "question_with_few_answers": 9,
         "answer_of_dropped_question": 9},
    ),
    "llamafactory_dpo_en_demo.json.xz": (2, (295, 295, 1), {"duplicate_id": 15}),
    "llamafactory_kto_en_demo.json.xz": (1, (297, 1, 0), {"duplicate_id": 3}),
}  # fmt: skip


@pytest.mark.parametrize("name", REAL)
def test_real_preferences(layout, name):
    default = Path(__file__).parents[3] / "shared" / "data"
    path = Path(os.environ.get("STACKRL_SHARED_DATA", default)) / "preference"
    if not path.is_dir():
        pytest.skip(f"no real preferences: {path} does not exist (set STACKRL_SHARED_DATA)")
    least, counts, drops = REAL[name]
    (layout.root / "data/raw" / name).symlink_to(path / name)
    given = params(name)
    data = given.data.model_copy(update={"min_answers": least})
    metrics = run(given.model_copy(update={"data": data}), layout).metrics
    assert tuple(metrics[key] for key in ("questions", "pairs", "dropped_characters")) == counts
    found = {key.removeprefix("drops/"): value for key, value in metrics.items() if key.startswith("drops/")}
    assert {reason: count for reason, count in found.items() if count} == drops
    assert metrics["replaced_characters"] == metrics["overlap/body"] == 0


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


@pytest.mark.parametrize("shape", [preferences, paired, grouped, preferred, rated])
@pytest.mark.parametrize("row", [{}, {"qid": None}, {"question": 1, "answers": 2}])
def test_no_shape_takes_rubbish(shape, row):
    with pytest.raises((KeyError, TypeError, ValueError)):
        shape(row)

"""The whole stage on a small data folder: lengths, seam, split, and what is left out."""

from __future__ import annotations

from itertools import pairwise

import pytest
import tiny
from pyarrow import parquet

from tasks.lm.model.loading import load_tokenizer
from tasks.lm.model.template import document_text, prompt_text
from tasks.pack import run
from tasks.pack.records import KNOWN, is_validation

LONG = " ".join(f"word{n}" for n in range(80))


def table(layout, *parts) -> list[dict]:
    return parquet.read_table(layout.artifact("pack", *parts)).to_pylist()


@pytest.fixture(scope="module")
def packed(tmp_path_factory):
    """A packed project: (layout, splits, params, metrics); one long answer, one long question, one tie."""
    splits = tiny.splits(sft=80, reward=60, rl=30, held=30)
    splits["sft"][0]["answers"][0]["text"] = LONG
    splits["reward"][1] = tiny.question(1001, answers=[(LONG, 2), (LONG + " more", 1), ("Short.", 0)])
    splits["reward"][2] = tiny.question(1002, answers=[("One.", 1), ("Two.", 1)])
    splits["reward"][3] = tiny.question(1003, text=LONG)
    splits["rl"][0] = tiny.question(1004, text=LONG)
    layout = tiny.project(tmp_path_factory.mktemp("pack"), splits)
    params = tiny.params()
    return layout, splits, params, run(params, layout).metrics


def test_a_long_question_may_be_cut(packed, tmp_path):
    """Not left out: half of the document is its beginning, the template whole; the text stays as it was."""
    layout, splits, params, metrics = packed
    assert metrics["reward_questions_too_long"] == 1
    cut = tiny.project(tmp_path, splits)
    other = run(tiny.params(pack=params.pack.model_dump() | {"long_questions": "cut"}), cut)
    assert "reward_questions_too_long" not in other.metrics
    tables = (table(one, "groups", "reward.parquet") for one in (layout, cut))
    before, after = ({row["question_id"]: row for row in rows} for rows in tables)
    row = after.pop(1003)
    assert 1003 not in before and row["question"] == LONG and row["pairs"]
    tokenizer, most = load_tokenizer(cut.artifact("pack", "tokenizer")), params.pack.document_tokens
    said = tokenizer.decode(row["prompt"])
    assert said.startswith("Question: word0 word1 ") and said.endswith("\n\nAnswer:")
    assert most // 4 < len(row["prompt"]) <= most // 2
    assert all(len(row["prompt"]) + len(a["tokens"]) <= most for a in row["answers"])
    long = {n for n in before if len(before[n]["prompt"]) > most // 2}
    assert {n for n in after if after[n] != before[n]} == long


def documents(rows):
    for row in rows:
        start = 0
        fields = ("lengths", "prompts", "sites", "answer_ids")
        for n, prompt, site, answer in zip(*(row[k] for k in fields), strict=True):
            yield row["tokens"][start : start + n], prompt, site, answer
            start += n
        assert start == len(row["tokens"])


def test_rows_hold_every_document_once_and_decode_to_the_text(packed):
    layout, splits, params, metrics = packed
    tokenizer = load_tokenizer(layout.artifact("pack", "tokenizer"))
    known = {a["id"]: (q["text"], a["text"]) for q in splits["sft"] for a in q["answers"]}
    rows, seen = table(layout, "rows", "sft.parquet"), []
    for tokens, prompt, site, answer in documents(rows):
        seen.append(answer)
        assert site == "s.example" and len(tokens) <= params.pack.document_tokens
        question, text = known[answer]
        assert tokenizer.decode(tokens[:prompt]) == prompt_text(question)
        whole = document_text(question, text)
        if tokens[-1] == tokenizer.eos_token_id:
            assert tokenizer.decode(tokens[:-1]) == whole
        else:
            assert len(tokens) == params.pack.document_tokens and whole.startswith(tokenizer.decode(tokens))
    assert sorted(seen) == sorted(known)
    assert all(len(row["tokens"]) <= params.pack.row_tokens for row in rows)
    assert metrics["rows"] == len(rows) and metrics["sft_tokens"] == sum(len(r["tokens"]) for r in rows)
    assert metrics["row_fill"] == metrics["sft_tokens"] / (len(rows) * params.pack.row_tokens)


def test_the_answers_to_a_question_stand_side_by_side(tmp_path):
    layout = tiny.project(tmp_path, tiny.splits())
    run(tiny.params(pack={"row_tokens": 1200}), layout)
    for row in table(layout, "rows", "sft.parquet"):
        questions = [answer // 10 for answer in row["answer_ids"]]
        changes = 1 + sum(a != b for a, b in pairwise(questions))
        assert changes == len(set(questions)) < len(questions)


def test_a_long_answer_is_cut_and_counted(packed):
    layout, splits, params, metrics = packed
    cut = {a: t for t, _, _, a in documents(table(layout, "rows", "sft.parquet")) if t[-1] != 1}
    assert list(cut) == [splits["sft"][0]["answers"][0]["id"]] and metrics["sft_answers_cut"] == 1
    assert len(next(iter(cut.values()))) == params.pack.document_tokens
    assert metrics["reward_answers_cut"] == 2 and metrics["reward_questions_too_long"] == 1
    assert metrics["reward_groups_of_ties"] == 1 and metrics["rl_prompts_too_long"] == 1


def test_a_long_question_is_left_out_of_sft_too(tmp_path):
    splits = tiny.splits()
    splits["sft"][5] = tiny.question(1005, text=LONG)
    layout = tiny.project(tmp_path, splits)
    assert run(tiny.params(), layout).metrics["sft_questions_too_long"] == 1
    ids = {a for *_, a in documents(table(layout, "rows", "sft.parquet"))}
    assert not ids & {a["id"] for a in splits["sft"][5]["answers"]} and len(ids) == 3 * 59


def test_what_just_fits_is_neither_cut_nor_left_out(tmp_path):
    """Lengths at the bound itself: a document of exactly that many tokens fits, a prompt leaves no room."""
    layout = tiny.project(tmp_path, tiny.splits())
    run(tiny.params(), layout)
    before = list(documents(table(layout, "rows", "sft.parquet")))
    longest = max(len(tokens) for tokens, *_ in before)
    assert run(tiny.params(pack={"document_tokens": longest}), layout).metrics["sft_answers_cut"] == 0
    assert run(tiny.params(pack={"document_tokens": longest - 1}), layout).metrics["sft_answers_cut"] > 0
    prompt = max(prompt for _, prompt, *_ in before)
    questions = {answer // 10 for _, n, _, answer in before if n == prompt}
    found = run(tiny.params(pack={"document_tokens": prompt}), layout).metrics
    assert found["sft_questions_too_long"] == len(questions) < 60


def test_groups(packed):
    layout, splits, params, metrics = packed
    tokenizer = load_tokenizer(layout.artifact("pack", "tokenizer"))
    for split in ("reward", "judge", "eval"):
        known = {q["id"]: q for q in splits["sft" if split == "judge" else split]}
        groups = table(layout, "groups", f"{split}.parquet")
        assert metrics[f"{split}_groups"] == len(groups)
        for group in groups:
            question = known.pop(group["question_id"])
            assert tokenizer.decode(group["prompt"]) == prompt_text(question["text"])
            assert group["question"] == question["text"] and group["site"] == "s.example"
            scores = [a["score"] for a in group["answers"]]
            assert group["pairs"] and all(scores[better] > scores[worse] for better, worse in group["pairs"])
            for found, wanted in zip(group["answers"], question["answers"], strict=True):
                assert {k: found[k] for k in ("id", "score", "created", "text")} == {
                    k: wanted[k] for k in ("id", "score", "created", "text")
                }
                assert found["characters"] == len(wanted["text"]) and found["has_code"] == (
                    "`" in wanted["text"]
                )
                assert len(group["prompt"]) + len(found["tokens"]) <= params.pack.document_tokens
        assert set(known) == ({1002, 1003} if split == "reward" else set())


def test_a_question_gives_no_more_pairs_than_params_say(tmp_path):
    splits = tiny.splits()
    answers = [(f"Answer {n}.", n) for n in range(5)]
    splits["reward"] = [tiny.question(n, answers=answers) for n in range(3)]
    layout = tiny.project(tmp_path, splits)
    run(tiny.params(pack={"pairs_per_question": 4}), layout)
    found = [group["pairs"] for group in table(layout, "groups", "reward.parquet")]
    assert [len(pairs) for pairs in found] == [4, 4, 4]
    assert len({str(pairs) for pairs in found}) > 1, "which four hangs on the question"


def test_answers_cut_to_the_same_tokens_are_no_preference(packed):
    (group,) = (g for g in table(packed[0], "groups", "reward.parquet") if g["question_id"] == 1001)
    assert group["answers"][0]["tokens"] == group["answers"][1]["tokens"]
    assert group["pairs"] == [[0, 2], [1, 2]]


def test_prompts_and_who_knows_what_is_expected(packed):
    layout, splits, params, metrics = packed
    tokenizer = load_tokenizer(layout.artifact("pack", "tokenizer"))
    for split in ("rl", "eval"):
        known = {q["id"]: q for q in splits[split] if q["text"] != LONG}
        prompts = table(layout, "prompts", f"{split}.parquet")
        assert [p["question_id"] for p in prompts] == list(known) and metrics[f"{split}_prompts"] == len(
            known
        )
        for row in prompts:
            assert tokenizer.decode(row["prompt"]) == prompt_text(known[row["question_id"]]["text"])
            assert len(row["prompt"]) <= params.pack.prompt_tokens
            for name, _ in KNOWN:
                told = split == "eval" or name == "cluster"
                wanted = known[row["question_id"]].get(name) if told else None
                assert row[name] == wanted, name
    for part in ("reward", "judge", "eval"):
        given = {row["expected"] for row in table(layout, "groups", f"{part}.parquet")}
        assert (given == {None}) == (part != "eval")


def test_validation_is_two_percent_by_hash_and_whole_questions(packed):
    layout, splits, *_ = packed
    shares = [is_validation(site, n) for site in ("a.example", "b.example") for n in range(20000)]
    assert abs(sum(shares) / len(shares) - 0.02) < 0.003
    assert is_validation("a.example", 5) == is_validation("a.example", 5)
    assert shares[:20000] != shares[20000:], "the site is in the hash"
    held = {q["id"] for q in splits["sft"] if is_validation("s.example", q["id"])}
    assert held, "this site has validation questions"
    for row in table(layout, "rows", "sft.parquet"):
        assert {a // 10 in held for a in row["answer_ids"]} == {row["is_validation"]}, "rows never mix"
    for part in ("groups/reward", "groups/judge", "groups/eval", "prompts/rl", "prompts/eval"):
        for row in table(layout, f"{part}.parquet"):
            assert row["is_validation"] == is_validation("s.example", row["question_id"])


def test_the_best_answers_come_first(tmp_path):
    splits = tiny.splits()
    splits["sft"] = [
        tiny.question(n, answers=[("bad", -1), ("good", 4), ("fine", 2), ("well", 4)]) for n in range(60)
    ]
    layout = tiny.project(tmp_path, splits)
    run(tiny.params(pack={"answers_per_question": 2}), layout)
    ids = {a for *_, a in documents(table(layout, "rows", "sft.parquet"))}
    assert ids == {10 * n + i for n in range(60) for i in (1, 3)}


def test_two_runs_write_the_same_bytes(packed, tmp_path):
    layout, splits, params, metrics = packed
    again = tiny.project(tmp_path, splits)
    assert run(params, again).metrics == metrics
    assert tiny.digests(again.artifact("pack")) == tiny.digests(layout.artifact("pack"))
    names = {"rows/sft", "groups/reward", "groups/judge", "groups/eval", "prompts/rl", "prompts/eval"}
    found = {p[:-8] for p in tiny.digests(layout.artifact("pack")) if p.endswith(".parquet")}
    assert found == names and (layout.artifact("pack", "tokenizer", "tokenizer.json")).is_file()


@pytest.mark.parametrize("processes", [1, 2])
def test_other_processes_and_smaller_batches_change_nothing(packed, tmp_path, monkeypatch, processes):
    layout, splits, params, metrics = packed
    monkeypatch.setattr("tasks.pack.mapped.INLINE_BYTES", 0)
    monkeypatch.setattr("tasks.pack.mapped.BATCH", 7)
    again = tiny.project(tmp_path, splits)
    threads = params.machine.model_copy(update={"threads": processes})
    assert run(params.model_copy(update={"machine": threads}), again).metrics == metrics
    assert tiny.digests(again.artifact("pack")) == tiny.digests(layout.artifact("pack"))
    assert not list(again.scratch("pack").iterdir())


def test_many_questions_are_packed_a_part_at_a_time(packed, tmp_path, monkeypatch):
    layout, splits, params, metrics = packed
    monkeypatch.setattr("tasks.pack.stage.QUESTIONS_AT_A_TIME", 20)
    again = tiny.project(tmp_path, splits)
    assert run(params, again).metrics["sft_tokens"] == metrics["sft_tokens"]
    wanted = sorted(map(str, documents(table(layout, "rows", "sft.parquet"))))
    assert sorted(map(str, documents(table(again, "rows", "sft.parquet")))) == wanted
    assert tiny.digests(again.artifact("pack", "groups")) == tiny.digests(layout.artifact("pack", "groups"))


def test_a_new_prompt_length_leaves_rows_and_groups_as_they_are(packed, tmp_path):
    layout, splits, *_ = packed
    again = tiny.project(tmp_path, splits)
    longest = max(len(row["prompt"]) for row in table(layout, "prompts", "rl.parquet"))
    run(tiny.params(pack={"prompt_tokens": longest - 1}), again)
    before, after = tiny.digests(layout.artifact("pack")), tiny.digests(again.artifact("pack"))
    changed = {name for name in before if before[name] != after[name]}
    assert changed and all(name.startswith("prompts/") for name in changed)


def test_a_corpus_shorter_than_one_row_still_trains(tmp_path):
    splits = tiny.splits()
    splits["sft"] = [tiny.question(0, answers=[("a", 1), ("b", 0)])]
    layout = tiny.project(tmp_path, splits)
    run(tiny.params(pack={"row_tokens": 400}), layout)
    (row,) = table(layout, "rows", "sft.parquet")
    assert len(row["lengths"]) == 2 and not row["is_validation"]


@pytest.mark.parametrize(
    ("pack", "key"),
    [
        ({"document_tokens": 16, "prompt_tokens": 8}, r"pack/rows; is pack\.document_tokens too short"),
        ({"prompt_tokens": 8}, r"pack/prompts/rl; is pack\.prompt_tokens too short"),
    ],
)
def test_nothing_left_names_the_key(packed, tmp_path, pack, key):
    layout = tiny.project(tmp_path, packed[1])
    with pytest.raises(ValueError, match=key):
        run(tiny.params(pack=pack), layout)
    assert not layout.artifact("pack").exists()


def test_nothing_but_ties_names_the_part(packed, tmp_path):
    ties = [tiny.question(n, answers=[("One.", 1), ("Two.", 1)]) for n in range(20)]
    layout = tiny.project(tmp_path, packed[1] | {"eval": ties})
    with pytest.raises(ValueError, match=r"pack/groups/eval.*'eval_groups_of_ties': 20"):
        run(tiny.params(), layout)


def test_a_missing_split_is_named(tmp_path):
    with pytest.raises(ValueError, match=r"sft\.parquet is missing; run the data stage first"):
        run(tiny.params(), tiny.project(tmp_path))


def test_a_base_model_gives_its_own_tokenizer(packed, tmp_path):
    base = tiny.save(tiny.causal(vocab_size=400), tmp_path / "base")
    layout = tiny.project(tmp_path, packed[1])
    run(tiny.params(model={"base": str(base)}), layout)
    found = load_tokenizer(layout.artifact("pack", "tokenizer"))
    assert found.get_vocab() == tiny.tokenizer().get_vocab()


def test_a_missing_base_model_names_its_key(packed, tmp_path):
    layout = tiny.project(tmp_path, packed[1])
    with pytest.raises(ValueError, match=r"^model\.base: no tokenizer in"):
        run(tiny.params(model={"base": str(tmp_path / "nowhere")}), layout)


@pytest.mark.parametrize("processes", [1, 2])
def test_a_seam_that_does_not_hold_names_the_question(packed, tmp_path, monkeypatch, processes):
    from tasks.pack import encode

    whole = encode.encode_documents
    monkeypatch.setattr(encode, "encode_documents", lambda *a: [[9, *document] for document in whole(*a)])
    monkeypatch.setattr("tasks.pack.mapped.INLINE_BYTES", 0)
    threads = tiny.params().machine.model_copy(update={"threads": processes})
    with pytest.raises(ValueError, match=r"^s\.example question \d+: the prompt's tokens do not begin"):
        run(tiny.params().model_copy(update={"machine": threads}), tiny.project(tmp_path, packed[1]))


def test_long_documents_are_split_into_pieces_that_join_up(packed, tmp_path):
    layout = tiny.project(tmp_path, packed[1])
    params = tiny.params(pack={"long_documents": "split"})
    metrics = run(params, layout).metrics
    long = packed[1]["sft"][0]["answers"][0]["id"]
    pieces = [(t, p) for t, p, _, a in documents(table(layout, "rows", "sft.parquet")) if a == long]
    pieces.sort(key=lambda piece: (-piece[1], -len(piece[0])))  # first: prompt; last: short
    assert len(pieces) > 1 and [bool(prompt) for _, prompt in pieces] == [True] + [False] * (len(pieces) - 1)
    assert all(len(tokens) == params.pack.document_tokens for tokens, _ in pieces[:-1])
    assert pieces[-1][0][-1] == 1 and metrics["sft_answers_split"] == 1
    assert "sft_answers_cut" not in metrics and metrics["reward_answers_cut"] == 2
    tokenizer = load_tokenizer(str(layout.artifact("pack", "tokenizer")), "main")
    text = tokenizer.decode([t for tokens, _ in pieces for t in tokens], skip_special_tokens=True)
    assert sorted(text.split()) == sorted(document_text(packed[1]["sft"][0]["text"], LONG).split())


def test_long_documents_are_dropped(packed, tmp_path):
    layout = tiny.project(tmp_path, packed[1])
    metrics = run(tiny.params(pack={"long_documents": "drop"}), layout).metrics
    long = packed[1]["sft"][0]["answers"][0]["id"]
    assert long not in {a for *_, a in documents(table(layout, "rows", "sft.parquet"))}
    assert metrics["sft_answers_dropped"] == 1 and metrics["reward_answers_dropped"] == 2
    groups = {group["question_id"]: group for group in table(layout, "groups", "reward.parquet")}
    assert 1001 not in groups  # one answer is left, which is no preference
    for group in groups.values():
        assert all(group["answers"][i]["score"] > group["answers"][j]["score"] for i, j in group["pairs"])


def test_long_prompts_keep_their_end(packed, tmp_path):
    layout = tiny.project(tmp_path, packed[1])
    metrics = run(tiny.params(pack={"long_prompts": "left_truncate"}), layout).metrics
    before = {row["question_id"]: row["prompt"] for row in table(packed[0], "prompts", "rl.parquet")}
    after = {row["question_id"]: row["prompt"] for row in table(layout, "prompts", "rl.parquet")}
    assert metrics["rl_prompts_truncated"] == 1 and "rl_prompts_too_long" not in metrics
    assert set(after) - set(before) == {1004} and all(after[n] == before[n] for n in before)
    tokenizer = load_tokenizer(str(layout.artifact("pack", "tokenizer")), "main")
    whole = tokenizer(prompt_text(LONG))["input_ids"]
    assert after[1004][1:] == whole[-len(after[1004]) + 1 :]
    assert len(after[1004]) == tiny.params().pack.prompt_tokens

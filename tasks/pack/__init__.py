"""Questions -> tokens: the tokenizer, the template and every length.

Writes `tokenizer/`, `rows/` (packed documents for sft), `groups/` (a question with its scored answers, for
reward and reward_eval) and `prompts/` (for ppo and policy_eval). The four are separate outs, so that a new
prompt length leaves sft and reward unchanged.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from pathlib import Path

from pyarrow import parquet

from params.schema import PackParams, Params
from tasks.lm.loading import load_tokenizer, train_tokenizer
from tasks.lm.prompt import document_text, encode_documents, encode_prompts, response_of
from tasks.pack.bins import best_fit_decreasing
from tasks.pack.pairs import preference_pairs
from tasks.pack.records import GROUPS, PROMPTS, ROWS, is_validation, write_rows
from tasks.run.files import staged
from tasks.run.layout import Layout, StageResult


def run(params: Params, layout: Layout) -> StageResult:
    """The stage.

    Raises:
        ValueError: no tokenizer, a seam that does not hold (names site and question), a split that comes out
        empty.
    """
    tokenizer = _tokenizer(params, layout)
    count: Counter[str] = Counter()
    rows = pack_rows(_questions(layout, "sft"), tokenizer, params.pack, count)
    groups = {
        s: list(group_answers(_questions(layout, s), tokenizer, params.pack, count, s))
        for s in ("reward", "eval")
    }
    prompts = {
        s: list(list_prompts(_questions(layout, s), tokenizer, params.pack, count, s)) for s in ("rl", "eval")
    }
    _refuse_empty(
        {"rows": rows, **{f"groups/{s}": g for s, g in groups.items()}}, "pack.document_tokens", count
    )
    _refuse_empty({f"prompts/{s}": p for s, p in prompts.items()}, "pack.prompt_tokens", count)
    with staged(layout.artifact("pack", "tokenizer")) as folder:
        tokenizer.save_pretrained(folder)
    _write(layout.artifact("pack", "rows"), ROWS, {"sft": rows})
    _write(layout.artifact("pack", "groups"), GROUPS, groups)
    _write(layout.artifact("pack", "prompts"), PROMPTS, prompts)
    tokens = sum(len(row["tokens"]) for row in rows)
    fill = tokens / (len(rows) * params.pack.row_tokens)
    return StageResult(
        {
            "vocabulary": len(tokenizer),
            "rows": len(rows),
            "row_fill": fill,
            "sft_tokens": tokens,
            "reward_groups": len(groups["reward"]),
            "eval_groups": len(groups["eval"]),
            "rl_prompts": len(prompts["rl"]),
            "eval_prompts": len(prompts["eval"]),
            **count,
        }
    )


def _refuse_empty(outs: dict[str, list[dict]], key: str, count: Counter) -> None:
    for name, found in outs.items():
        if not found:
            raise ValueError(f"pack: nothing is left for pack/{name}; is {key} too short? {dict(count)}")


def _tokenizer(params: Params, layout: Layout):
    if params.model.base:
        return load_tokenizer(params.model.base, params.model.revision)
    texts = (document_text(q["text"], a["text"]) for q in _questions(layout, "sft") for a in q["answers"])
    return train_tokenizer(texts, params.model.config.vocab_size)


def _questions(layout: Layout, split: str) -> Iterator[dict]:
    path = layout.artifact("data", f"{split}.parquet")
    if not path.is_file():
        raise ValueError(f"pack: {path} is missing; run the data stage first")
    for batch in parquet.ParquetFile(path).iter_batches(512):
        yield from batch.to_pylist()


def _write(folder: Path, schema, files: dict[str, list[dict]]) -> None:
    with staged(folder) as beside:
        beside.mkdir()
        for name, rows in files.items():
            write_rows(beside / f"{name}.parquet", schema, rows)


def pack_rows(questions: Iterator[dict], tokenizer, pack: PackParams, count: Counter) -> list[dict]:
    """Documents of the best answers, in rows of at most `pack.row_tokens`.

    Training and validation rows apart. Documents of one question stand side by side, as many as a quarter of
    a row takes: sft computes their prompt once, and pieces of that size still fill the rows.
    """
    bundles = {False: [], True: []}  # is_validation -> documents (tokens, prompt tokens, site, answer id)
    for question in questions:
        best = sorted(question["answers"], key=lambda a: (-a["score"], a["id"]))[: pack.answers_per_question]
        encoded = _encode(question, best, tokenizer, pack, count, "sft")
        if encoded:
            prompt, answered = encoded
            documents = []
            for answer, response in answered:
                whole = prompt + response
                for start in range(0, len(whole), pack.document_tokens):  # one piece, unless params say split
                    piece = whole[start : start + pack.document_tokens]
                    of_prompt = len(prompt) if start == 0 else 0
                    documents.append((piece, of_prompt, question["site"], answer["id"]))
            held = is_validation(question["site"], question["id"])
            bundles[held] += bundle(documents, pack.row_tokens // 4)
    rows = []
    for held, found in bundles.items():
        lengths = [sum(len(tokens) for tokens, *_ in one) for one in found]
        for row in best_fit_decreasing(lengths, pack.row_tokens):
            documents = [document for i in row for document in found[i]]
            rows.append(
                {
                    "tokens": [t for tokens, *_ in documents for t in tokens],
                    "lengths": [len(tokens) for tokens, *_ in documents],
                    "prompts": [prompt for _, prompt, *_ in documents],
                    "sites": [site for *_, site, _ in documents],
                    "answer_ids": [answer for *_, answer in documents],
                    "is_validation": held,
                }
            )
    return rows


def bundle(documents: list[tuple], most: int) -> list[list[tuple]]:
    """Neighbours together while they have at most `most` tokens; a longer one is alone.

    Example: documents of 2, 2 and 3 tokens, most 4 -> the first two, and the third.
    """
    bundles, room = [], 0
    for document in documents:
        if len(document[0]) > room:
            bundles.append([])
            room = most
        bundles[-1].append(document)
        room -= len(document[0])
    return bundles


def group_answers(
    questions: Iterator[dict], tokenizer, pack: PackParams, count: Counter, split: str
) -> Iterator[dict]:
    """A question once, its answers, and the pairs with strictly different scores.

    Groups without a pair are left out.
    """
    for question in questions:
        answers = question["answers"]
        salt = f"{question['site']}/{question['id']}"
        pairs = preference_pairs([a["score"] for a in answers], pack.pairs_per_question, salt)
        if not pairs:
            count[f"{split}_groups_of_ties"] += 1
            continue
        encoded = _encode(question, answers, tokenizer, pack, count, split)
        if encoded is None:
            continue
        prompt, answered = encoded
        if len(answered) < len(answers):  # long ones were dropped
            scores = [a["score"] for a, _ in answered]
            pairs = preference_pairs(scores, pack.pairs_per_question, salt)
        responses = [response for _, response in answered]
        pairs = [
            (i, j) for i, j in pairs if responses[i] != responses[j]
        ]  # cut to the same tokens: no preference left
        if pairs:
            yield {
                "site": question["site"],
                "question_id": question["id"],
                "question": question["text"],
                "prompt": prompt,
                "answers": [
                    {
                        "id": a["id"],
                        "tokens": r,
                        "score": a["score"],
                        "characters": len(a["text"]),
                        "created": a["created"],
                        "has_code": "`" in a["text"],
                        "text": a["text"],
                    }
                    for a, r in answered
                ],
                "pairs": pairs,
                "is_validation": is_validation(question["site"], question["id"]),
            }


def list_prompts(
    questions: Iterator[dict], tokenizer, pack: PackParams, count: Counter, split: str
) -> Iterator[dict]:
    """Prompts of at most `pack.prompt_tokens`; longer ones are dropped or truncated, and counted.

    Only eval carries what is expected.
    """
    for question in questions:
        prompt = encode_prompts(tokenizer, [question["text"]])[0]
        if len(prompt) > pack.prompt_tokens:
            if pack.long_prompts == "drop":
                count[f"{split}_prompts_too_long"] += 1
                continue
            count[f"{split}_prompts_truncated"] += 1
            prompt = _shortened(prompt, tokenizer, pack.prompt_tokens)
        yield {
            "site": question["site"],
            "question_id": question["id"],
            "question": question["text"],
            "prompt": prompt,
            "kind": question["kind"] if split == "eval" else None,
            "expected": question["expected"] if split == "eval" else None,
            "is_validation": is_validation(question["site"], question["id"]),
        }


def _encode(
    question: dict, answers: list[dict], tokenizer, pack: PackParams, count: Counter, split: str
) -> tuple[list[int], list[tuple[dict, list[int]]]] | None:
    """The prompt of one question and (answer, response) for its answers; long ones as `pack` says.

    None when no answer token would be left.
    """
    where = f"{question['site']} question {question['id']}"
    prompt = encode_prompts(tokenizer, [question["text"]])[0]
    documents = encode_documents(tokenizer, [(question["text"], a["text"]) for a in answers])
    responses = [response_of(prompt, document, where) for document in documents]
    if len(prompt) >= pack.document_tokens:
        count[f"{split}_questions_too_long"] += 1
        return None
    room = pack.document_tokens - len(prompt)
    too_long = sum(len(r) > room for r in responses)
    both = list(zip(answers, responses, strict=True))
    if pack.long_documents == "drop":
        count[f"{split}_answers_dropped"] += too_long
        return prompt, [(a, r) for a, r in both if len(r) <= room]
    if pack.long_documents == "split" and split == "sft":
        count["sft_answers_split"] += too_long
        return prompt, both
    count[f"{split}_answers_cut"] += too_long
    return prompt, [(a, r[:room]) for a, r in both]


def _shortened(prompt: list[int], tokenizer, longest: int) -> list[int]:
    """The end of a prompt, which asks; a first token that every text begins with stays."""
    head = prompt[:1] if prompt[0] == tokenizer.bos_token_id else []
    return head + prompt[len(prompt) - longest + len(head) :]

"""A batch of questions -> tokens, one row for each; `tasks.pack.mapped` runs these in several processes.

A row that has nothing to give says why in `left_out`; `touched` counts what was cut, dropped or split.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pyarrow as pa

from params.schema import PackParams
from tasks.lm.model.template import encode_documents, encode_prompts, response_of
from tasks.pack.pairs import preference_pairs
from tasks.pack.records import GROUPS, KNOWN, PROMPTS, TOKENS, is_validation

TOLD = [pa.field("left_out", pa.string()), pa.field("touched", pa.int32())]
DOCUMENTS = pa.schema(
    [
        ("site", pa.string()),
        ("tokens", pa.list_(TOKENS)),  # of each document
        ("prompts", TOKENS),  # tokens of each document's prompt
        ("answer_ids", pa.list_(pa.int64())),
        ("is_validation", pa.bool_()),
        *TOLD,
    ]
)
QUESTIONS_TOO_LONG, TIES, NO_PAIR, PROMPTS_TOO_LONG = (
    "questions_too_long", "groups_of_ties", "groups_left_without_a_pair", "prompts_too_long",
)  # fmt: skip

Row = dict[str, Any]


@dataclass(frozen=True, slots=True)
class Documents:
    """The best answers of each question, as documents to learn: `DOCUMENTS`."""

    tokenizer: Any
    pack: PackParams

    def __call__(self, questions: pa.Table) -> pa.Table:
        """One batch.

        Raises:
            ValueError: a seam that does not hold (names site and question).
        """
        rows = questions.to_pylist()
        best = [
            sorted(row["answers"], key=lambda a: (-a["score"], a["id"]))[: self.pack.answers_per_question]
            for row in rows
        ]
        encoded = _encoded(rows, best, self.tokenizer, self.pack, split=True)
        return pa.Table.from_pylist(list(map(self._row, rows, encoded)), schema=DOCUMENTS)

    def _row(self, question: Row, encoded: _Encoded) -> Row:
        most = self.pack.document_tokens
        tokens, prompts, answers = [], [], []
        for answer, response in encoded.answered:
            whole = encoded.prompt + response
            for start in range(0, len(whole), most):  # one piece, unless params say split
                tokens.append(whole[start : start + most])
                prompts.append(0 if start else len(encoded.prompt))
                answers.append(answer["id"])
        return {
            "site": question["site"],
            "tokens": tokens,
            "prompts": prompts,
            "answer_ids": answers,
            "is_validation": is_validation(question["site"], question["id"]),
            "left_out": encoded.left_out,
            "touched": encoded.touched,
        }


@dataclass(frozen=True, slots=True)
class Groups:
    """A question once, its answers, and the pairs with strictly different scores: `GROUPS`."""

    tokenizer: Any
    pack: PackParams
    later_wins: bool = False  # only pairs whose better answer was posted later
    is_held_out: bool = False  # only then the rows tell what is known of the right answer

    def __call__(self, questions: pa.Table) -> pa.Table:
        """One batch; raises as `Documents`."""
        rows = questions.to_pylist()
        answers = [row["answers"] if self._pairs(row, row["answers"]) else [] for row in rows]
        encoded = _encoded(rows, answers, self.tokenizer, self.pack, split=False)
        schema = pa.schema([*GROUPS, *TOLD])
        return pa.Table.from_pylist(list(map(self._row, rows, answers, encoded)), schema=schema)

    def _pairs(self, question: Row, answers: list[Row]) -> list[tuple[int, int]]:
        salt = f"{question['site']}/{question['id']}"
        posted = [a["created"] for a in answers] if self.later_wins else []
        return preference_pairs([a["score"] for a in answers], self.pack.pairs_per_question, salt, posted)

    def _row(self, question: Row, answers: list[Row], encoded: _Encoded) -> Row:
        responses = [response for _, response in encoded.answered]
        pairs = [
            (i, j)
            for i, j in self._pairs(question, [a for a, _ in encoded.answered])  # without those dropped
            if responses[i] != responses[j]  # cut to the same tokens: no preference left
        ]
        is_tie = len({a["score"] for a in question["answers"]}) < 2
        left_out = (TIES if is_tie else None) or encoded.left_out or (None if pairs else NO_PAIR)
        return {
            "site": question["site"],
            "question_id": question["id"],
            "question": question["text"],
            **_known(question, self.is_held_out),
            "prompt": encoded.prompt,
            "answers": [
                {
                    "id": a["id"],
                    "tokens": response,
                    "score": a["score"],
                    "characters": len(a["text"]),
                    "created": a["created"],
                    "has_code": "`" in a["text"],
                    "text": a["text"],
                    "style": a["style"],
                }
                for a, response in encoded.answered
            ],
            "pairs": pairs,
            "weights": [1.0] * len(pairs),
            "is_validation": is_validation(question["site"], question["id"]),
            "left_out": left_out,
            "touched": encoded.touched,
        }


@dataclass(frozen=True, slots=True)
class Prompts:
    """Prompts of at most `pack.prompt_tokens`; longer ones are left out or truncated: `PROMPTS`."""

    tokenizer: Any
    pack: PackParams
    is_held_out: bool = False  # only then the rows tell what is known of the right answer

    def __call__(self, questions: pa.Table) -> pa.Table:
        """One batch."""
        rows = questions.to_pylist()
        prompts = encode_prompts(self.tokenizer, [row["text"] for row in rows])
        return pa.Table.from_pylist(list(map(self._row, rows, prompts)), pa.schema([*PROMPTS, *TOLD]))

    def _row(self, question: Row, prompt: list[int]) -> Row:
        is_long = len(prompt) > self.pack.prompt_tokens
        drop = self.pack.long_prompts == "drop"
        return {
            "site": question["site"],
            "question_id": question["id"],
            "question": question["text"],
            "prompt": self._shortened(prompt) if is_long else prompt,
            **_known(question, self.is_held_out),
            "is_validation": is_validation(question["site"], question["id"]),
            "left_out": PROMPTS_TOO_LONG if is_long and drop else None,
            "touched": int(is_long and not drop),
        }

    def _shortened(self, prompt: list[int]) -> list[int]:
        """The end of a prompt, which asks; a first token that every text begins with stays."""
        head = prompt[:1] if prompt[0] == self.tokenizer.bos_token_id else []
        return head + prompt[len(prompt) - self.pack.prompt_tokens + len(head) :]


@dataclass(frozen=True, slots=True)
class _Encoded:
    """The prompt of one question and (answer, response) for its answers; long ones as params say."""

    prompt: list[int]
    answered: list[tuple[Row, list[int]]]
    left_out: str | None
    touched: int


def _encoded(
    questions: list[Row], answers: list[list[Row]], tokenizer, pack: PackParams, split: bool
) -> list[_Encoded]:
    """What was asked, answer by answer; none where no answer token would be left."""
    asked = [q["text"] for q in questions]
    prompts = encode_prompts(tokenizer, asked)
    if pack.long_questions == "cut":
        shorter = [_cut_question(tokenizer, *one, pack) for one in zip(asked, prompts, strict=True)]
        asked, prompts = [text for text, _ in shorter], [prompt for _, prompt in shorter]
    pairs = [(text, a["text"]) for text, of_one in zip(asked, answers, strict=True) for a in of_one]
    documents = iter(encode_documents(tokenizer, pairs))
    found = []
    for question, prompt, of_one in zip(questions, prompts, answers, strict=True):
        where = f"{question['site']} question {question['id']}"
        responses = [response_of(prompt, next(documents), where) for _ in of_one]
        found.append(_fitted(prompt, list(zip(of_one, responses, strict=True)), pack, split))
    return found


def _cut_question(tokenizer, text: str, prompt: list[int], pack: PackParams) -> tuple[str, list[int]]:
    """As much of a question's beginning as makes a prompt of at most half a document, and that prompt."""
    most = pack.document_tokens // 2
    while len(prompt) > most and text:
        text = text[: len(text) * most // len(prompt)]  # shorter each time; mostly once is enough
        (prompt,) = encode_prompts(tokenizer, [text])
    return text, prompt


def _fitted(
    prompt: list[int], answered: list[tuple[Row, list[int]]], pack: PackParams, split: bool
) -> _Encoded:
    if len(prompt) >= pack.document_tokens:
        return _Encoded(prompt, [], QUESTIONS_TOO_LONG, 0)
    room = pack.document_tokens - len(prompt)
    touched = sum(len(response) > room for _, response in answered)
    if pack.long_documents == "drop":
        answered = [(a, r) for a, r in answered if len(r) <= room]
    elif not (split and pack.long_documents == "split"):
        answered = [(a, r[:room]) for a, r in answered]
    return _Encoded(prompt, answered, None, touched)


def _known(question: Row, is_held_out: bool) -> Row:
    return {name: question[name] if is_held_out or name == "cluster" else None for name, _ in KNOWN}

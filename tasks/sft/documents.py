"""Rows as users have them -> documents, and documents -> packed rows."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate, groupby
from typing import Any

import numpy as np

from tasks.lm.attention.bin_packing import BUNDLES_PER_ROW, best_fit_decreasing, bundle
from tasks.lm.model.reading import encode, render, warn_of_marker
from tasks.lm.model.template import without_eos
from tasks.sft.ids import read_ids
from tasks.sft.records import Document, PackedRow
from tasks.training.rows import check_row, once, read_rows
from tasks.training.turns import check_answer, read_turns

FORMS = "{text}, {prompt, completion}, {messages} or {input_ids[, labels | completion_mask | …]}"
CUT_BY_TRL = 1024  # tokens, its default of max_length
_SAID: set[str] = set()


@dataclass(frozen=True, slots=True)
class Reader:
    """A dataset -> packed rows, `Reader(tokenizer, 32000, 2048, 4096)(rows, "train_dataset")`."""

    tokenizer: Any  # None serves token ids
    vocabulary: int  # tokens the model knows
    row_tokens: int  # of a packed row; a longer document is a row of its own
    loss_on: str = "all"  # or "response"
    positions: int | None = None  # most tokens of a document the model has room for
    max_length: int | None = None  # tokens of a document; longer ones are cut, without eos
    assistant_only: bool = False  # of a conversation only what its template marks as the assistant's
    drops: bool = False  # a row that cannot teach is left out and named in a warning; else it is refused
    formatting: Callable[[Any], str] | None = None  # a row -> its text

    def __call__(self, dataset: Any, what: str) -> list[PackedRow]:
        """All of it; rows that are packed already stay as they are.

        Raises:
            ValueError: a row that cannot teach, by its number; none that can.
        """
        found = read_rows(dataset, what, self._read, self.drops)
        documents = [one for one in found if isinstance(one, Document)]
        self._tell_differences(documents)
        return [one for one in found if isinstance(one, PackedRow)] + pack(documents, self.row_tokens)

    def _tell_differences(self, documents: Sequence[Document]) -> None:
        """From TRL, where they change what these documents teach; once."""
        if self.loss_on == "all" and any(d.prompt and not d.is_dialogue for d in documents):
            once(_SAID, "prompts are learnt too; loss_on='response' learns completions alone, as TRL does")
        longest = max((len(d.tokens) for d in documents), default=0)
        if self.max_length is None and longest > CUT_BY_TRL:
            once(_SAID, "no document is cut (one has %d tokens); TRL cuts at max_length=1024", longest)

    def _read(self, row: PackedRow | Mapping[str, Any], _name: str) -> PackedRow | Document:
        found = row if isinstance(row, PackedRow) else self._document(row)
        self._check(found)
        return found

    def _document(self, row: Mapping[str, Any]) -> Document:
        if self.formatting is not None:
            text = self.formatting(row)
            if not isinstance(text, str):
                raise ValueError(f"formatting_func gives {type(text).__name__}; one row's text is wanted")
            row = {"text": text}
        check_row(row)
        document = read_document(row, self.tokenizer, self.assistant_only, self.loss_on == "response")
        whole, most = len(document.tokens), self.max_length
        if most is not None and whole > most:
            ignored = tuple(place for place in document.ignored if place < most)
            document = replace(
                document, tokens=document.tokens[:most], prompt=min(document.prompt, most), ignored=ignored
            )
        if not document.teaches(self.loss_on):
            raise ValueError(f"of {len(document.tokens)} tokens (of {whole}) none is left to learn")
        return document

    def _check(self, row: PackedRow | Document) -> None:
        longest = max(row.lengths) if isinstance(row, PackedRow) else len(row.tokens)
        if self.positions is not None and longest > self.positions:
            raise ValueError(f"{longest} tokens, the model has room for {self.positions}; set max_length")
        if wrong := next((token for token in row.tokens if not 0 <= token < self.vocabulary), None):
            raise ValueError(f"token {wrong} is none of the model's {self.vocabulary}")


def pack(documents: Sequence[Document], row_tokens: int) -> list[PackedRow]:
    """Documents laid into rows best-fit-decreasing; a longer one is a row of its own.

    Neighbours with one prompt stay together, as many as an eighth of a row takes: it is read once for them.
    """
    lengths = np.array([min(len(document.tokens), row_tokens) for document in documents], np.int64)
    counts = [len(list(alike)) for _, alike in groupby(documents, lambda d: d.tokens[: d.prompt] or d)]
    stops = bundle(lengths, counts, row_tokens // BUNDLES_PER_ROW)
    total = np.append(0, lengths.cumsum())
    starts = np.append(0, stops[:-1])
    rows = []
    for members in best_fit_decreasing((total[stops] - total[starts]).tolist(), row_tokens):
        some = [d for i in sorted(members) for d in documents[starts[i] : stops[i]]]
        firsts = accumulate((len(d.tokens) for d in some), initial=0)
        rows.append(
            PackedRow(
                tuple(token for document in some for token in document.tokens),
                tuple(len(document.tokens) for document in some),
                tuple(document.prompt for document in some),
                tuple(first + i for first, d in zip(firsts, some, strict=False) for i in d.ignored),
            )
        )
    return rows


def read_document(
    row: Mapping[str, Any], tokenizer, assistant_only: bool = False, response_only: bool = False
) -> Document:
    """One row as a document, its tokens and what is learnt as TRL 1.16 has them.

    Args:
        row: `{"text"}`; `{"prompt", "completion"}`, texts or conversations (`[{"role": "user", "content":
            "…"}, …]`); `{"messages"}`, a conversation; or `{"input_ids"}` with or without `labels` (−100: not
            learnt), `completion_mask` (0: the prompt) and more (:func:`tasks.sft.ids.read_ids`).
            `conversations` is another name of `messages`, and `{from, value}` of a turn there. Texts end with
            eos, conversations as their template says; of one without a prompt the last answer is learnt. A
            text is letters, whatever markers it spells (:mod:`tasks.lm.model.reading`).
        tokenizer: any; None serves token ids.
        assistant_only: learn what the chat template marks by `{% generation %}`, and nothing else.
        response_only: the last answer will be learnt, and so must be the assistant's.

    Raises:
        ValueError: the row has another form, its template marks nothing, its answer is somebody else's, or
            the tokenizer has no eos token (texts) or no chat template (conversations).
    """
    if "input_ids" in row:
        return read_ids(row)
    if "conversations" in row and not {"messages", "text", "prompt"} & row.keys():
        row = {**row, "messages": read_turns(row["conversations"], "conversations")}
    forms = [form for form in (("text",), ("prompt", "completion"), ("messages",)) if set(form) <= row.keys()]
    if len(forms) != 1:
        raise ValueError(f"it has {sorted(row)}; {FORMS} is wanted")
    if tokenizer is None:
        raise ValueError("it holds text; processing_class, a tokenizer, is wanted")
    parts = [row[key].tolist() if hasattr(row[key], "tolist") else row[key] for key in forms[0]]
    kind = list if forms[0] == ("messages",) or isinstance(parts[0], list) else str
    if not all(isinstance(part, kind) for part in parts) or not parts[-1]:
        form, wanted = " and ".join(forms[0]), "conversation" if kind is list else "text"
        raise ValueError(f"{form}: {wanted} is wanted, and not an empty one")
    if kind is list:
        shares = forms[0] != ("messages",)
        parts = [read_turns(part, name, shares) for part, name in zip(parts, forms[0], strict=True)]
        if response_only and not assistant_only:
            check_answer(parts[-1], forms[0][-1], alone=len(parts) == 2)
        whole = [turn for part in parts for turn in part]
        prompt = parts[0] if len(parts) == 2 else whole[:-1]
        return _of_conversation(prompt, whole, row, tokenizer, assistant_only)
    whole = _with_eos("".join(parts), tokenizer)
    return Document(whole, _shared(_ids(parts[0], tokenizer), whole) if len(parts) == 2 else 0)


def _of_conversation(prompt: list, whole: list, row, tokenizer, assistant_only: bool) -> Document:
    tools = row.get("tools")
    tools = json.loads(tools) if isinstance(tools, str) else tools
    keys = {"tools": tools, **(row.get("chat_template_kwargs") or {})}
    found = render(tokenizer, whole, return_assistant_tokens_mask=assistant_only, **keys)
    tokens = tuple(found["input_ids"])
    if assistant_only:
        learnt = found["assistant_masks"]
        if not any(learnt):
            raise ValueError("the chat template marks no token as the assistant's ({% generation %})")
        return Document(tokens, 0, tuple(i for i, is_own in enumerate(learnt) if not is_own))
    if not prompt:
        return Document(tokens, 0)
    before = render(tokenizer, prompt, add_generation_prompt=True, **keys)["input_ids"]
    return Document(tokens, _shared(before, tokens), is_dialogue="completion" not in row)


def _with_eos(text: str, tokenizer) -> tuple[int, ...]:
    if tokenizer.eos_token_id is None:
        raise ValueError("the tokenizer has no eos token to end a text with; set one, or give input_ids")
    warn_of_marker(tokenizer, text)
    return (*_ids(text, tokenizer), tokenizer.eos_token_id)


def _ids(text: str, tokenizer) -> tuple[int, ...]:
    (ids,) = encode(tokenizer, [text], "text")
    return tuple(without_eos(ids, tokenizer))


def _shared(prompt: Sequence[int], whole: Sequence[int]) -> int:
    """Tokens of the prompt that begin the whole: where they part, the response begins."""
    most = min(len(prompt), len(whole))
    return next((i for i in range(most) if prompt[i] != whole[i]), most)

"""Rows as users have them -> token ids. Preferences in TRL's forms, or answers that were good or bad."""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace
from typing import Any

from tasks.lm.prompt import without_eos
from tasks.lm.reading import encode, warn_of_marker
from tasks.reward.records import NOTHING, GroupedAnswers, check, cut, share_prompt
from tasks.run.rows import read_rows

FORMS = "{[prompt,] chosen, rejected}, {chosen_ids, rejected_ids} or {prompt, response, label}"


@dataclass(frozen=True, slots=True)
class Reader:
    """A dataset -> groups fit for a model, `Reader(tokenizer, 32000, 2048)(rows, "train_dataset")`."""

    tokenizer: Any  # None serves token ids
    vocabulary: int  # tokens the model knows
    positions: int | None  # most tokens of a document the model has room for
    is_causal: bool = True
    max_length: int | None = None  # tokens of a document; longer ones are cut
    uses_gaps: bool = False  # whether the loss knows what to do with a pair's gap
    drops: bool = False  # a row that cannot teach is left out and named in a warning; else it is refused

    def __call__(self, dataset: Collection[GroupedAnswers | Mapping], what: str) -> list[GroupedAnswers]:
        """All of it.

        Raises:
            ValueError: a row that cannot teach, by its name; none that can.
        """
        return read_rows(dataset, what, self._read, self.drops, _name_of)

    def _read(self, row: GroupedAnswers | Mapping, name: str) -> GroupedAnswers:
        group = row if isinstance(row, GroupedAnswers) else read_row(row, self.tokenizer)
        if group is not row and group.gaps and not self.uses_gaps:
            raise ValueError("it has a margin, which nothing uses; set margin (1: as TRL) or gap_weight")
        if self.max_length is not None:
            group = cut(group, self.max_length, keep_last=not self.is_causal)
        check(group, self.vocabulary, self.positions)
        return replace(group, name=name)


def _name_of(row: GroupedAnswers | Mapping) -> str:
    return row.name if isinstance(row, GroupedAnswers) else str(row.get("id", ""))


def read_row(row: Mapping[str, Any], tokenizer) -> GroupedAnswers:
    """One row as a group; what its documents have in common at their begin becomes the prompt, read once.

    Args:
        row: `{"chosen", "rejected"}` with or without `prompt`, texts or conversations (`[{"role": "user",
            "content": "…"}, …]`); or `{"chosen_ids", "rejected_ids"}`, whole documents; or `{"prompt",
            "response", "label"}`, the label 1 or true for a good response, 0 or false for a bad one. Beside
            them `weight` and `margin` (the pair's gap).
        tokenizer: any; None serves rows of token ids.

    Raises:
        ValueError: the row has another form, or a label or text that is none.
    """
    keys = row.keys()
    weights, gaps = (() if row.get(key) is None else (float(row[key]),) for key in ("weight", "margin"))
    if {"chosen_ids", "rejected_ids"} <= keys:
        documents = [tuple(row["chosen_ids"]), tuple(row["rejected_ids"])]
    elif {"chosen", "rejected"} <= keys:
        documents = [_document(row, side, tokenizer) for side in ("chosen", "rejected")]
    elif {"prompt", "response", "label"} <= keys:
        if row["label"] not in (0, 1):  # False and True too, NaN not
            raise ValueError(f"label {row['label']!r}: 0 or 1 is wanted")
        pair = (0, NOTHING) if row["label"] else (NOTHING, 0)
        return GroupedAnswers((), (_document(row, "response", tokenizer),), (pair,), weights, gaps)
    else:
        raise ValueError(f"it has {sorted(keys)}; {FORMS} is wanted")
    return GroupedAnswers(*share_prompt(documents), ((0, 1),), weights, gaps)


def _document(row: Mapping[str, Any], side: str, tokenizer) -> tuple[int, ...]:
    """Token ids of prompt and answer in one go; a text ends with eos, a conversation as its template says."""
    if tokenizer is None:
        raise ValueError("it holds text; processing_class, a tokenizer, is wanted")
    prompt, answer = row.get("prompt"), row[side]
    for part in (answer,) if prompt is None else (answer, prompt):
        if not isinstance(part, str | list):
            raise ValueError(f"{side} and prompt are texts or conversations, not {type(part).__name__}")
    if prompt is not None and type(prompt) is not type(answer):
        raise ValueError("prompt and answer are both texts or both conversations")
    whole = answer if prompt is None else prompt + answer
    if not whole:
        raise ValueError(f"{side} is empty, and so is its prompt")
    if isinstance(whole, list):
        tools = row.get("tools")
        tools = json.loads(tools) if isinstance(tools, str) else tools
        (ids,) = encode(
            tokenizer, [whole], "messages", tools=tools, **(row.get("chat_template_kwargs") or {})
        )
        return tuple(ids)
    warn_of_marker(tokenizer, whole)
    (ids,), eos = encode(tokenizer, [whole], "text"), tokenizer.eos_token_id
    return tuple(ids if eos is None else [*without_eos(ids, tokenizer), eos])

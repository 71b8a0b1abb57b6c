"""Rows as users have them -> token ids. Preferences in TRL's forms, or answers that were good or bad."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from tasks.lm.model.reading import encode, warn_of_marker
from tasks.lm.model.template import without_eos
from tasks.reward.records import NOTHING, GroupedAnswers, check, cut, share_prompt
from tasks.training.rows import check_row, once, read_rows, token_ids, unpadded
from tasks.training.turns import ASSISTANT, check_answer, read_turns

FORMS = "{[prompt,] chosen, rejected}, {chosen_ids, rejected_ids} or {prompt, response, label}"
SIDES = ("chosen", "rejected")
ID_NAMES = (  # of two documents and their masks: ours and TRL's, TRL's until 0.12, others'
    ("chosen_ids", "rejected_ids", "chosen_attention_mask", "rejected_attention_mask"),
    ("input_ids_chosen", "input_ids_rejected", "attention_mask_chosen", "attention_mask_rejected"),
    ("chosen_input_ids", "rejected_input_ids", "chosen_attention_mask", "rejected_attention_mask"),
)
OTHER_PROMPTS = ("instruction", "question", "query", "input", "context", "system")  # others' words
CUT_BY_TRL = 1024  # tokens, its default of max_length: longer rows are left out
_SAID: set[str] = set()


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

    def __call__(self, dataset: Any, what: str) -> list[GroupedAnswers]:
        """All of it.

        Raises:
            ValueError: a row that cannot teach, by its name; none that can.
        """
        return read_rows(dataset, what, self._read, self.drops, _name_of)

    def _tell_difference(self, group: GroupedAnswers) -> None:
        """From TRL, where it changes what rows teach; once."""
        longest = len(group.prompt) + max(map(len, group.responses))
        if self.max_length is None and longest > CUT_BY_TRL:
            once(_SAID, "no row is left out for its length (one has %d tokens); TRL leaves out those beyond "
                 "max_length=1024, which here cuts them", longest)  # fmt: skip

    def _read(self, row: GroupedAnswers | Mapping, name: str) -> GroupedAnswers:
        group = row if isinstance(row, GroupedAnswers) else read_row(row, self.tokenizer)
        if group is not row and group.gaps and not self.uses_gaps:
            raise ValueError("it has a margin, which nothing uses; set margin (1: as TRL) or gap_weight")
        if group is not row:
            self._tell_difference(group)
        if self.max_length is not None:
            group = cut(group, self.max_length, keep_last=not self.is_causal)
        check(group, self.vocabulary, self.positions)
        return replace(group, name=name)


def _name_of(row: GroupedAnswers | Mapping) -> str:
    if isinstance(row, GroupedAnswers):
        return row.name
    return "" if not isinstance(row, Mapping) or row.get("id") is None else str(row["id"])


def read_row(row: Mapping[str, Any], tokenizer) -> GroupedAnswers:
    """One row as a group; what its documents have in common at their begin becomes the prompt, read once.

    Args:
        row: `{"chosen", "rejected"}` with or without `prompt`, texts or conversations (`[{"role": "user",
            "content": "…"}, …]`, or one turn); or `{"chosen_ids", "rejected_ids"}`, whole documents; or
            `{"prompt", "response", "label"}`, the label 1 or true for a good response, 0 or false for a bad
            one. `conversations` is another name of a prompt of turns. Beside them `weight` and `margin` (the
            pair's gap).
        tokenizer: any; None serves rows of token ids.

    Raises:
        ValueError: the row has another form, a label or text that is none, an answer that is not the
            assistant's.
    """
    check_row(row)
    keys = row.keys()
    weights, gaps = (() if row.get(key) is None else (float(row[key]),) for key in ("weight", "margin"))
    if ids := next((names for names in ID_NAMES if set(names[:2]) <= keys), None):
        documents = [_ids(row, name, mask) for name, mask in zip(ids[:2], ids[2:], strict=True)]
    elif set(SIDES) <= keys:
        documents = [_document(row, side, tokenizer) for side in SIDES]
    elif {"prompt", "response", "label"} <= keys:
        if row["label"] not in (0, 1):  # False and True too, NaN not
            raise ValueError(f"label {row['label']!r}: 0 or 1 is wanted")
        pair = (0, NOTHING) if row["label"] else (NOTHING, 0)
        return GroupedAnswers((), (_document(row, "response", tokenizer),), (pair,), weights, gaps)
    else:
        raise ValueError(f"it has {sorted(keys)}; {FORMS} is wanted")
    return GroupedAnswers(*share_prompt(documents), ((0, 1),), weights, gaps)


def _ids(row: Mapping[str, Any], name: str, mask: str) -> tuple[int, ...]:
    tokens = token_ids(row[name], name)
    return tokens[unpadded(tokens, row.get(mask), mask)]


def _document(row: Mapping[str, Any], side: str, tokenizer) -> tuple[int, ...]:
    """Token ids of prompt and answer in one go; a text ends with eos, a conversation as its template says."""
    if tokenizer is None:
        raise ValueError("it holds text; processing_class, a tokenizer, is wanted")
    prompt, answer = _prompt(row), row[side]
    answer = answer.tolist() if hasattr(answer, "tolist") else answer
    answer = [answer] if isinstance(answer, Mapping) else answer
    for part in (answer,) if prompt is None else (answer, prompt):
        if not isinstance(part, str | list):
            raise ValueError(f"{side} and prompt are texts or conversations, not {type(part).__name__}")
    if isinstance(answer, list):
        whole = _conversation(prompt, read_turns(answer, side), side)
        tools = row.get("tools")
        tools = json.loads(tools) if isinstance(tools, str) else tools
        (ids,) = encode(
            tokenizer, [whole], "messages", tools=tools, **(row.get("chat_template_kwargs") or {})
        )
        return tuple(ids)
    if isinstance(prompt, list):
        raise ValueError("prompt and answer are both texts or both conversations")
    whole = answer if prompt is None else prompt + answer
    if not whole:
        raise ValueError(f"{side} is empty, and so is its prompt")
    warn_of_marker(tokenizer, whole)
    (ids,), eos = encode(tokenizer, [whole], "text"), tokenizer.eos_token_id
    return tuple(ids if eos is None else [*without_eos(ids, tokenizer), eos])


def _prompt(row: Mapping[str, Any]) -> Any:
    prompt = row.get("prompt")
    if prompt is None and row.get("conversations") is not None:
        prompt = row["conversations"]
    unread = next((name for name in OTHER_PROMPTS if isinstance(row.get(name), str) and row[name]), None)
    if prompt is None and unread and isinstance(row.get("chosen"), str):
        raise ValueError(f"{unread} would not be read; name it prompt")
    return prompt.tolist() if hasattr(prompt, "tolist") else prompt


def _conversation(prompt: Any, answer: list[dict[str, Any]], side: str) -> list[dict[str, Any]]:
    """Prompt and answer as one conversation; a prompt that the answer repeats is taken once."""
    if not answer and not prompt:
        raise ValueError(f"{side} is empty, and so is its prompt")
    check_answer(answer, side)
    if prompt is None:
        return answer
    if isinstance(prompt, str):
        said = [turn["content"] for turn in answer if turn["role"] not in ASSISTANT]
        if said:  # a text beside whole conversations, as in ultrafeedback
            if prompt.strip() not in (text.strip() for text in said if text):
                raise ValueError(f"prompt is none of the turns of {side}")
            return answer
        return [{"role": "user", "content": prompt}, *answer]
    turns = read_turns(prompt, "prompt")
    return answer if answer[: len(turns)] == turns and len(answer) > len(turns) else [*turns, *answer]

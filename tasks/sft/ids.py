"""Rows that are tokenised already -> documents; masks are used, and what cannot be is refused."""

from __future__ import annotations

from collections.abc import Mapping
from itertools import pairwise
from typing import Any

from tasks.sft.records import Document
from tasks.training.rows import token_ids, unpadded

NOT_LEARNT = -100  # transformers' label of a token that is only read
COLUMNS = ("labels", "completion_mask", "assistant_masks", "position_ids", "token_type_ids")


def read_ids(row: Mapping[str, Any]) -> Document:
    """A row of `input_ids`, lists, arrays or tensors, as a document.

    Args:
        row: beside them `attention_mask` (0: padding, which is taken off), `labels` (−100: not learnt),
            `completion_mask` (0: not learnt; those before the first 1 are the prompt), `assistant_masks`
            (likewise, without a prompt); where there are several, what all of them learn. `position_ids` and
            `seq_lengths` must be those of one document.

    Raises:
        ValueError: lengths that differ, a label that is none, several documents in one row.
    """
    tokens = token_ids(row["input_ids"], "input_ids")
    real = unpadded(tokens, row.get("attention_mask"))
    columns = {}
    for name in COLUMNS:
        if row.get(name) is not None:
            columns[name] = token_ids(row[name], name)
            if len(columns[name]) != len(tokens):
                raise ValueError(f"{len(columns[name])} {name} for {len(tokens)} input_ids")
            columns[name] = columns[name][real]
    tokens = tokens[real]
    _check_one(columns, row.get("seq_lengths"), len(tokens))
    mask = columns.get("completion_mask", ())
    prompt = next((i for i, is_own in enumerate(mask) if is_own), len(mask))
    ignored = {i for i in range(prompt, len(mask)) if not mask[i]}
    ignored |= {i for i, is_own in enumerate(columns.get("assistant_masks", ())) if not is_own}
    for i, label in enumerate(columns.get("labels", ())):
        if label not in (tokens[i], NOT_LEARNT):
            raise ValueError(f"label {i} is neither its token nor {NOT_LEARNT}")
        ignored |= {i} if label == NOT_LEARNT else set()
    return Document(tokens, prompt, tuple(sorted(ignored)))


def _check_one(columns: Mapping[str, tuple[int, ...]], lengths: Any, count: int) -> None:
    """The row is one document, of one type of token."""
    if lengths is not None and token_ids(lengths, "seq_lengths") != (count,):
        raise ValueError("seq_lengths: several documents in a row; give each as a row")
    places = columns.get("position_ids")
    if places is not None and any(b - a != 1 for a, b in pairwise(places)):
        raise ValueError("position_ids do not count by one; give each document as a row")
    if any(columns.get("token_type_ids", ())):
        raise ValueError("token_type_ids: a language model that is packed has none but 0")

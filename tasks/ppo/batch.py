"""What a caller hands to PPOTrainer, checked: every complaint names the argument and the row."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from tasks.lm.model.context import Room


@dataclass(frozen=True, slots=True)
class Batch:
    """B prompts, their responses and what these are worth."""

    queries: list[list[int]]
    responses: list[list[int]]
    is_action: list[list[bool]]  # of each response token: whether the policy chose it
    scores: Tensor | list[Tensor]  # [B]; or a reward for each token of each response


def check_tokens(
    name: str, rows: Sequence, vocabulary: int, may_be_empty: bool = False, room: int | None = None
) -> list[list[int]]:
    """Rows of token ids, lists or 1-D tensors, as lists.

    Raises:
        ValueError: no list of rows; a row that is empty, too long for `room`, not of integers, or no tokens
            of a vocabulary this large. The message names the argument and the row.
    """
    if not isinstance(rows, list | tuple):
        raise ValueError(f"{name} must be a list of token rows, not {type(rows).__name__}")
    found = []
    for i, row in enumerate(rows):
        if not isinstance(row, list | tuple | Tensor):
            raise ValueError(f"{name}[{i}] must be a list or tensor of token ids, not {type(row).__name__}")
        ids = row.tolist() if isinstance(row, Tensor) and row.dim() else row
        if isinstance(ids, Tensor) or not all(type(x) is int or isinstance(x, np.integer) for x in ids):
            what = f"{tuple(row.shape)} {row.dtype}" if isinstance(row, Tensor) else f"{row!r:.60}"
            raise ValueError(f"{name}[{i}] must hold token ids, shape [tokens]; it is {what}")
        ids = list(map(int, ids))
        if not ids and not may_be_empty:
            raise ValueError(f"{name}[{i}] is empty; it needs at least one token")
        if ids and not (0 <= min(ids) and max(ids) < vocabulary):
            raise ValueError(f"{name}[{i}] holds token ids outside the model's vocabulary of {vocabulary}")
        if room is not None and len(ids) > room:
            raise ValueError(f"{name}[{i}] has {len(ids)} tokens; the model has room for {room}")
        found.append(ids)
    return found


def check_batch(
    queries: Sequence, responses: Sequence, scores, masks, size: int, vocabulary: int, room: Room
) -> Batch:
    """The arguments of `PPOTrainer.step`.

    Args:
        queries: B rows of token ids.
        responses: B rows; empty ones are legal.
        scores: a tensor [B]; or B numbers, 0-D or 1-D tensors; or B rows of a reward per token.
        masks: None, or B rows, as long as the responses: 1 where the policy chose the token.
        size: B.
        vocabulary: of the model.
        room: that the model has for a prompt and its response.

    Raises:
        ValueError: shapes that do not match, scores that are not finite, rows as :func:`check_tokens`.
    """
    for name, given in (
        ("queries", queries),
        ("responses", responses),
        ("scores", scores),
        ("response_masks", masks),
    ):
        if given is None:
            continue
        if not hasattr(given, "__len__") or (isinstance(given, Tensor) and not given.dim()):
            raise ValueError(f"{name} must hold {size} rows; it is {given!r:.60}")
        if len(given) != size:
            raise ValueError(
                f"{name} holds {len(given)} rows; a step takes {size} (batch_size over the processes)"
            )
    queries = check_tokens("queries", queries, vocabulary)
    responses = check_tokens("responses", responses, vocabulary, may_be_empty=True)
    for i, (query, response) in enumerate(zip(queries, responses, strict=True)):
        if not room.holds(len(query), len(response)):
            raise ValueError(
                f"queries[{i}] and responses[{i}] have {len(query)} + {len(response)} tokens; the model has "
                f"room for {room}"
            )
    actions = [[True] * len(r) for r in responses] if masks is None else _check_masks(masks, responses)
    return Batch(queries, responses, actions, _check_scores(scores, responses))


def _check_masks(masks, responses: list[list[int]]) -> list[list[bool]]:
    found = []
    for i, (mask, response) in enumerate(zip(masks, responses, strict=True)):
        try:
            flags = torch.as_tensor(mask).flatten().tolist()
        except (TypeError, ValueError, RuntimeError):
            flags = None
        if flags is None or len(flags) != len(response) or not set(flags) <= {0, 1}:
            raise ValueError(f"response_masks[{i}] must hold 0 or 1 for each of the {len(response)} tokens")
        found.append([bool(flag) for flag in flags])
    return found


def read_scores(name: str, scores: Any, count: int) -> list[Tensor]:
    """Numbers, or rows of numbers, as tensors. -> B tensors, 0-D or 1-D, float32.

    Args:
        name: of the argument, for messages.
        scores: tensor, array or sequence.
        count: B.

    Raises:
        ValueError: not B of them, or one (names it) that is no finite number nor a row of such.
    """
    is_scalar = isinstance(scores, Tensor) and not scores.dim()
    if is_scalar or not hasattr(scores, "__len__") or isinstance(scores, str | Mapping):
        raise ValueError(f"{name}: {type(scores).__name__} is no sequence of {count} numbers or rows")
    if len(scores) != count:
        raise ValueError(f"{name} holds {len(scores)} rows for {count} responses")
    found = []
    for i, score in enumerate(scores):
        try:
            row = torch.as_tensor(score, dtype=torch.float32).detach().clone()  # what came stays as it came
        except (TypeError, ValueError, RuntimeError) as error:
            raise ValueError(f"{name}[{i}] is {score!r:.60}, no number nor a row of numbers") from error
        if row.dim() > 1:
            raise ValueError(
                f"{name}[{i}] has the shape {tuple(row.shape)}; wanted is one number, or one for each token"
            )
        if not torch.isfinite(row).all():
            raise ValueError(f"{name}[{i}] is not finite: {row.tolist()!r:.60}")
        found.append(row)
    return found


def _check_scores(scores, responses: list[list[int]]) -> Tensor | list[Tensor]:
    rows = read_scores("scores", scores, len(responses))
    for i, (row, response) in enumerate(zip(rows, responses, strict=True)):
        if row.numel() not in (1, len(response)):
            raise ValueError(
                f"scores[{i}] has the shape {tuple(row.shape)}; wanted is one number, or one for each of the "
                f"{len(response)} tokens of the response"
            )
    if all(row.numel() == 1 for row in rows):
        return torch.stack([row.reshape(()) for row in rows])
    short = next(
        (i for i, (s, r) in enumerate(zip(rows, responses, strict=True)) if s.numel() != len(r)), None
    )
    if short is not None:
        raise ValueError(f"scores[{short}] is one number, but other rows have one for each token")
    return [row.reshape(-1) for row in rows]

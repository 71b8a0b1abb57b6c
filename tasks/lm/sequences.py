"""Prompts and responses in padded tensors, and the log-probabilities a causal model gives them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields

import torch
from torch import Tensor

from tasks.lm.logprobs import token_logprobs


@dataclass(frozen=True, slots=True)
class Sequences:
    """Prompts padded on the left, responses on the right.

    Miniature: prompts [[5, 6], [7]], responses [[8, 1], [9]] with pad 0 -> tokens [[5, 6, 8, 1], [0, 7, 9,
    0]], is_real [[T, T, T, T], [F, T, T, F]], is_response [[T, T], [T, F]].
    """

    tokens: Tensor  # [B, S] int64
    is_real: Tensor  # [B, S] bool
    is_response: Tensor  # [B, R] bool: the real part of the last R columns

    @property
    def responses(self) -> Tensor:
        """The response columns, [B, R]."""
        return self.tokens[:, -self.is_response.shape[1] :]

    def rows(self, index: Tensor) -> Sequences:
        """Some rows."""
        return Sequences(*(getattr(self, f.name)[index] for f in fields(self)))


def left_pad(rows: Sequence[Sequence[int]], pad_id: int) -> tuple[Tensor, Tensor]:
    """Pad on the left: B lists -> tokens [B, P], is_real [B, P]."""
    width = max(map(len, rows))
    tokens = torch.full((len(rows), width), pad_id)
    is_real = torch.zeros(len(rows), width, dtype=torch.bool)
    for i, row in enumerate(rows):
        tokens[i, width - len(row) :] = torch.tensor(row)
        is_real[i, width - len(row) :] = True
    return tokens, is_real


def positions_of(is_real: Tensor) -> Tensor:
    """Position ids that skip padding. [B, S] -> [B, S]."""
    return (is_real.long().cumsum(-1) - 1).clamp(min=0)


def lay_out(
    prompts: Sequence[Sequence[int]], responses: Sequence[Sequence[int]], pad_id: int, device
) -> Sequences:
    """B prompts and B responses -> padded tensors on the device.

    Raises:
        ValueError: an empty prompt or response (names its row).
    """
    for what, found in (("prompt", prompts), ("response", responses)):
        empty = [i for i, row in enumerate(found) if len(row) == 0]
        if empty:
            raise ValueError(f"{what} {empty[0]} is empty; each needs at least one token")
    left, real_left = left_pad(prompts, pad_id)
    right, real_right = left_pad([list(r)[::-1] for r in responses], pad_id)
    right, real_right = right.flip(1), real_right.flip(1)
    tokens, is_real = torch.cat([left, right], 1), torch.cat([real_left, real_right], 1)
    return Sequences(tokens.to(device), is_real.to(device), real_right.to(device))


def response_logprobs(model, sequences: Sequences, temperature: float) -> Tensor:
    """Log-probability of each response token under a causal model; logits for response positions only.

    -> [B, R].
    """
    width = sequences.is_response.shape[1] + 1  # the position before the first response token predicts it
    logits = model(
        input_ids=sequences.tokens, attention_mask=sequences.is_real.long(), use_cache=False,
        position_ids=positions_of(sequences.is_real), logits_to_keep=width,
    ).logits  # fmt: skip
    return token_logprobs(logits[:, :-1], sequences.responses, temperature)[0]

"""Prompts and responses in padded tensors, and what a causal model says of each response token.

The tensors are padded, the forward is not: a model that serves the forest sees the real tokens only, any
other model the padded rows; the numbers are the same.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from tasks.lm.forest import Forest, Segment, has_forest, plant, run_forest
from tasks.lm.heads import predict


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


def plant_sequences(sequences: Sequences) -> tuple[Forest, Tensor]:
    """The real tokens of each row as a root, and the places [N] that predict the N real response tokens.

    Row by row, as `tokens[is_response]` lists them.
    """
    rows = [row[keep].tolist() for row, keep in zip(sequences.tokens, sequences.is_real, strict=True)]
    forest = plant([Segment(row) for row in rows])
    answered = sequences.is_response.sum(1).tolist()
    ends = [s + n for s, n in zip(forest.starts, forest.lengths, strict=True)]
    places = torch.cat([torch.arange(e - r - 1, e - 1) for e, r in zip(ends, answered, strict=True)])
    device = sequences.tokens.device
    return forest.to(device), places.to(device)


def pad_forest(forest: Forest) -> tuple[Tensor, Tensor]:
    """Every leaf with its ancestors as a row of its own, for a causal model that no forest serves.

    Returns:
        tokens [B, S], padded on the right, where no real token sees it; and where each of the forest's T
        places stands in the B·S, [T]: those that several rows repeat, in the first of them.
    """
    device, ends = forest.tokens.device, zip(forest.starts, forest.lengths, strict=True)
    own = [torch.arange(start, start + length, device=device) for start, length in ends]
    paths: list[Tensor] = []
    for i, parent in enumerate(forest.parents):
        paths.append(own[i] if parent < 0 else torch.cat([paths[parent], own[i]]))
    leaves = [path for i, path in enumerate(paths) if i not in forest.parents]
    tokens = pad_sequence([forest.tokens[path] for path in leaves], batch_first=True)
    where = torch.empty_like(forest.tokens)
    for row, path in reversed(list(enumerate(leaves))):
        where[path] = row * tokens.shape[1] + torch.arange(len(path), device=device)
    return tokens, where


def read_responses(
    model, sequences: Sequences, temperature: float, entropy: bool = True
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Log-probability and entropy (nats) of each response token, and its value where the model has them.

    Args:
        model: a causal language model, or one with a value head.
        sequences: B rows.
        temperature: the logits are divided by it.
        entropy: whether it is wanted.

    Returns:
        [B, R] each, zero where there is no token. The value of a token is that of the state before it.
    """
    mask, causal = sequences.is_response, getattr(model, "pretrained_model", model)
    if has_forest(model):
        forest, places = plant_sequences(sequences)
        found = predict(causal, lambda model: run_forest(model, forest), places)
    else:
        width = sequences.tokens.shape[1]
        rows, columns = mask.nonzero(as_tuple=True)
        places = rows * width + width - mask.shape[1] - 1 + columns  # the place before a token predicts it
        keys = {"attention_mask": sequences.is_real.long(), "position_ids": positions_of(sequences.is_real)}
        found = predict(causal, lambda model: model(sequences.tokens, use_cache=False, **keys), places)
    said = found.read(sequences.responses[mask], temperature, entropy=entropy)
    values = model.v_head(found.hidden[places]) if hasattr(model, "v_head") else None
    each = (None if x is None else _spread(x, mask) for x in (said.logprobs, said.entropy, values))
    return tuple(each)


def _spread(values: Tensor, mask: Tensor) -> Tensor:
    """[N] values of the N true places of a mask -> the mask's shape, zero elsewhere."""
    return values.new_zeros(mask.shape).masked_scatter(mask, values)


def response_logprobs(model, sequences: Sequences, temperature: float) -> Tensor:
    """Log-probability of each response token under a causal model, nats. -> [B, R]."""
    return read_responses(model, sequences, temperature, entropy=False)[0]

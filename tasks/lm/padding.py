"""Rows of unlike length in one tensor: padded on the left, or on the right, where no causal model looks."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from tasks.lm.forest import Forest


def left_pad(rows: Sequence[Sequence[int] | Tensor], pad_id: int) -> tuple[Tensor, Tensor]:
    """Pad on the left: B lists or 1-D tensors -> tokens [B, P], is_real [B, P]; P ≥ 1."""
    width = max(1, *map(len, rows))
    tokens = torch.full((len(rows), width), pad_id)
    is_real = torch.zeros(len(rows), width, dtype=torch.bool)
    for i, row in enumerate(rows):
        tokens[i, width - len(row) :] = torch.as_tensor(row)
        is_real[i, width - len(row) :] = True
    return tokens, is_real


def positions_of(is_real: Tensor) -> Tensor:
    """Position ids that skip padding. [B, S] -> [B, S]."""
    return (is_real.long().cumsum(-1) - 1).clamp(min=0)


def flush_left(tokens: Tensor, is_real: Tensor) -> tuple[Tensor, Tensor]:
    """Each row's real tokens first, its padding behind them, where no causal model sees it.

    Any causal model reads such rows rightly, whatever it makes of masks and positions.

    Miniature: `_ 7 9 _` with `5 6 8 1` -> tokens [[7, 9, _], ...] of the widest row's columns.

    Args:
        tokens: [B, S].
        is_real: [B, S] bool.

    Returns:
        tokens [B, W], W the most real tokens of a row; and where each token stands in the B·W, [B, S], 0 at
        padding.
    """
    order = (~is_real).long().argsort(dim=1, stable=True)
    width = max(1, int(is_real.sum(1).max()))
    rows = torch.arange(len(tokens), device=tokens.device)[:, None] * width
    where = ((is_real.long().cumsum(1) - 1) + rows).masked_fill(~is_real, 0)
    return tokens.gather(1, order)[:, :width], where


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

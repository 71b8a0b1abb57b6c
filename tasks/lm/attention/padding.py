"""Rows of unlike length in one tensor: padded on the left, or on the right, where no causal model looks.

And prompts with their responses, padded on both sides, and as a forest.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, fields

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from tasks.lm.attention.forest import Forest, Segment, plant


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


@dataclass(frozen=True, slots=True)
class Sequences:
    """Prompts padded on the left, responses on the right.

    Miniature: prompts [[5, 6], [7]], responses [[8, 1], [9]] with pad 0 -> tokens [[5, 6, 8, 1], [0, 7, 9,
    0]], is_real [[T, T, T, T], [F, T, T, F]], is_response [[T, T], [T, F]].
    """

    tokens: Tensor  # [B, S] int64
    is_real: Tensor  # [B, S] bool
    is_response: Tensor  # [B, R] bool, R ≥ 1: the real part of the last R columns; none of an empty response

    @property
    def responses(self) -> Tensor:
        """The response columns, [B, R]."""
        return self.tokens[:, -self.is_response.shape[1] :]

    def rows(self, index: Tensor) -> Sequences:
        """Some rows."""
        return Sequences(*(getattr(self, f.name)[index] for f in fields(self)))


def lay_out(
    prompts: Sequence[Sequence[int] | Tensor],
    responses: Sequence[Sequence[int] | Tensor],
    pad_id: int,
    device,
) -> Sequences:
    """B prompts and B responses, lists of token ids or 1-D tensors -> padded tensors on the device.

    A response may be empty.

    Raises:
        ValueError: none at all, not equally many, a row that is not one-dimensional, or an empty prompt
            (names the row).
    """
    if not len(prompts) or len(prompts) != len(responses):
        raise ValueError(
            f"{len(prompts)} prompts and {len(responses)} responses came; equally many are wanted"
        )
    for what, found in (("prompt", prompts), ("response", responses)):
        for i, row in enumerate(found):
            if isinstance(row, Tensor) and row.ndim != 1:
                raise ValueError(f"{what} {i} has shape {tuple(row.shape)}; a row of token ids is wanted")
            if what == "prompt" and len(row) == 0:
                raise ValueError(f"prompt {i} is empty; it needs at least one token")
    left, real_left = left_pad(prompts, pad_id)
    right, real_right = left_pad([torch.as_tensor(r).flip(0) for r in responses], pad_id)
    right, real_right = right.flip(1), real_right.flip(1)
    tokens, is_real = torch.cat([left, right], 1), torch.cat([real_left, real_right], 1)
    return Sequences(tokens.to(device), is_real.to(device), real_right.to(device))


def plant_sequences(sequences: Sequences) -> tuple[Forest, Tensor, Tensor]:
    """The real tokens as a forest, the places [N] that predict the N real response tokens, and all places.

    A row is a root; rows of one prompt share it as their root, and their responses are its children. The
    places are listed row by row, as `tokens[is_response]` lists the tokens; all places are [B, S], 0 at
    padding.
    """
    whole, is_real = sequences.tokens.cpu(), sequences.is_real.cpu()
    rows = [row[keep].tolist() for row, keep in zip(whole, is_real, strict=True)]
    answered = sequences.is_response.sum(1).tolist()
    prompts = [tuple(row[: len(row) - n]) for row, n in zip(rows, answered, strict=True)]
    times, roots, segments = Counter(prompts), {}, []
    homes = []  # of each row: the segment of its prompt, and that of its response
    for row, prompt, n in zip(rows, prompts, answered, strict=True):
        if times[prompt] == 1:
            homes.append((len(segments), len(segments)))
            segments.append(Segment(row))
            continue
        if prompt not in roots:
            roots[prompt] = len(segments)
            segments.append(Segment(prompt))
        homes.append((roots[prompt], len(segments)))
        if n:
            segments.append(Segment(row[len(prompt) :], roots[prompt]))
    forest, places, everywhere = plant(segments), [], []
    for (root, home), prompt, n in zip(homes, prompts, answered, strict=True):
        start = forest.starts[root]
        everywhere += range(start, start + len(prompt))
        if n:
            first = forest.starts[home] + (len(prompt) if home == root else 0)
            places += [start + len(prompt) - 1, *range(first, first + n - 1)]
            everywhere += range(first, first + n)
    device = sequences.tokens.device
    where = torch.zeros_like(whole).masked_scatter(is_real, torch.tensor(everywhere))
    return forest.to(device), torch.tensor(places, dtype=torch.long, device=device), where.to(device)

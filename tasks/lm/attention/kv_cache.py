"""Keys and values of a batch that decodes: written in place, read as views, given up with the rows that end.

The prompts of a batch end in one column, so that every row writes its next token to the same one. Rows stand
in the order of their lengths: neighbours of like length are attended to together, over their own columns.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention
from transformers import Cache
from transformers.cache_utils import DynamicLayer

WORTH_A_CALL = {"cpu": 2**19}  # bytes of padding that one more call of the attention must save


@dataclass(frozen=True, slots=True)
class Group:
    """Neighbouring rows of like length."""

    rows: slice
    first: int  # column where the longest of them begins
    full: int  # column from which on every one of them has a token


class RowCache(Cache):
    """Keys and values [B, heads, C, D] of each layer; C: the longest prompt, then the response tokens.

    Miniature: prompts `a b c` and `d` with room 2 give columns a b c · · and _ _ d · ·; the first response
    tokens go to column 3, and the second row's queries see columns 2 and 3.

    Args:
        lengths: tokens of each row's prompt, the longest first.
        room: response tokens.
        device: of the model.
        dtype: of what is kept; None: as it comes.
    """

    def __init__(self, lengths: Sequence[int], room: int, device, dtype: torch.dtype | None = None) -> None:
        super().__init__(layer_class_to_replicate=DynamicLayer)  # none is ever made
        self.width = self.column = lengths[0]  # `column`: where the next token goes
        self.columns, self.dtype = self.width + room, dtype
        self.lengths, self.device = list(lengths), torch.device(device)
        self.buffers: dict[int, tuple[Tensor, Tensor]] = {}
        self.prompts: tuple[int, Sequence[int]] | None = None

    def lay(self, first: int, starts: Sequence[int]) -> None:
        """The next forward reads prompts that lie in one row, where those of rows `first`, … start."""
        self.prompts = first, starts

    def update(self, key_states: Tensor, value_states: Tensor, layer_idx: int, *_, **__):
        """Keep a layer's new keys and values.

        Prompts, [1, heads, T, D], are handed back as they came; for one token a row, [B, heads, 1, D], come
        back the layer's buffers, which :meth:`attend` reads.
        """
        new = key_states, value_states
        if self.prompts is None:
            for buffer, states in zip(self.buffers[layer_idx], new, strict=True):
                buffer[:, :, self.column] = states[:, :, 0]
            return self.buffers[layer_idx]
        if layer_idx not in self.buffers:
            self.buffers[layer_idx] = tuple(map(self._buffer, new))
        for buffer, states in zip(self.buffers[layer_idx], new, strict=True):
            self._write(buffer, states[0])
        return new

    def attend(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        scaling: float | None,
        window: int | None,
        softcap: float | None = None,
    ) -> Tensor:
        """Attention of one token a row. query [B, heads, 1, D], a layer's buffers -> [B, 1, heads, D].

        Args:
            query: of the tokens that were kept last.
            key: [B, key heads, C, D].
            value: [B, key heads, C, E].
            scaling: of the products; 1/√D where None.
            window: a token sees itself and this many − 1 before it.
            softcap: as of :func:`tasks.lm.attention.blocks.attend`.
        """
        query = query.unflatten(1, (key.shape[1], -1)).squeeze(3)  # queries of one key head side by side
        query, stop, found = query.to(key.dtype), self.column + 1, []
        with torch.autocast(self.device.type, enabled=False):  # which would cast the buffers at each step
            for group in self.groups:
                first = group.first if window is None else max(group.first, stop - window)
                seen = group.rows, slice(None), slice(first, stop)
                mask = None if first >= group.full else self.mask[group.rows, :, :, first:stop]
                some = query[group.rows], key[seen], value[seen]
                if softcap is None:
                    found.append(scaled_dot_product_attention(*some, mask, scale=scaling))
                else:
                    found.append(_capped(*some, mask, scaling, softcap))
        return torch.cat(found).flatten(1, 2)[:, None]

    def begin(self) -> None:
        """All prompts are read; from here on, each forward reads one token a row."""
        self.prompts = None
        self._look()

    def select(self, rows: Tensor) -> None:
        """Give up all rows but these, ascending."""
        for layer, both in self.buffers.items():
            self.buffers[layer] = tuple(buffer.index_select(0, rows) for buffer in both)
        self.lengths = [self.lengths[row] for row in rows.tolist()]
        self._look()

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Columns that are filled."""
        return self.column

    def _buffer(self, states: Tensor) -> Tensor:
        shape = len(self.lengths), states.shape[1], self.columns, states.shape[3]
        return states.new_zeros(shape, dtype=self.dtype)  # what is masked has to be finite

    def _write(self, buffer: Tensor, states: Tensor) -> None:
        """Copy prompts [heads, T, D], each to the end of its row's first columns."""
        first, starts = self.prompts
        lengths = self.lengths[first : first + len(starts)]
        if self.device.type == "cpu":
            for row, (start, length) in enumerate(zip(starts, lengths, strict=True), first):
                buffer[row, :, self.width - length : self.width] = states[:, start : start + length]
        else:  # two calls instead of one a row; padding repeats a token
            own, start = (torch.tensor(x, device=self.device)[:, None] for x in (lengths, starts))
            places = (torch.arange(self.width, device=self.device) - (self.width - own)).clamp(min=0) + start
            laid = states.transpose(0, 1)[places].transpose(1, 2)
            buffer[first : first + len(starts), :, : self.width] = laid

    def _look(self) -> None:
        """What the rows that are left see, and in which groups."""
        keys, values = next(iter(self.buffers.values()))
        starts = [self.width - length for length in self.lengths]
        column, start = (torch.tensor(x, device=self.device) for x in (range(self.columns), starts))
        is_seen = column >= start[:, None]
        self.mask = keys.new_zeros(is_seen.shape).masked_fill(~is_seen, float("-inf"))[:, None, None]
        token_bytes = keys[0, :, 0].nbytes + values[0, :, 0].nbytes
        cuts = cut(self.lengths, WORTH_A_CALL.get(self.device.type, float("inf")) / token_bytes)
        self.groups = [Group(slice(a, b), starts[a], starts[b - 1]) for a, b in pairwise(cuts)]


def _capped(query, key, value, mask, scaling: float | None, softcap: float) -> Tensor:
    """Attention whose products are capped, which no kernel does."""
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    odds = softcap * (query * scale @ key.transpose(-1, -2) / softcap).tanh()
    return (odds if mask is None else odds + mask).softmax(-1) @ value


def cut(lengths: Sequence[int], worth: float) -> list[int]:
    """Where to cut descending lengths so that each cut saves the rows behind it `worth` tokens of padding.

    Example: lengths [9, 9, 5, 4], worth 8 -> [0, 2, 4].
    """
    cuts = [0]
    for row, length in enumerate(lengths):
        if (lengths[cuts[-1]] - length) * (len(lengths) - row) >= worth:
            cuts.append(row)
    return [*cuts, len(lengths)]

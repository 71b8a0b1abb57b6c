"""Next-token logits of a batch of rows, token by token, over a key-value cache.

A model that serves the forest reads its prompts in a row without padding, then each row's new token over a
:class:`tasks.lm.cache.RowCache`; any other model reads padded rows, with the cache that it makes itself. Both
ways read a prompt that several rows share once, and both give up rows that have ended. An encoder-decoder's
prompts are read by its encoder (:mod:`tasks.lm.target_decoding`).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor
from transformers import PreTrainedModel

from tasks.lm.cache import RowCache
from tasks.lm.forest import (
    NO_MASK,
    Segment,
    first_position,
    has_forest,
    plant,
    run_forest,
    serve_forest,
    unwrapped,
)
from tasks.lm.seq2seq import is_seq2seq
from tasks.lm.sequences import left_pad, positions_of
from tasks.lm.target_decoding import TargetDecoder

PREFILL_TOKENS = 8192  # most of one forward over several prompts


@contextmanager
def prepared(model) -> Iterator[None]:
    """In evaluation mode, and served by the forest where it can be; afterwards as it was."""
    parts = [part for part in unwrapped(model).modules() if isinstance(part, PreTrainedModel)]
    attentions = [part.config._attn_implementation for part in parts]
    training = [module for module in model.modules() if module.training]
    try:
        model.eval()
        serve_forest(model)
        yield
    finally:
        for part, attention in zip(parts, attentions, strict=True):
            if part.config._attn_implementation != attention:
                part.set_attn_implementation(attention)
        for module in training:
            module.training = True


def decoder_of(model, prompts: Sequence[Sequence[int]], room: int, dtype: torch.dtype | None):
    """What decodes these rows; equal prompts stand side by side, the longest first.

    Args:
        model: :func:`prepared`.
        prompts: of n rows.
        room: most tokens of a response.
        dtype: of autocast; None: none.
    """
    distinct, of = [], []
    for prompt in map(list, prompts):
        if not distinct or prompt != distinct[-1]:
            distinct.append(prompt)
        of.append(len(distinct) - 1)
    if is_seq2seq(model):
        return TargetDecoder(model, distinct, of)
    if has_forest(model):
        if dtype is not None and model.device.type == "cpu":
            dtype = torch.float32  # attention over one token a row is twice as fast as in bfloat16
        cache = RowCache([len(prompt) for prompt in prompts], room, model.device, dtype)
        return ForestDecoder(model, distinct, of, cache)
    return PaddedDecoder(model, distinct, of)


class ForestDecoder:
    """Of a model that serves the forest.

    Args:
        model: the model.
        prompts: distinct ones, the longest first.
        of: the prompt of each of n rows, ascending.
        cache: of the n rows.
    """

    def __init__(self, model, prompts: Sequence[Sequence[int]], of: list[int], cache: RowCache) -> None:
        self.model, self.prompts, self.of, self.cache = model, prompts, of, cache

    def read(self) -> Tensor:
        """Read the prompts. -> logits [n, V]."""
        logits = []
        for first, stop in self._parts():
            forest = plant([Segment(prompt) for prompt in self.prompts[first:stop]]).to(self.model.device)
            ends = [start + length - 1 for start, length in zip(forest.starts, forest.lengths, strict=True)]
            rows = [row for row, prompt in enumerate(self.of) if first <= prompt < stop]
            self.cache.lay(rows[0], [forest.starts[self.of[row] - first] for row in rows])
            out = run_forest(
                self.model, forest, past_key_values=self.cache, use_cache=True,
                logits_to_keep=torch.tensor(ends, device=self.model.device),
            ).logits[0]  # fmt: skip
            logits.append(out if len(out) == len(ends) else out[ends])
        self.cache.begin()
        self.positions = torch.tensor(self.cache.lengths, device=self.model.device)[:, None]
        self.positions += first_position(self.model)
        return torch.cat(logits)[self.of]

    def step(self, tokens: Tensor) -> Tensor:
        """Read one token a row, [n] -> logits [n, V]."""
        out = self.model(
            input_ids=tokens[:, None], position_ids=self.positions, attention_mask=NO_MASK.to(tokens.device),
            past_key_values=self.cache, use_cache=True, forest=self.cache, logits_to_keep=1,
        )  # fmt: skip
        self.cache.column += 1
        self.positions = self.positions + 1
        return out.logits[:, -1]

    def select(self, rows: Tensor) -> None:
        """Give up all rows but these, ascending."""
        self.cache.select(rows)
        self.positions = self.positions[rows]

    def _parts(self) -> Iterator[tuple[int, int]]:
        """Neighbouring prompts of at most so many tokens."""
        first = tokens = 0
        for stop, prompt in enumerate(self.prompts):
            if stop > first and tokens + len(prompt) > PREFILL_TOKENS:
                yield first, stop
                first, tokens = stop, 0
            tokens += len(prompt)
        yield first, len(self.prompts)


class PaddedDecoder:
    """Of any other model: prompts padded on the left.

    Arguments as of :class:`ForestDecoder`.
    """

    def __init__(self, model, prompts: Sequence[Sequence[int]], of: list[int]) -> None:
        self.model, self.prompts, self.of = model, prompts, of

    def read(self) -> Tensor:
        """Read the prompts. -> logits [n, V].

        Raises:
            ValueError: the model keeps no key-value cache of transformers.
        """
        tokens, is_real = (x.to(self.model.device) for x in left_pad(self.prompts, 0))
        self.cache, self.is_real = None, is_real
        self.positions = positions_of(is_real) + first_position(self.model)
        logits = self._forward(tokens)
        if self.cache is None:
            raise ValueError(f"{type(unwrapped(self.model)).__name__} keeps no cache to decode with")
        self.select(torch.tensor(self.of, device=self.model.device))
        return logits[self.of]

    def step(self, tokens: Tensor) -> Tensor:
        """Read one token a row, [n] -> logits [n, V]."""
        self.is_real = torch.cat([self.is_real, self.is_real.new_ones(len(tokens), 1)], 1)
        self.positions = self.positions[:, -1:] + 1
        return self._forward(tokens[:, None])

    def select(self, rows: Tensor) -> None:
        """Give up all rows but these; a row that is named twice is doubled."""
        self.cache.reorder_cache(rows)
        self.is_real, self.positions = self.is_real[rows], self.positions[rows]

    def _forward(self, tokens: Tensor) -> Tensor:
        out = self.model(
            input_ids=tokens, attention_mask=self.is_real.long(), position_ids=self.positions,
            past_key_values=self.cache, use_cache=True, logits_to_keep=1,
        )  # fmt: skip
        self.cache = getattr(out, "past_key_values", None)
        return out.logits[:, -1]

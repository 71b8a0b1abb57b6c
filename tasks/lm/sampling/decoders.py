"""Next-token logits of a batch of rows, token by token, over a key-value cache.

A model that serves the forest reads its prompts in a row without padding, then each row's new token over a
:class:`tasks.lm.attention.kv_cache.RowCache`; any other model reads rows padded on the left, or of one
length, with the cache that it makes itself, or all anew at each step: whichever of these says what its plain
forward says. All ways but the last read a prompt that several rows share once, and all give up rows that have
ended. An encoder-decoder's prompts are read by its encoder (:mod:`tasks.lm.sampling.seq2seq_decoder`).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from tasks.lm.attention.forest import NO_MASK, Segment, has_forest, plant, run_forest
from tasks.lm.attention.kv_cache import RowCache
from tasks.lm.attention.padding import left_pad, positions_of
from tasks.lm.logprobs.lm_head import predict
from tasks.lm.logprobs.roads import (
    alone,
    attention_kept,
    is_close_in,
    remembered,
    take_road,
    trial_tokens,
    trying,
    without_router,
)
from tasks.lm.model.kinds import first_position, is_seq2seq, unwrapped
from tasks.lm.model.modes import evaluating
from tasks.lm.sampling.seq2seq_decoder import TargetDecoder

PREFILL_TOKENS = 8192  # most of one forward over several prompts


@contextmanager
def prepared(model) -> Iterator[None]:
    """In evaluation mode, and served by the forest where it can be; afterwards as it was."""
    with attention_kept(model), evaluating(model), without_router(model):
        take_road(model)
        way_of(model)
        yield


def way_of(model) -> str:
    """How rows of a model are decoded: the first of `WAYS` that says what plain forwards say.

    Tried with a few tokens, once for a model and all like it.

    Raises:
        ValueError: none does.
    """
    if is_seq2seq(model):
        return "target"
    return remembered(model, ("decoding", has_forest(model)), lambda: _try_ways(model))


def parts_of(model, order: Sequence[int], prompts: Sequence[Sequence[int]], rows: int) -> Iterator[list[int]]:
    """What is decoded side by side: at most so many rows; of one length, where a model reads no padding.

    Args:
        model: :func:`prepared`.
        order: indices of the prompts, the longest first.
        prompts: all of them.
        rows: most of a part.
    """
    part: list[int] = []
    for i in order:
        is_other = part and way_of(model) == "alike" and len(prompts[i]) != len(prompts[part[0]])
        if part and (is_other or len(part) == rows):
            yield part
            part = []
        part.append(i)
    if part:
        yield part


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
    way = way_of(model)
    if way == "forest":
        if dtype is not None and model.device.type == "cpu":
            dtype = torch.float32  # attention over one token a row is twice as fast as in bfloat16
        cache = RowCache([len(prompt) for prompt in prompts], room, model.device, dtype)
        return ForestDecoder(model, distinct, of, cache)
    return WAYS[way](model, distinct, of)


@torch.no_grad()
def _try_ways(model) -> str:
    long, short, like, *answers = trial_tokens(model, (6, 3, 6, 3, 3, 3))
    dtype = next(model.parameters()).dtype
    with trying(model):
        for way in WAYS:
            if way == "target" or (way == "forest" and not has_forest(model)):
                continue
            prompts = [long, long, like if way == "alike" else short]
            try:
                wanted = _plain(model, prompts, answers)
                if is_close_in(dtype, _decoded(way, model, prompts, answers), wanted):
                    return way
            except Exception:  # caches fail in many ways; the last way needs none
                continue
    name = type(unwrapped(model)).__name__
    raise ValueError(f"{name} cannot be decoded: no way says what its plain forward says")


def _decoded(way: str, model, prompts: Sequence[list[int]], answers: Sequence[list[int]]) -> Tensor:
    """Logits of three rows, and of two of them where the middle one has ended. -> [8, V]."""
    if way == "forest":
        cache = RowCache([len(prompt) for prompt in prompts], len(answers[0]), model.device)
        decoder = ForestDecoder(model, [prompts[0], prompts[2]], [0, 0, 1], cache)
    else:
        decoder = WAYS[way](model, [prompts[0], prompts[2]], [0, 0, 1])
    tokens = torch.tensor(answers, device=model.device)
    found = [decoder.read(), decoder.step(tokens[:, 0])]
    left = torch.tensor([0, 2], device=model.device)
    decoder.select(left)
    return torch.cat([*found, decoder.step(tokens[left, 1])])


def _plain(model, prompts: Sequence[list[int]], answers: Sequence[list[int]]) -> Tensor:
    each = [alone(model, [*p, *a])[len(p) - 1 :] for p, a in zip(prompts, answers, strict=True)]
    rows = (0, 1, 2), (0, 1, 2), (0, 2)  # that are left at each step
    return torch.stack([each[row][t] for t, left in enumerate(rows) for row in left])


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


class AlikeDecoder(PaddedDecoder):
    """Of a model that reads no padding: prompts of one length, with the cache that the model makes itself.

    Arguments as of :class:`ForestDecoder`.
    """

    def _forward(self, tokens: Tensor) -> Tensor:
        out = self.model(input_ids=tokens, past_key_values=self.cache, use_cache=True)
        self.cache = getattr(out, "past_key_values", None)
        return out.logits[:, -1]


class RereadingDecoder:
    """Of a model whose cache does not serve: each step reads the whole rows again.

    Arguments as of :class:`ForestDecoder`.
    """

    def __init__(self, model, prompts: Sequence[Sequence[int]], of: list[int]) -> None:
        self.model, self.rows = model, [list(prompts[prompt]) for prompt in of]

    def read(self) -> Tensor:
        """Read the rows. -> logits [n, V]."""
        device = next(self.model.parameters()).device
        tokens = pad_sequence([torch.tensor(row) for row in self.rows], batch_first=True).to(device)
        ends = torch.tensor([len(row) - 1 for row in self.rows], device=device)
        places = ends + torch.arange(len(self.rows), device=device) * tokens.shape[1]
        return predict(self.model, lambda model: model(tokens, use_cache=False), places).logits()

    def step(self, tokens: Tensor) -> Tensor:
        """Read one token more of each row, [n] -> logits [n, V]."""
        for row, token in zip(self.rows, tokens.tolist(), strict=True):
            row.append(token)
        return self.read()

    def select(self, rows: Tensor) -> None:
        """Give up all rows but these."""
        self.rows = [list(self.rows[row]) for row in rows.tolist()]


WAYS = {  # the fastest first
    "forest": ForestDecoder,
    "padded": PaddedDecoder,
    "alike": AlikeDecoder,
    "anew": RereadingDecoder,
    "target": TargetDecoder,
}

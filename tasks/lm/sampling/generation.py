"""Sampling: own loop over a key-value cache, one pre-drawn uniform number per token.

A row's tokens depend on its prompt and its own uniforms only, not on the rows it is batched with: what
another batch changes are the last bits of its logits. A model that serves the forest reads its prompts
without padding and each distinct one once, and decodes over :class:`tasks.lm.attention.kv_cache.RowCache`;
any other one reads padded rows and keeps a cache of its own. Rows that have ended leave the batch.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass

import numpy as np
import torch
from numpy.random import Philox
from torch import Tensor

from tasks.lm.logprobs.seq2seq import check_speaker
from tasks.lm.model.context import Room, speaking_room
from tasks.lm.model.ends import ids_of
from tasks.lm.model.kinds import unwrapped
from tasks.lm.numerics.matmul import default_products
from tasks.lm.sampling.decoders import decoder_of, parts_of, prepared
from tasks.lm.sampling.prepack import prepacked
from tasks.lm.sampling.steering import Steering

AUTOCAST = {"float32": None, "bfloat16": torch.bfloat16}
FEW = 0.75  # when no more of the rows than this are left, the others leave the batch
LEAST_TOKENS = 8  # of a response that pays for laying out the weights anew


@dataclass(frozen=True, slots=True)
class Responses:
    """Sampled responses, padded on the right.

    Miniature: with eos 1 and pad 0, tokens [[7, 8, 1], [9, 1, 0]], is_response [[T, T, T], [T, T, F]].
    """

    tokens: Tensor  # [B, R] int64
    is_response: Tensor  # [B, R] bool: real tokens, a prefix of each row that ends with eos or at its most

    def lists(self) -> list[list[int]]:
        """The real tokens of each row."""
        return [row[keep].tolist() for row, keep in zip(self.tokens, self.is_response, strict=True)]


def row_seeds(seed: int, rows: int) -> list[int]:
    """A seed for each row, the same ones however many rows are asked for."""
    return Philox(key=seed % 2**128).random_raw(rows).tolist()


def draw_uniforms(seeds: Sequence[int], tokens: int) -> Tensor:
    """Uniform numbers in [0, 1), [B, tokens]: number t of row i is a function of `seeds[i]` and t alone.

    From a counter-based generator (Philox, Salmon et al. 2011), on the CPU, so that every device draws the
    same.
    """
    raw = np.empty((len(seeds), tokens), np.uint64)
    for row, seed in enumerate(seeds):
        raw[row] = Philox(key=seed % 2**128).random_raw(tokens)
    return torch.from_numpy((raw >> 40).astype(np.float32) / 2**24)


@dataclass(frozen=True, slots=True)
class Draw:
    """How a token is drawn from logits; see :func:`generate`."""

    eos_ids: tuple[int, ...] = ()
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_tokens: int = 0

    def ends(self, token: Tensor) -> Tensor:
        """Which of these tokens [B] end a response."""
        if len(self.eos_ids) == 1:
            return token == self.eos_ids[0]
        return torch.isin(token, torch.tensor(self.eos_ids, dtype=token.dtype, device=token.device))

    def __call__(self, logits: Tensor, uniforms: Tensor | None, before: int) -> Tensor:
        """[B, V], [B] -> [B], after so many tokens of the response; None: the most probable token."""
        logits = logits.float()
        if self.eos_ids and before < self.min_tokens:
            logits = logits.index_fill(1, torch.tensor(self.eos_ids, device=logits.device), -torch.inf)
        if uniforms is None:
            return logits.argmax(-1)
        return sample(restrict(logits / self.temperature, self.top_k, self.top_p), uniforms)


@torch.no_grad()
def generate(
    model,
    prompts: Sequence[Sequence[int] | Tensor],
    *,
    max_tokens: int | Sequence[int],
    eos_id: int | Sequence[int] | None,
    pad_id: int,
    uniforms: Tensor | None = None,
    temperature: float = 1.0,
    top_k: int = 0,
    top_p: float = 1.0,
    min_tokens: int = 0,
    rows: int = 512,
    dtype: str = "float32",
    steering: Steering | None = None,
) -> Responses:
    """Continue each prompt until eos or its most tokens; the eos belongs to the response.

    The model is left as it was, and no global random state is touched.

    Args:
        model: a language model, causal or with an encoder, which reads the prompts then.
        prompts: B lists or vectors of token ids; equal ones are read once.
        max_tokens: most tokens of a response: of all, or of each row. R is the largest.
        eos_id: ends a response; of several, each does; None: nothing does.
        pad_id: fills up.
        uniforms: [B, ≥ R] from :func:`draw_uniforms`; None: greedy.
        temperature: the logits are divided by it.
        top_k: only the so many most probable tokens are drawn; 0: all.
        top_p: only the fewest most probable tokens are drawn that together reach this probability.
        min_tokens: eos has no probability before so many tokens.
        rows: most rows decoded side by side.
        dtype: `bfloat16`: matrix products as under autocast; `float32`: in the weights' own dtype.
        steering: of these rows; None: the model's own logits, and no text ends a response.

    Returns:
        Responses [B, R], on the model's device.

    Raises:
        ValueError: an empty prompt, one that is too long for the model with its response, or another argument
            out of its bounds; the message names it and the row. Nothing is computed then.
    """
    prompts = [prompt.tolist() if isinstance(prompt, Tensor) else list(prompt) for prompt in prompts]
    limits = [max_tokens] * len(prompts) if isinstance(max_tokens, int) else list(max_tokens)
    _check_rows(prompts, limits, uniforms, speaking_room(model))
    _check_numbers(temperature, top_k, top_p, min_tokens, rows, dtype)
    check_speaker(model)
    width = max_tokens if isinstance(max_tokens, int) else max(limits, default=0)
    tokens = torch.full((len(prompts), width), pad_id, device=model.device)
    is_response = torch.zeros_like(tokens, dtype=torch.bool)
    known = unwrapped(model).get_output_embeddings().weight.shape[0]
    ends = tuple(token for token in ids_of(eos_id) if 0 <= token < known)
    draw = Draw(ends, temperature, top_k, top_p, min_tokens)
    order = sorted(range(len(prompts)), key=lambda i: (-len(prompts[i]), prompts[i]))
    low = AUTOCAST[dtype]
    with torch.autocast(model.device.type, low, enabled=low is not None), prepared(model):
        with prepacked(model, low) if width >= LEAST_TOKENS else nullcontext():
            for part in parts_of(model, order, prompts, rows):
                noise = None if uniforms is None else uniforms[part].to(model.device)
                most = torch.tensor([limits[i] for i in part], device=model.device)
                decoder = decoder_of(model, [prompts[i] for i in part], int(most.max()), low)
                found = _decode(decoder, most, draw, noise, pad_id, steering, part)
                tokens[part, : found.tokens.shape[1]] = found.tokens
                is_response[part, : found.tokens.shape[1]] = found.is_response
    return Responses(tokens, is_response)


def _decode(
    decoder,
    limits: Tensor,
    draw: Draw,
    uniforms: Tensor | None,
    pad_id: int,
    steering: Steering | None = None,
    numbers: Sequence[int] = (),
) -> Responses:
    """All tokens of n rows that stand side by side, each until eos or its limit [n].

    `numbers` are those that the rows have in `steering`.
    """
    n, most = len(limits), int(limits.max())
    tokens = torch.full((n, most), pad_id, device=limits.device)
    is_response = torch.zeros_like(tokens, dtype=torch.bool)
    rows, is_open = torch.arange(n, device=limits.device), torch.ones_like(limits, dtype=torch.bool)
    logits = decoder.read()
    with default_products():
        for t in range(most):
            if steering is not None:
                own = [numbers[row] for row in rows.tolist()]
                logits = steering.logits(own, tokens[rows, :t], logits)
            token = draw(logits, None if uniforms is None else uniforms[rows, t], t)
            tokens[rows, t] = torch.where(is_open, token, pad_id)
            is_response[rows, t] = is_open
            is_open &= limits[rows] > t + 1
            if draw.eos_ids:
                is_open &= ~draw.ends(token)
            if steering is not None:
                is_open &= ~steering.ends(own, tokens[rows, : t + 1])
            left = int(is_open.sum())
            if not left:
                break
            if left <= FEW * len(rows):
                staying = is_open.nonzero()[:, 0]
                decoder.select(staying)
                rows, token, is_open = rows[staying], token[staying], is_open[staying]
            logits = decoder.step(token)
    return Responses(tokens, is_response)


def restrict(logits: Tensor, top_k: int = 0, top_p: float = 1.0) -> Tensor:
    """−∞ for all but the `top_k` largest, and of these but the fewest that reach `top_p`. [B, V] -> [B, V].

    As transformers' warpers do: k first, and ties with the k-th stay.
    """
    if 0 < top_k < logits.shape[-1]:
        logits = logits.masked_fill(logits < logits.topk(top_k).values[:, -1:], -torch.inf)
    if top_p < 1.0:
        ascending, order = logits.sort(-1)
        is_out = ascending.softmax(-1).cumsum(-1) <= 1 - top_p
        is_out[:, -1] = False
        logits = logits.masked_fill(is_out.scatter(1, order, is_out), -torch.inf)
    return logits


def sample(logits: Tensor, uniforms: Tensor) -> Tensor:
    """Invert the cumulative distribution: the first token whose cumulative probability exceeds u.

    [B, V], [B] -> [B].
    """
    cumulative = logits.softmax(-1).cumsum(-1)
    wanted = (uniforms[:, None] * cumulative[:, -1:]).contiguous()
    return torch.searchsorted(cumulative, wanted, right=True)[:, 0].clamp(max=logits.shape[-1] - 1)


def _check_rows(prompts, limits: Sequence[int], uniforms: Tensor | None, room: Room) -> None:
    if len(limits) != len(prompts):
        raise ValueError(f"max_tokens has {len(limits)} rows, prompts {len(prompts)}")
    for i, (prompt, limit) in enumerate(zip(prompts, limits, strict=True)):
        if limit < 1:
            raise ValueError(f"max_tokens of row {i} is {limit}; a response has at least one token")
        if len(prompt) == 0:
            raise ValueError(f"prompts: row {i} is empty")
        if not room.holds(len(prompt), limit):
            raise ValueError(
                f"prompts: row {i} has {len(prompt)} tokens, with a response of {limit} too many for the "
                f"model's {room.tokens} positions"
            )
    wanted = (len(prompts), max(limits, default=0))
    if uniforms is not None and (uniforms.shape[0] != wanted[0] or uniforms.shape[1] < wanted[1]):
        raise ValueError(f"uniforms have the shape {tuple(uniforms.shape)}, at least {wanted} is needed")


def _check_numbers(temperature, top_k, top_p, min_tokens, rows, dtype) -> None:
    rules = {
        f"temperature ({temperature}) must be above 0": temperature > 0,
        f"top_k ({top_k}) must not be negative": top_k >= 0,
        f"top_p ({top_p}) must be above 0 and at most 1": 0 < top_p <= 1,
        f"min_tokens ({min_tokens}) must not be negative": min_tokens >= 0,
        f"rows ({rows}) must be at least 1": rows >= 1,
        f"dtype ({dtype}) must be one of {', '.join(AUTOCAST)}": dtype in AUTOCAST,
    }
    for rule, holds in rules.items():
        if not holds:
            raise ValueError(rule)

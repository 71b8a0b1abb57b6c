"""Sampling: own loop over a key-value cache, one pre-drawn uniform number per token.

A row's tokens depend on its prompt and its own uniforms only, not on the rows it is batched with.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from tasks.lm.sequences import left_pad, positions_of


@dataclass(frozen=True, slots=True)
class Responses:
    """Sampled responses, padded on the right.

    Miniature: with eos 1 and pad 0, tokens [[7, 8, 1], [9, 1, 0]], is_response [[T, T, T], [T, T, F]].
    """

    tokens: Tensor  # [B, R] int64
    is_response: Tensor  # [B, R] bool: real tokens, a prefix of each row that ends with eos or at R

    def lists(self) -> list[list[int]]:
        """The real tokens of each row."""
        return [row[keep].tolist() for row, keep in zip(self.tokens, self.is_response, strict=True)]


def draw_uniforms(rows: int, tokens: int, seed: int) -> Tensor:
    """Uniform numbers in [0, 1), [rows, tokens]; on the CPU, so that every device draws the same."""
    return torch.rand(rows, tokens, generator=torch.Generator().manual_seed(seed))


@torch.no_grad()
def generate(
    model,
    prompts: Sequence[Sequence[int]],
    *,
    max_tokens: int,
    eos_id: int,
    pad_id: int,
    uniforms: Tensor | None = None,
    temperature: float = 1.0,
    rows: int = 512,
) -> Responses:
    """Continue each prompt until eos or `max_tokens`; the eos belongs to the response.

    Args:
        model: a causal language model, left in evaluation mode.
        prompts: B lists of token ids.
        max_tokens: R, the most tokens of a response.
        eos_id: ends a response.
        pad_id: fills up.
        uniforms: [B, R] from :func:`draw_uniforms`; None: greedy.
        temperature: the logits are divided by it.
        rows: most rows decoded side by side.

    Returns:
        Responses [B, R], on the model's device.
    """
    model.eval()
    order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))  # rows of like length side by side
    tokens = torch.full((len(prompts), max_tokens), pad_id, device=model.device)
    for first in range(0, len(order), rows):
        part = order[first : first + rows]
        noise = None if uniforms is None else uniforms[part].to(model.device)
        chosen = _decode(model, [prompts[i] for i in part], max_tokens, eos_id, pad_id, noise, temperature)
        tokens[torch.tensor(part, device=model.device)] = chosen
    ended = (tokens == eos_id).cumsum(-1)
    return Responses(tokens, (ended == 0) | ((tokens == eos_id) & (ended == 1)))


def _decode(model, prompts, max_tokens, eos_id, pad_id, uniforms, temperature) -> Tensor:
    ids, is_real = (x.to(model.device) for x in left_pad(prompts, pad_id))
    positions, cache = positions_of(is_real), None
    out = torch.full((len(prompts), max_tokens), pad_id, device=model.device)
    done = torch.zeros(len(prompts), dtype=torch.bool, device=model.device)
    for t in range(max_tokens):
        step = model(
            input_ids=ids, attention_mask=is_real.long(), position_ids=positions,
            past_key_values=cache, use_cache=True, logits_to_keep=1,
        )  # fmt: skip
        cache, logits = step.past_key_values, step.logits[:, -1].float()
        token = logits.argmax(-1) if uniforms is None else sample(logits / temperature, uniforms[:, t])
        out[:, t] = torch.where(done, pad_id, token)
        done |= token == eos_id
        if done.all():
            break
        ids, positions = out[:, t : t + 1], positions[:, -1:] + 1
        is_real = torch.cat([is_real, torch.ones_like(done)[:, None]], 1)
    return out


def sample(logits: Tensor, uniforms: Tensor) -> Tensor:
    """Invert the cumulative distribution: the first token whose cumulative probability exceeds u.

    [B, V], [B] -> [B].
    """
    cumulative = logits.softmax(-1).cumsum(-1)
    wanted = (uniforms[:, None] * cumulative[:, -1:]).contiguous()
    return torch.searchsorted(cumulative, wanted, right=True)[:, 0].clamp(max=logits.shape[-1] - 1)

"""A rollout: responses to prompts, and what policy, critic and reference thought of each of their tokens."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass, fields

import torch
from torch import Tensor

from tasks.lm.sequences import Sequences, read_responses, response_logprobs


@dataclass(frozen=True, slots=True)
class Rollout:
    """B responses before the update that learns from them."""

    sequences: Sequences
    logprobs: Tensor  # [B, R] nats, of the policy that sampled
    entropy: Tensor  # [B, R] nats
    values: Tensor  # [B, R] score units, of the state before each token
    ref_logprobs: Tensor  # [B, R] nats

    @property
    def is_response(self) -> Tensor:
        """Real response tokens, [B, R]."""
        return self.sequences.is_response

    def kl_nats(self) -> Tensor:
        """KL to the reference, summed over each response (k1 estimate). [B]."""
        return ((self.logprobs - self.ref_logprobs) * self.is_response).sum(1)


@torch.no_grad()
def observe(
    model,
    ref_model,
    sequences: Sequences,
    temperature: float,
    rows: int,
    precision: Callable[[], AbstractContextManager],
) -> Rollout:
    """What policy, critic and reference think of given responses, at most `rows` in one forward."""
    parts = []
    for index in torch.arange(len(sequences.tokens), device=sequences.tokens.device).split(rows):
        part = sequences.rows(index)
        with precision():
            own = read_responses(model, part, temperature)
            parts.append((*own, response_logprobs(ref_model, part, temperature)))
    names = [f.name for f in fields(Rollout)][1:]
    return Rollout(
        sequences, **{n: torch.cat(each) for n, each in zip(names, zip(*parts, strict=True), strict=True)}
    )

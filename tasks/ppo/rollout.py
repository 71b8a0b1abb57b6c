"""A rollout: responses to prompts, and what policy, critic and reference thought of each of their tokens."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass, fields

import torch
from torch import Tensor

from tasks.lm.attention.padding import Sequences
from tasks.lm.logprobs.frozen_layers import Hydra, TrunkStates, joined
from tasks.lm.logprobs.responses import read_responses, read_trunk, response_kl, response_logprobs
from tasks.ppo.rewards import kl_estimate

Context = Callable[[], AbstractContextManager]
ALL_LEARNS = Hydra()


@dataclass(frozen=True, slots=True)
class Rollout:
    """B responses before the update that learns from them."""

    sequences: Sequences
    is_action: Tensor  # [B, R] bool: tokens the policy chose; those of a tool are seen, not learnt
    logprobs: Tensor  # [B, R] nats, of the policy that sampled
    entropy: Tensor  # [B, R] nats
    values: Tensor  # [B, R] score units, of the state before each token
    ref_logprobs: Tensor  # [B, R] nats
    kl: Tensor  # [B, R] nats: what is priced
    trunk: TrunkStates | None = None  # what the policy's frozen blocks make of the tokens

    def rows(self, index: Tensor) -> Rollout:
        """Some rows."""
        rest = {f.name: getattr(self, f.name)[index] for f in fields(self)[1:-1]}
        trunk = None if self.trunk is None else self.trunk.rows(index)
        return Rollout(self.sequences.rows(index), **rest, trunk=trunk)

    def kl_nats(self) -> Tensor:
        """What is priced, summed over each response. [B]."""
        return (self.kl * self.is_action).sum(1)


@torch.no_grad()
def observe(
    model,
    ref_model,
    reference: Context,
    sequences: Sequences,
    is_action: Tensor,
    temperature: float,
    kl_penalty: str,
    rows: int,
    precision: Context,
    hydra: Hydra = ALL_LEARNS,
) -> Rollout:
    """What policy, critic and reference think of given responses, at most `rows` in one forward.

    Args:
        model: a causal language model with a value head.
        ref_model: another one; None: the model under other adapters, or none.
        reference: opens a context that gives either as a causal model.
        sequences: B rows.
        is_action: [B, R].
        temperature: logits are divided by it.
        kl_penalty: how the KL of a token is estimated.
        rows: most in one forward.
        precision: of the forward.
        hydra: of policy and reference; the frozen trunk runs once.
    """
    causal, trunks, parts = model.pretrained_model, [], []
    for index in torch.arange(len(sequences.tokens), device=sequences.tokens.device).split(rows):
        part = sequences.rows(index)
        with precision():
            trunk = read_trunk(causal, part, hydra.depth) if hydra.depth else None
            logprobs, entropy, values = read_responses(model, part, temperature, trunk=trunk)
            with reference() as other:
                shared = trunk if hydra.is_shared else None
                ref_logprobs = response_logprobs(other, part, temperature, trunk=shared)
            if kl_penalty == "full":
                kl = response_kl(model, ref_model, part, temperature, trunk=trunk, reference=reference)
            else:
                kl = kl_estimate(logprobs - ref_logprobs, kl_penalty)
        trunks = _keep(trunks, trunk, hydra.most_bytes)
        parts.append((logprobs, entropy, values, ref_logprobs, kl))
    found = (torch.cat(each) for each in zip(*parts, strict=True))
    return Rollout(sequences, is_action, *found, trunk=joined(trunks) if trunks else None)


def _keep(kept: list | None, trunk: TrunkStates | None, most_bytes: int) -> list | None:
    """One more part; None, and nothing is kept any more, where the parts outgrow their bound."""
    if kept is None or trunk is None or sum(part.nbytes for part in [*kept, trunk]) > most_bytes:
        return None
    return [*kept, trunk]

"""The reference: a frozen copy of the policy, which may share the layers that stay what they are."""

from __future__ import annotations

import copy

from torch import nn

from tasks.lm.model.freezing import blocks_of, trunk_of


def create_reference_model(model: nn.Module, num_shared_layers: int | None = None) -> nn.Module:
    """A frozen copy in evaluation mode.

    Args:
        model: a causal language model, with or without a value head; unchanged but for what is shared.
        num_shared_layers: so many of the first blocks, with the embeddings and a head tied to them, are the
            reference's too, in the same memory: they are frozen in the model itself. None: nothing is shared.

    Raises:
        ValueError: more blocks than the model has, or fewer than none.
    """
    shared = []
    if num_shared_layers is not None:
        causal = getattr(model, "pretrained_model", model)
        blocks = len(blocks_of(causal))
        if not 0 <= num_shared_layers <= blocks:
            raise ValueError(f"num_shared_layers is {num_shared_layers}; the model has {blocks} blocks")
        shared = [p for part in trunk_of(causal, num_shared_layers) for p in part.parameters()]
    known = {id(parameter): parameter for parameter in shared}  # deepcopy takes these for copied
    return copy.deepcopy(model, known).eval().requires_grad_(False)

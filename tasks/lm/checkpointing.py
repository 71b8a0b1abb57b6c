"""Gradient checkpointing of a model in evaluation mode, in which transformers leaves it off in silence."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial

from torch import nn
from torch.utils.checkpoint import checkpoint
from transformers.modeling_layers import GradientCheckpointingLayer

from tasks.lm.forest import unwrapped


@contextmanager
def recompute_blocks(model: nn.Module, is_wanted: bool = True) -> Iterator[None]:
    """Inside, blocks compute their activations again in the backward; dropout stays as it is.

    Only the blocks themselves are told that they train, not the layers in them. The backward must run inside.

    Args:
        model: with a `pretrained_model`, or bare.
        is_wanted: False: nothing is done.

    Raises:
        ValueError: the model has no blocks that can be computed again.
    """
    if not is_wanted:
        yield
        return
    bare = unwrapped(getattr(model, "pretrained_model", model))
    blocks = [m for m in bare.modules() if isinstance(m, GradientCheckpointingLayer)]
    if not blocks:
        raise ValueError(f"gradient_checkpointing: {type(bare).__name__} does not support it")
    before = [(block.training, block.gradient_checkpointing) for block in blocks]
    for block in blocks:
        block._gradient_checkpointing_func = partial(checkpoint, use_reentrant=False)
        block.training = block.gradient_checkpointing = True
    try:
        yield
    finally:
        for block, (was_training, was_wanted) in zip(blocks, before, strict=True):
            block.training, block.gradient_checkpointing = was_training, was_wanted

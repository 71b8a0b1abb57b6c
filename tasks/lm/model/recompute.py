"""Gradient checkpointing of a model in evaluation mode, in which transformers leaves it off in silence."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

from torch import nn
from torch.utils.checkpoint import checkpoint
from transformers.modeling_layers import GradientCheckpointingLayer

from tasks.lm.model.kinds import unwrapped


@contextmanager
def recompute_blocks(model: nn.Module, is_wanted: bool = True) -> Iterator[None]:
    """Inside, blocks compute their activations again in the backward; all modules stay in their modes.

    transformers' own way asks the blocks to be in training mode, in which those of OPT and BART drop out.

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
    for block in blocks:
        block.forward = partial(_again, block.forward)
    try:
        yield
    finally:
        for block in blocks:
            del block.forward


def _again(forward: Callable, *args: Any, **keys: Any) -> Any:
    return checkpoint(partial(forward, **keys), *args, use_reentrant=False)

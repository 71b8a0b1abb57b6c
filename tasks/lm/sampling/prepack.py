"""Linear layers for decoding: weights in the layout and the dtype in which a few rows read them fastest.

A decoding step reads every weight for a handful of rows. On CPUs oneDNN reads weights that were laid out for
it beforehand up to twice as fast, in float32 and bfloat16; and under autocast every step would cast every
weight anew. The copies live for the time of one rollout.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers.pytorch_utils import Conv1D

ROWS = 16  # of a forward, for which the layout is asked; it serves others as well
LEAST_WEIGHTS = 2**17  # of a layer; smaller ones gain nothing
CLOSE = {torch.float32: 1e-5, torch.bfloat16: 2e-2}  # of the self-test, relative to the largest magnitude


@contextmanager
def prepacked(model: nn.Module, dtype: torch.dtype | None = None) -> Iterator[None]:
    """Large plain linear layers compute from such copies inside; afterwards the model is as it was.

    Args:
        model: without gradients; adapters stay as they are around the layers that they wrap.
        dtype: of autocast; None: the weights' own.
    """
    changed = []
    try:
        for module in model.modules():
            if type(module) in (nn.Linear, Conv1D) and "forward" not in vars(module):
                if forward := _forward(module, dtype or module.weight.dtype):
                    module.forward = forward
                    changed.append(module)
        yield
    finally:
        for module in changed:
            del module.forward


def _forward(module: nn.Module, dtype: torch.dtype) -> Callable[[Tensor], Tensor] | None:
    """The layer's product from a copy of its weights; None where that gains nothing."""
    if module.weight.numel() < LEAST_WEIGHTS:
        return None
    weight = module.weight.detach() if isinstance(module, nn.Linear) else module.weight.detach().mT
    bias = None if module.bias is None else module.bias.detach().to(dtype)
    if weight.device.type == "cpu" and can_pack(dtype):
        packed = torch.ops.mkldnn._reorder_linear_weight(weight.to(dtype).contiguous(), ROWS)
        return lambda x: torch.ops.mkldnn._linear_pointwise(x.to(dtype), packed, bias, "none", [], "")
    if dtype != weight.dtype:
        weight = weight.to(dtype)
        return lambda x: functional.linear(x.to(dtype), weight, bias)
    return None


@cache
def can_pack(dtype: torch.dtype) -> bool:
    """Self-test, once a dtype: torch has the two private operations, and they are exact."""
    if dtype not in CLOSE or not torch.backends.mkldnn.is_available():
        return False
    draw = torch.Generator().manual_seed(0)
    shapes = (5, 3, 96), (160, 96), (160,)
    x, weight, bias = (torch.randn(shape, generator=draw).to(dtype) for shape in shapes)
    try:
        packed = torch.ops.mkldnn._reorder_linear_weight(weight, ROWS)
        found = torch.ops.mkldnn._linear_pointwise(x, packed, bias, "none", [], "").double()
    except (AttributeError, RuntimeError):  # another torch, or a CPU without such instructions
        return False
    wanted = functional.linear(x.double(), weight.double(), bias.double())
    return bool((found - wanted).abs().max() <= CLOSE[dtype] * wanted.abs().max())

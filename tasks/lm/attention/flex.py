"""Forest attention in one fused kernel: flex_attention on CUDA, where tiles that no query sees are skipped.

What a token sees is stated as a rule on two places, from which a BlockMask is made once per row.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from functools import cache

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, create_block_mask, flex_attention

from tasks.lm.attention.blocks import attend, look

HEAD_SIZES = (16, 32, 64, 128, 256)
CLOSE = 0.05  # relative, of the self-test in bfloat16; a wrong mask errs by more than 1


def rule_of(lengths: Sequence[int], parents: Sequence[int], is_causal: bool, device) -> Callable[..., Tensor]:
    """Whether a query sees a key, by their places in the row: `rule(batch, head, query, key)`.

    The key's segment is the query's own or an ancestor's, and the key no later where the forest is causal. A
    walk down a tree enters a segment, then all that descend from it, and leaves it: an ancestor is entered no
    later than the query's segment, and left after that is entered.
    """
    sizes = [1] * len(parents)
    for i in range(len(parents) - 1, -1, -1):
        if parents[i] >= 0:
            sizes[parents[i]] += sizes[i]
    enter, free = [], {-1: 0}  # free: where the next child of a segment is entered
    for i, up in enumerate(parents):
        enter.append(free[up])
        free[up] += sizes[i]
        free[i] = enter[i] + 1
    each = torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths))
    entered = torch.tensor(enter)[each].to(device)
    left = entered + torch.tensor(sizes)[each].to(device)

    def sees(batch, head, query, key):
        related = (entered[key] <= entered[query]) & (entered[query] < left[key])
        return related & (key <= query) if is_causal else related

    return sees


def mask_of(lengths: Sequence[int], parents: Sequence[int], is_causal: bool, device) -> BlockMask:
    """The rule of a row, tile by tile."""
    total = sum(lengths)
    return create_block_mask(rule_of(lengths, parents, is_causal, device), None, None, total, total, device)


def can_fuse(query: Tensor, dropout: float, window: int | None) -> bool:
    """Whether the kernel serves a layer: neither dropout nor windows, and heads of some sizes only."""
    return not dropout and window is None and query.shape[-1] in HEAD_SIZES


def fused(query: Tensor, key: Tensor, value: Tensor, mask: BlockMask, scaling: float | None) -> Tensor:
    """Attention under a mask; query [1, heads, T, D], key and value with as many heads or fewer."""
    if torch.is_autocast_enabled(query.device.type):  # which knows no flex_attention
        dtype = torch.get_autocast_dtype(query.device.type)
        query, key, value = (x.to(dtype) for x in (query, key, value))
    return _kernel()(query, key, value, block_mask=mask, scale=scaling, enable_gqa=True)


@cache
def _kernel() -> Callable[..., Tensor]:
    return torch.compile(flex_attention, dynamic=True)


@cache
def works(device: torch.device) -> bool:
    """Self-test, once a device: forward and backward equal the blocks' on a small tree.

    Where it fails (an old device, no compiler, a defect), a warning says so and the blocks serve.
    """
    try:
        with torch.inference_mode(False), torch.autocast(device.type, enabled=False):
            wrong = [dtype for dtype in (torch.float32, torch.bfloat16) if not _is_close(device, dtype)]
        if wrong:
            raise RuntimeError(f"flex_attention errs in {wrong[0]}")
    except Exception as error:  # compilers and kernels fail in many ways
        reason = str(error).partition("\n")[0]
        warnings.warn(f"no fused forest attention on {device}: {reason}", stacklevel=2)
        return False
    return True


def _is_close(device: torch.device, dtype: torch.dtype) -> bool:
    lengths, parents = (40, 100, 7, 60), (-1, 0, 1, -1)
    places = torch.arange(sum(lengths)).split(lengths)
    paths = [places[0], torch.cat(places[:2]), torch.cat(places[:3]), places[3]]
    draw = torch.Generator().manual_seed(0)
    heads = (torch.randn(1, n, sum(lengths), 64, generator=draw) for n in (4, 2, 2, 4))
    query, key, value, upstream = (x.to(device, dtype).requires_grad_() for x in heads)
    wide = (x.repeat_interleave(4 // x.shape[1], 1)[0].transpose(0, 1) for x in (query, key, value))
    found = fused(query, key, value, mask_of(lengths, parents, True, device), None)
    wanted = attend(look(places, paths, is_causal=True).to(device), *wide).transpose(0, 1)[None]
    inputs = query, key, value
    gradients = (torch.autograd.grad(x, inputs, upstream) for x in (found, wanted))
    pairs = [(found, wanted), *zip(*gradients, strict=True)]
    return all((a - b).abs().max() <= CLOSE * b.abs().max() for a, b in pairs)

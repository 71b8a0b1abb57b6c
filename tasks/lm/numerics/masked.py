"""Statistics over the True part of a mask, on one process or over all of them."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor


def alone(x: Tensor) -> Tensor:
    """The sum over processes where there is one."""
    return x


def masked_sum(values: Tensor, mask: Tensor) -> Tensor:
    """Sum of `values` where `mask` is True, whatever stands elsewhere. Same shapes -> scalar."""
    return values.masked_fill(~mask, 0).sum()


def masked_mean(values: Tensor, mask: Tensor, total: Callable[[Tensor], Tensor] = alone) -> Tensor:
    """Mean of `values` where `mask` is True; 0 where nothing is. Same shapes -> scalar.

    Args:
        values: numbers.
        mask: bool.
        total: sums a tensor over the processes, which hold a part each.
    """
    summed, count = total(torch.stack([masked_sum(values, mask), mask.sum().to(values)]))
    return summed / count.clamp(min=1)


def masked_var(values: Tensor, mask: Tensor, total: Callable[[Tensor], Tensor] = alone) -> Tensor:
    """Unbiased variance of `values` where `mask` is True; 0 of a single one.

    Arguments as :func:`masked_mean`.
    """
    centred = values - masked_mean(values, mask, total)
    squares, count = total(torch.stack([masked_sum(centred.square(), mask), mask.sum().to(values)]))
    return squares / (count - 1).clamp(min=1)


def whiten(
    values: Tensor, mask: Tensor, total: Callable[[Tensor], Tensor] = alone, shift_mean: bool = True
) -> Tensor:
    """Scale to variance 1 over the mask, and shift to mean 0 unless told not to; 0 outside it.

    Arguments as :func:`masked_mean`. -> the same shape.
    """
    mean, var = masked_mean(values, mask, total), masked_var(values, mask, total)
    whitened = (values - mean) * (var + 1e-8).rsqrt()
    return (whitened if shift_mean else whitened + mean).masked_fill(~mask, 0)

"""Statistics over the True part of a mask."""

from __future__ import annotations

from torch import Tensor


def masked_mean(values: Tensor, mask: Tensor) -> Tensor:
    """Mean of `values` where `mask` is True; 0 where nothing is. Same shapes -> scalar."""
    return (values * mask).sum() / mask.sum().clamp(min=1)


def masked_var(values: Tensor, mask: Tensor) -> Tensor:
    """Biased variance of `values` where `mask` is True (finite for one element). Same shapes -> scalar."""
    return masked_mean((values - masked_mean(values, mask)) ** 2, mask)


def whiten(values: Tensor, mask: Tensor) -> Tensor:
    """Shift and scale to mean 0 and variance 1 over the mask; 0 outside it. Same shapes and result."""
    mean, var = masked_mean(values, mask), masked_var(values, mask)
    return (values - mean) * (var + 1e-8).rsqrt() * mask

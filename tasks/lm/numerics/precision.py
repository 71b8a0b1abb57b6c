"""bf16 autocast around a forward; master weights, softmax, log-probabilities and losses stay float32."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import torch


def autocast(device: torch.device, dtype: str) -> AbstractContextManager:
    """`bfloat16` autocasts matrix products on the device; `float32` does nothing."""
    return torch.autocast(device.type, torch.bfloat16) if dtype == "bfloat16" else nullcontext()

"""Seeds and devices."""

from __future__ import annotations

import ctypes
import random
from hashlib import sha256

M_MMAP_THRESHOLD, M_TRIM_THRESHOLD = -3, -1  # malloc.h
LARGEST = 2**31 - 1  # bytes


def derive_seed(seed: int, stage: str, purpose: str) -> int:
    """A seed for one use: the first eight bytes of sha256("seed/stage/purpose"), below 2⁶³."""
    digest = sha256(f"{seed}/{stage}/{purpose}".encode()).digest()
    return int.from_bytes(digest[:8], "big") % 2**63


def seed_everything(seed: int) -> None:
    """Seed python, numpy and torch."""
    import numpy
    import torch

    random.seed(seed)
    numpy.random.seed(seed % 2**32)
    torch.manual_seed(seed)


def use_device(device: str, threads: int):
    """Set CPU threads and allocator, and return the torch device; `auto`: cuda where there is one, else cpu.

    Raises:
        ValueError: cuda is asked for and there is none.
    """
    import torch

    torch.set_num_threads(threads)
    keep_freed_memory()
    if device == "cuda" and not torch.cuda.is_available():
        raise ValueError("machine.device is cuda, but torch sees no CUDA device")
    return torch.device(
        "cuda" if device == "auto" and torch.cuda.is_available() else device.replace("auto", "cpu")
    )


def keep_freed_memory() -> bool:
    """Let this process keep what it frees for what it allocates next, large tensors as well.

    glibc gives tensors of more than 32 MB back to the kernel when they are freed; the next one of that size
    is then zeroed page by page, at each step the gradients of all embeddings: 5 to 10 % of a step of PPO.

    Returns:
        Whether the C library knows how; if not, nothing has changed.
    """
    libc = ctypes.CDLL(None)
    if not hasattr(libc, "mallopt"):
        return False
    return all(libc.mallopt(option, LARGEST) for option in (M_MMAP_THRESHOLD, M_TRIM_THRESHOLD))

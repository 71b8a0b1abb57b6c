"""Seeds and devices."""

from __future__ import annotations

import random
from hashlib import sha256

from tasks.run.ranks import local_rank, processes


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
    """Set the CPU threads and return the torch device: `auto` is cuda where there is one, else cpu.

    One of several processes has the GPU of its number.

    Raises:
        ValueError: cuda is asked for and there is none.
    """
    import torch

    torch.set_num_threads(threads)
    if device == "cuda" and not torch.cuda.is_available():
        raise ValueError("machine.device is cuda, but torch sees no CUDA device")
    kind = "cuda" if device == "auto" and torch.cuda.is_available() else device.replace("auto", "cpu")
    if kind == "cpu" or processes() == 1:
        return torch.device(kind)
    if local_rank() >= torch.cuda.device_count():
        raise ValueError(
            f"machine.processes: process {local_rank()} has no GPU; torch sees {torch.cuda.device_count()}"
        )
    return torch.device(kind, local_rank())

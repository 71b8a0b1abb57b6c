"""Which of several processes this one is. All train; only the first writes outs, checkpoints and MLflow."""

from __future__ import annotations

import os

SHARDING = ("ACCELERATE_USE_FSDP", "ACCELERATE_USE_DEEPSPEED")  # as accelerate's launcher says it


def rank() -> int:
    """The number of this process; 0 where it is alone."""
    return int(os.environ.get("RANK") or 0)


def local_rank() -> int:
    """Its number on this machine, which is that of its GPU."""
    return int(os.environ.get("LOCAL_RANK") or 0)


def processes() -> int:
    """How many there are."""
    return int(os.environ.get("WORLD_SIZE") or 1)


def is_first() -> bool:
    """Whether it is the one that writes."""
    return rank() == 0


def are_sharded() -> bool:
    """Whether the launcher asked for FSDP or DeepSpeed: then no process holds whole weights."""
    return any(os.environ.get(name, "").lower() == "true" for name in SHARDING)


def share(key: str, count: int) -> int:
    """One process's share of a batch.

    Args:
        key: the parameter, for the message.
        count: of the batch, over all processes.

    Raises:
        ValueError: the processes do not divide it.
    """
    if count % processes():
        raise ValueError(f"{key} ({count}) is not a multiple of {processes()} processes")
    return count // processes()

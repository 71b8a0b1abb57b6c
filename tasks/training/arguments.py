"""What sft and reward tell transformers' Trainer, from plain values."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

from tasks.run import ranks

BETA2 = 0.95  # of the Adams; transformers' default is 0.999


def training_arguments(
    folder: Path,
    *,
    examples: int,
    batch: int,
    batch_key: str,
    epochs: float,
    microbatch_tokens: int,
    warmup_share: float,
    dtype: str,
    device: str,
    seed: int,
    checkpoint_steps: int,
    max_steps: int | None = None,
    **more: Any,
) -> dict[str, Any]:
    """Keyword arguments of a TrainingArguments.

    Args:
        folder: where checkpoints go.
        examples: training examples (packed rows, questions).
        batch: examples per optimizer step, over all processes.
        batch_key: the parameter that says so, for messages.
        epochs: passes over the examples.
        microbatch_tokens: most tokens in one forward; changes nothing but memory.
        warmup_share: share of the steps that warm the learning rate up.
        dtype: `float32` or `bfloat16`.
        device: `cpu` or `cuda`.
        seed: of the order of examples.
        checkpoint_steps: optimizer steps between two checkpoints.
        max_steps: most optimizer steps; None: the epochs decide.
        more: handed on as they are.

    Raises:
        ValueError: the processes do not divide the batch.
    """
    own = ranks.share(batch_key, batch)
    steps = max(1, math.ceil(examples / batch * epochs))
    steps = min(steps, max_steps or steps)
    return {
        "output_dir": str(folder),
        "max_steps": steps,
        "per_device_train_batch_size": own,
        "per_device_eval_batch_size": own,
        "microbatch_tokens": microbatch_tokens,
        "warmup_steps": round(warmup_share * steps),
        "lr_scheduler_type": "cosine",
        "bf16": dtype == "bfloat16",
        "use_cpu": device == "cpu",
        "seed": seed % 2**32,
        "logging_steps": max(1, steps // 100),
        "save_strategy": "no" if ranks.are_sharded() else "steps",  # see SafeCheckpoints
        "save_steps": checkpoint_steps,
        "disable_tqdm": True,
        "dataloader_pin_memory": False,
        **({} if more.get("optimizer") == "sgd" else {"adam_beta2": BETA2}),
        **more,
    }

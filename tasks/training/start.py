"""What a training says when it begins, and that it does begin: a batch's unit, the steps, none of them 0."""

from __future__ import annotations

import math
import sys
from typing import Any

from transformers.trainer_utils import IntervalStrategy

SHOWN_AS_A_WHOLE = 10  # steps: the default of logging_steps; a shorter run logs each


class Announced:
    """A mixin that stands before SafeCheckpoints; the trainer has `unit(count)`, what a batch counts."""

    def train(self, *args: Any, **keys: Any) -> Any:
        """As Trainer's.

        Raises:
            ValueError: there is nothing to train on, or no step was taken.
        """
        if self.train_dataset is None:
            raise ValueError("train: there is no train_dataset")
        found = super().train(*args, **keys)
        if not self.state.global_step:
            raise ValueError("train: no step was taken")
        return found

    def _start(self) -> None:
        super()._start()
        args, rows = self.args, len(self.train_dataset)
        size = self._train_batch_size * args.world_size
        batches = rows // size if args.dataloader_drop_last else math.ceil(rows / size)
        if not batches:
            raise ValueError(f"dataloader_drop_last: {self.unit(rows)} are fewer than a batch of {size}")
        steps, per_epoch = self.state.max_steps, math.ceil(batches / args.gradient_accumulation_steps)
        if steps < SHOWN_AS_A_WHOLE == args.logging_steps and args.logging_strategy == IntervalStrategy.STEPS:
            self.state.logging_steps = 1
        if self.is_world_process_zero():
            whole = min(rows, size * args.gradient_accumulation_steps)
            print(
                f"{type(self).__name__}: a batch is {whole} of {self.unit(rows)}; an epoch has {per_epoch} "
                f"steps, the training {steps}", file=sys.stderr,
            )  # fmt: skip

"""Evaluation: held-out rows are read as those of training, shared by the processes, measured as a whole."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Any

from tasks.training.rows import is_several


class HeldOut:
    """A mixin that stands before Trainer and beside InParts.

    The trainer has `read(dataset, name)`, which gives its records, and `measure(records, prefix)`, which
    gives metrics whose names begin so.
    """

    def read_held_out(self, dataset: Any) -> Any:
        """A dataset, or a dict of several by name, as records."""
        if is_several(dataset):
            return {name: self.read(rows, f"eval_dataset {name}") for name, rows in dataset.items()}
        return self.read(dataset, "eval_dataset")

    def evaluate(
        self, eval_dataset: Any = None, ignore_keys: Any = None, metric_key_prefix: str = "eval"
    ) -> dict[str, float]:
        """What `measure` says of the held-out rows; processes share the work, and all get the whole.

        Raises:
            ValueError: there is nothing held out, a row cannot be measured, or the metric that tells the best
                checkpoint is not finite: transformers would keep the first of these for the best.
        """
        rows = self.eval_dataset if eval_dataset is None else self.read_held_out(eval_dataset)
        if rows is None:
            raise ValueError("evaluate: there is no eval_dataset")
        several = rows if isinstance(rows, dict) else {"": rows}
        metrics: dict[str, float] = {}
        for name, some in several.items():
            metrics |= self.measure(some, f"{metric_key_prefix}_{name}" if name else metric_key_prefix)
        self._check_best(metrics)
        self.log(metrics)
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics

    def _check_best(self, metrics: dict[str, float]) -> None:
        best = self.args.metric_for_best_model or ""
        best = best if best.startswith("eval_") else f"eval_{best}"
        if not math.isfinite(value := metrics.get(best, 0.0)):
            raise ValueError(f"metric_for_best_model: {best} is {value} at step {self.state.global_step}")

    def held_out_parts(self, rows: Sequence[Any]) -> Iterator[tuple[dict[str, Any], bool]]:
        """Parts of this process's share of some rows, on the device, and whether they count.

        Sharded weights are gathered by all processes at once, so each runs equally many batches: one that has
        no row left runs the first again, which does not count.
        """
        own, size = rows[self.args.process_index :: self.args.world_size], self.args.eval_batch_size
        for first in range(0, -(-len(rows) // self.args.world_size), size):
            some = own[first : first + size]
            for part in self.data_collator(some or rows[:1])["parts"]:
                yield self._prepare_inputs(part), bool(some)

"""A batch in parts of so many tokens each, and the road through what accelerate wraps around a model."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from transformers import TrainingArguments

from tasks.run.ranks import are_sharded

Found = TypeVar("Found")


@dataclass(frozen=True, slots=True)
class Parts:
    """A collator: rows -> `{"parts": [collate(some rows), ...], "labels": [N]}`, the labels those of all.

    With at most 8 tokens a part, rows of 3, 4, 5 and 9 tokens are three parts: 3 + 4, 5, 9.
    """

    collate: Callable[[Sequence[Any]], dict[str, Any]]  # its `labels`: one for each item the loss averages
    tokens: Callable[[Any], int]  # of a row
    most: int  # tokens of a part; a longer row is a part of its own; 0: one part

    def __call__(self, rows: Sequence[Any]) -> dict[str, Any]:
        """One batch."""
        parts = [self.collate(some) for some in self._split(rows)]
        return {"parts": parts, "labels": torch.cat([part["labels"] for part in parts])}

    def _split(self, rows: Sequence[Any]) -> Iterator[list[Any]]:
        part, held = [], 0
        for row in rows:
            size = self.tokens(row)
            if part and self.most and held + size > self.most:
                yield part
                part, held = [], 0
            part.append(row)
            held += size
        yield part


def parts_or(given: Any, own: Parts) -> Parts:
    """The trainer's own collator, or one of its kind that was given as `data_collator`.

    Raises:
        ValueError: one of another kind, which would get packed rows and give no parts.
    """
    if given is None or isinstance(given, Parts):
        return given or own
    raise ValueError(
        f"data_collator: {type(given).__name__} makes padded rows, and rows are packed here; leave it out"
    )


@dataclass(frozen=True, slots=True)
class Share:
    """A collator: the rows of the whole batch -> those of one of several processes.

    A process that gets none, of a last batch with fewer rows than there are processes, runs the first row
    without counting it, because the others wait for it wherever gradients or weights are exchanged.
    """

    collate: Callable[[Sequence[Any]], dict[str, Any]]  # Parts
    rank: int
    processes: int

    def __call__(self, rows: Sequence[Any]) -> dict[str, Any]:
        """One process's share of one batch."""
        own = rows[self.rank :: self.processes]
        found = self.collate(own or rows[:1])
        return found if own else {"parts": found["parts"], "labels": found["labels"][:0]}


def part_tokens(args: TrainingArguments) -> int:
    """`args.microbatch_tokens`; 0 where weights are sharded: processes must run equally many forwards."""
    return 0 if args.fsdp or args.deepspeed or are_sharded() else args.microbatch_tokens


class InParts:
    """A mixin that stands before Trainer: each part of a batch has a forward and a backward of its own.

    Memory follows the largest part; the gradient is that of the whole batch, because `compute_loss(model,
    part, num_items_in_batch=…)` divides by the items of all parts, of all accumulated batches and processes.
    Processes share each batch that one process would have, also the short one at the end of an epoch.
    """

    _counts = True  # whether the rows at hand are this process's own

    def get_train_dataloader(self) -> Any:
        """As Trainer's; of several processes each reads the whole batch and keeps its :class:`Share`."""
        processes, own = self.args.world_size, self._train_batch_size
        if processes == 1:
            return super().get_train_dataloader()
        self._train_batch_size = own * processes
        try:
            loader = super().get_train_dataloader()
        finally:
            self._train_batch_size = own
        shards = loader.batch_sampler  # accelerate's, which would deal batches out and repeat some rows
        shards.num_processes, shards.process_index, shards.even_batches = 1, 0, False
        loader.collate_fn = Share(loader.collate_fn, self.args.process_index, processes)
        return loader

    def training_step(
        self, model: nn.Module, inputs: dict[str, Any], num_items_in_batch: Tensor | int | None = None
    ) -> Tensor:
        """Loss of the batch, detached; the parts' gradients are added up."""
        losses, self._counts = [], len(inputs["labels"]) > 0
        for part in inputs["parts"]:
            is_last = part is inputs["parts"][-1]  # data parallel processes exchange gradients once
            with nullcontext() if is_last else self.accelerator.no_sync(model):
                losses.append(super().training_step(model, part, num_items_in_batch))
        return torch.stack(losses).sum()

    def mean_over_batch(self, total: Tensor, own: int, items: Tensor | int | None) -> Tensor:
        """A part's sum over the items of the batch; over its `own` where Trainer counted none.

        Data parallel processes average their gradients, so each gives its sum times their number.
        """
        if items is None:
            return total / own
        processes = self.accelerator.num_processes if self.args.average_tokens_across_devices else 1
        return total / items * processes * self._counts

    def inside(self, wrapped: nn.Module, function: Callable[[nn.Module], Found]) -> Found:
        """`function(self.model)`, run as the forward of what accelerate wraps around the model.

        Data parallel wrappers prepare and reduce gradients in their own forward; a call past them would train
        each process by itself.
        """
        model = self.accelerator.unwrap_model(wrapped, keep_torch_compile=False)
        if wrapped is model:
            return function(model)
        before = vars(model).get("forward")  # accelerate puts one there for autocast

        def restore() -> None:
            vars(model).pop("forward", None) if before is None else vars(model).update(forward=before)

        def redirected() -> Found:
            restore()
            return function(model)

        vars(model)["forward"] = redirected
        try:
            return wrapped()
        finally:
            restore()

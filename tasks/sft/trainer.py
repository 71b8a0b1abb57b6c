"""SFTTrainer: supervised fine-tuning; the answers to one question share it in the forest."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial

import torch
from torch.nn import functional
from transformers import Trainer, TrainingArguments

from tasks.lm.forest import enable_forest, run_forest
from tasks.lm.optimizer import NamedOptimizer
from tasks.lm.precision import autocast
from tasks.run.parts import InParts, Parts
from tasks.run.trainer import SafeCheckpoints
from tasks.sft.records import PackedRow, collate


@dataclass
class SFTConfig(TrainingArguments):
    """`transformers.TrainingArguments`; a batch counts packed rows."""

    loss_on: str = field(
        default="all", metadata={"help": "all: every token; response: what follows the prompt"}
    )
    microbatch_tokens: int = field(
        default=0, metadata={"help": "most tokens of one forward; a longer row goes alone; 0: no bound"}
    )
    optimizer: str = field(default="adamw", metadata={"help": "adamw or muon (tasks.lm.optimizer)"})
    remove_unused_columns: bool = field(default=False, metadata={"help": "rows are records, not columns"})
    report_to: str | list[str] | None = field(default="none")


class SFTTrainer(InParts, NamedOptimizer, SafeCheckpoints, Trainer):
    """A light subclass of transformers.Trainer for packed rows.

    Args are Trainer's; `train_dataset` and `eval_dataset` are sequences of :class:`PackedRow`.
    """

    def __init__(self, model, args: SFTConfig, train_dataset: Sequence[PackedRow], **keys) -> None:
        enable_forest(model)
        parts = Parts(
            partial(collate, loss_on=args.loss_on), lambda row: len(row.tokens), args.microbatch_tokens
        )
        keys.setdefault("data_collator", parts)
        super().__init__(model=model, args=args, train_dataset=train_dataset, **keys)
        self.tokens_seen = 0
        self.model_accepts_loss_kwargs = True  # the loss below divides by the tokens of the whole batch
        self._loss_shifts_labels = False  # and ours are aligned already: every label counts

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        """A part's share of the mean negative log-likelihood per predicted token of the batch, nats."""
        logits, rows = self.inside(model, lambda model: self._logits(model, inputs))
        labels = inputs["labels"]
        logprobs = logits.float().log_softmax(-1).flatten().gather(0, rows * logits.shape[-1] + labels)
        loss = self.mean_over_batch(-logprobs, num_items_in_batch)
        self.tokens_seen += len(inputs["forest"].tokens)
        return (loss, {"logits": logits[rows]}) if return_outputs else loss

    def _logits(self, model, inputs) -> tuple[torch.Tensor, torch.Tensor]:
        """Logits [U, V] of the places that predict something, each once, and the row [N] of each prediction.

        The end of a shared prompt predicts one token of every answer. Taking its hidden state several times
        would add up its gradients by atomics, in another order each time: no two runs would be the same.
        """
        places, rows = inputs["predicts"].unique(return_inverse=True)
        with autocast(self.args.device, "bfloat16" if self.args.bf16 else "float32"):
            return run_forest(model, inputs["forest"], logits_to_keep=places).logits[0], rows

    @torch.no_grad()
    def evaluate(
        self, eval_dataset=None, ignore_keys=None, metric_key_prefix: str = "eval"
    ) -> dict[str, float]:
        """Loss (nats), perplexity and token accuracy per predicted token of the held-out documents."""
        self.model.eval()
        loss, right, tokens = 0.0, 0, 0
        for part in self.parts_of(self.get_eval_dataloader(eval_dataset)):
            logits, rows = self._logits(self.model, part)
            logits, labels = logits.float()[rows], part["labels"]
            loss += functional.cross_entropy(logits, labels, reduction="sum").item()
            right += (logits.argmax(-1) == labels).sum().item()
            tokens += len(labels)
        found = {
            "loss": loss / tokens,
            "perplexity": math.exp(loss / tokens),
            "token_accuracy": right / tokens,
        }
        metrics = {f"{metric_key_prefix}_{k}": v for k, v in found.items()}
        self.log(metrics)
        return metrics

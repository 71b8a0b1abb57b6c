"""Packed rows -> policy: supervised fine-tuning; the answers to one question share it in the forest."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import groupby

import torch
from pyarrow import parquet
from torch.nn import functional
from transformers import Trainer, TrainingArguments

from params.schema import Params
from tasks.lm.forest import Forest, Segment, enable_forest, plant, run_forest
from tasks.lm.loading import create_causal, fit_embeddings, load_causal, load_tokenizer, save_model
from tasks.lm.optimizer import NamedOptimizer
from tasks.lm.precision import autocast
from tasks.run.arguments import training_arguments
from tasks.run.curve import Curve, plot
from tasks.run.devices import derive_seed, seed_everything, use_device
from tasks.run.files import staged
from tasks.run.follow import follow
from tasks.run.layout import Layout, StageResult
from tasks.run.parts import InParts, Parts
from tasks.run.tracking import log_artifact
from tasks.run.trainer import SafeCheckpoints


@dataclass(frozen=True, slots=True)
class PackedRow:
    """Documents one after another.

    Miniature: `PackedRow((5, 6, 1, 7, 1), (3, 2), (2, 1))` holds two documents, of 3 and 2 tokens, whose
    prompts take the first 2 and the first 1.
    """

    tokens: tuple[int, ...]
    lengths: tuple[int, ...]  # tokens of each document
    prompts: tuple[int, ...]  # tokens of each document's prompt; 0: there is none

    def documents(self) -> list[tuple[int, ...]]:
        """The documents of the row."""
        ends = [sum(self.lengths[: i + 1]) for i in range(len(self.lengths))]
        return [self.tokens[e - n : e] for e, n in zip(ends, self.lengths, strict=True)]


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


def collate(rows: Sequence[PackedRow], loss_on: str = "all") -> dict[str, Forest | torch.Tensor]:
    """Rows -> one forest, the places that predict a wanted token of their own document, and those tokens.

    Neighbours with the same prompt share it: the prompt is a root, and what follows it in each document a
    child. The loss is that of the documents one by one; a shared token is computed once.

    Returns:
        forest; `predicts` [N] places in the row; `labels` [N] the tokens predicted there. The first token of
        a document is predicted by nothing; with `loss_on="response"` nor are those of a prompt.
    """
    segments: list[Segment] = []
    documents: list[
        tuple[list[int], int]
    ] = []  # the segments of a document, and how many tokens are not learnt
    for row in rows:
        for prompt, alike in groupby(zip(row.documents(), row.prompts, strict=True), lambda d: d[0][: d[1]]):
            texts = [text for text, _ in alike]
            root = []
            if len(texts) > 1 and 0 < len(prompt) < min(map(len, texts)):
                root = [len(segments)]
                segments.append(Segment(prompt))
            for text in texts:
                documents.append(
                    ([*root, len(segments)], max(1, len(prompt)) if loss_on == "response" else 1)
                )
                segments.append(Segment(text[len(prompt) :], root[0]) if root else Segment(text))
    forest = plant(segments)
    predicts, targets = [], []
    for chain, skipped in documents:
        places = torch.cat(
            [torch.arange(forest.starts[i], forest.starts[i] + forest.lengths[i]) for i in chain]
        )
        predicts.append(places[skipped - 1 : -1])
        targets.append(places[skipped:])
    return {"forest": forest, "predicts": torch.cat(predicts), "labels": forest.tokens[torch.cat(targets)]}


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


def read_rows(layout: Layout) -> tuple[list[PackedRow], list[PackedRow]]:
    """Training rows and validation rows; without validation documents the training rows serve for both."""
    table = parquet.read_table(layout.artifact("pack", "rows", "sft.parquet")).to_pylist()
    rows = {
        held: [
            PackedRow(*(tuple(r[k]) for k in ("tokens", "lengths", "prompts")))
            for r in table
            if r["is_validation"] is held
        ]
        for held in (False, True)
    }
    return rows[False], rows[True] or rows[False]


def run(params: Params, layout: Layout) -> StageResult:
    """The stage.

    Raises:
        ValueError: a base model without weights, no training row.
    """
    sft, machine = params.sft, params.machine
    device = use_device(machine.device, machine.threads)
    seed = derive_seed(params.seed, "sft", "train")
    seed_everything(seed)
    tokenizer = load_tokenizer(layout.artifact("pack", "tokenizer"))
    if params.model.base:
        model = load_causal(params.model.base, params.model.revision)
    else:
        model = create_causal(params.model.config.model_dump(exclude={"vocab_size"}), tokenizer)
    fit_embeddings(model, tokenizer)
    train, held = read_rows(layout)
    if not train:
        raise ValueError("sft: artifacts/pack/rows holds no training row")
    given = sft.model_dump(exclude={"batch_rows"})
    arguments = training_arguments(
        layout.scratch("sft"),
        examples=len(train),
        batch=sft.batch_rows,
        microbatch_tokens=machine.microbatch_tokens,
        device=device.type,
        seed=seed,
        checkpoint_steps=machine.checkpoint_steps,
        **given,
    )
    config = SFTConfig(**arguments)
    trainer = SFTTrainer(model, config, train, eval_dataset=held, processing_class=tokenizer)
    follow(trainer, "sft")
    trainer.train(resume_from_checkpoint=trainer.latest_checkpoint())
    metrics = trainer.evaluate()
    with staged(layout.artifact("sft", "model")) as folder:
        save_model(model, tokenizer, folder)
    curve = Curve.of_log(trainer.state.log_history, ("loss", "learning_rate", "grad_norm"))
    curve.write(layout.artifact("sft", "curve.csv"))
    log_artifact(plot(layout.home / "reports/sft/loss.png", curve, ["loss"], "SFT loss, nats per token"))
    parameters = sum(p.numel() for p in model.parameters())
    return StageResult(
        {
            "steps": config.max_steps,
            "parameters": parameters,
            **{k.removeprefix("eval_"): v for k, v in metrics.items()},
        }
    )

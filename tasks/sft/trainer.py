"""SFTTrainer: supervised fine-tuning; the answers to one question share it in the forest."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import torch
from transformers import Trainer, TrainingArguments, set_seed

from tasks.lm.adapters import add_adapter, merge_checked
from tasks.lm.forest import enable_forest, run_forest
from tasks.lm.freezing import freeze_layers
from tasks.lm.heads import Predictions, predict
from tasks.lm.loading import fit_embeddings, load_causal, load_tokenizer
from tasks.lm.optimizer import NamedOptimizer
from tasks.lm.precision import autocast
from tasks.lm.scoring import positions_of
from tasks.run.parts import InParts, Parts, part_tokens
from tasks.run.trainer import SafeCheckpoints
from tasks.sft.documents import Reader
from tasks.sft.records import PackedRow, collate

Dataset = Collection[PackedRow | Mapping]  # a list, or a datasets.Dataset
PROBES = 8  # documents on which a merge is checked


@dataclass
class SFTConfig(TrainingArguments):
    """`transformers.TrainingArguments`; a batch counts packed rows, and so tokens."""

    loss_on: str = field(
        default="all", metadata={"help": "all: every token; response: what follows the prompt"}
    )
    assistant_only: bool = field(
        default=False,
        metadata={"help": "of conversations, learn what the chat template marks by {% generation %}"},
    )
    row_tokens: int = field(
        default=2048, metadata={"help": "tokens of a packed row; a longer document is a row of its own"}
    )
    max_length: int | None = field(
        default=None, metadata={"help": "tokens of a document; longer ones are cut, and end without eos"}
    )
    num_layers_unfrozen: int | None = field(
        default=None, metadata={"help": "blocks that are trained, from the last; None: the whole model"}
    )
    microbatch_tokens: int = field(
        default=2048, metadata={"help": "most tokens of one forward; a longer row goes alone; 0: no bound"}
    )
    optimizer: str = field(default="adamw", metadata={"help": "adamw or muon (tasks.lm.optimizer)"})
    remove_unused_columns: bool = field(default=False, metadata={"help": "rows are records, not columns"})
    report_to: str | list[str] | None = field(default="none")

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.loss_on not in ("all", "response"):
            raise ValueError(f"loss_on is all or response, not {self.loss_on!r}")


class SFTTrainer(InParts, NamedOptimizer, SafeCheckpoints, Trainer):
    """A light subclass of transformers.Trainer: documents packed without padding, a shared prompt read once.

    Five lines tune a model, or an adapter, on a dataset of one's own:

        from tasks.sft import SFTConfig, SFTTrainer
        rows = [{"prompt": "2 + 2 =", "completion": " 4"}, {"prompt": "3 + 4 =", "completion": " 7"}]
        trainer = SFTTrainer("path/to/model", SFTConfig("tuned", loss_on="response"), rows)
        trainer.train()
        trainer.save_model()

    Args:
        model: a causal language model, or its folder or Hub id.
        args: an SFTConfig.
        train_dataset: :class:`PackedRow`, or rows as :func:`tasks.sft.documents.read_document` takes them.
        eval_dataset: likewise.
        processing_class: the tokenizer; the one beside the model where the model is a name.
        peft_config: of an adapter. :meth:`merged` ends it.
        keys: Trainer's.

    Raises:
        ValueError: a model that the forest cannot serve; a row that cannot teach, by its number.
    """

    def __init__(
        self,
        model,
        args: SFTConfig,
        train_dataset: Dataset,
        eval_dataset: Dataset | None = None,
        processing_class=None,
        peft_config=None,
        **keys,
    ) -> None:
        if isinstance(model, str | Path):
            set_seed(args.seed)  # of embeddings that grow
            processing_class = processing_class or load_tokenizer(model)
            model = load_causal(model)
            fit_embeddings(model, processing_class)
        if peft_config is not None:
            model = add_adapter(model, config=peft_config)
        freeze_layers(model, args.num_layers_unfrozen)
        enable_forest(model)
        self.read = Reader(
            tokenizer=processing_class,
            vocabulary=model.get_input_embeddings().num_embeddings,
            row_tokens=args.row_tokens,
            loss_on=args.loss_on,
            positions=positions_of(model),
            max_length=args.max_length,
            assistant_only=args.assistant_only,
        )
        parts = Parts(
            partial(collate, loss_on=args.loss_on), lambda row: len(row.tokens), part_tokens(args)
        )
        super().__init__(
            model=model,
            args=args,
            data_collator=keys.pop("data_collator", parts),
            train_dataset=self.read(train_dataset, "train_dataset"),
            eval_dataset=None if eval_dataset is None else self.read(eval_dataset, "eval_dataset"),
            processing_class=processing_class,
            **keys,
        )
        self.tokens_seen = 0
        self.model_accepts_loss_kwargs = True  # the loss below divides by the tokens of the whole batch
        self._loss_shifts_labels = False  # and ours are aligned already: every label counts

    def merged(self):
        """The plain model, its adapter merged in; checked on documents of the training data.

        Raises:
            ValueError: it does not say what the adapter says (:func:`tasks.lm.adapters.merge_checked`).
        """
        documents = [document for row in self.train_dataset[:PROBES] for document in row.documents()]
        return merge_checked(self.accelerator.unwrap_model(self.model), documents[:PROBES])

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        """A part's share of the mean negative log-likelihood per predicted token of the batch, nats."""
        labels = inputs["labels"]

        def summed_nll(model) -> torch.Tensor:
            with self._precision():
                return self._predict(model, inputs).summed_nll(labels)

        nll = self.inside(model, summed_nll)
        if num_items_in_batch is None:
            loss = nll / len(labels)
        else:
            loss = self.mean_over_batch(nll, num_items_in_batch)
        self.tokens_seen += len(inputs["forest"].tokens)
        return (loss, {}) if return_outputs else loss

    def _predict(self, model, inputs) -> Predictions:
        return predict(model, lambda model: run_forest(model, inputs["forest"]), inputs["predicts"])

    def _precision(self) -> AbstractContextManager:
        return autocast(self.args.device, "bfloat16" if self.args.bf16 else "float32")

    @torch.no_grad()
    def evaluate(
        self, eval_dataset: Dataset | None = None, ignore_keys=None, metric_key_prefix: str = "eval"
    ) -> dict[str, float]:
        """Loss (nats), perplexity and token accuracy per predicted token of the held-out documents.

        Processes share the work, and all get the whole.

        Raises:
            ValueError: there is nothing held out.
        """
        rows = self.eval_dataset if eval_dataset is None else self.read(eval_dataset, "eval_dataset")
        if rows is None:
            raise ValueError("evaluate: there is no eval_dataset")
        self.model.eval()
        sums = torch.zeros(3, dtype=torch.float64)  # -log p, right, tokens
        for part, counts in self.held_out_parts(rows):
            labels = part["labels"]
            with self._precision():
                said = self._predict(self.model, part).read(labels, best=True)
            found = -said.logprobs.sum().item(), (said.best == labels).sum().item(), len(labels)
            sums += counts * torch.tensor(found)
        nll, right, tokens = self.accelerator.reduce(sums.to(self.args.device), "sum").tolist()
        found = {
            "loss": nll / tokens,
            "perplexity": math.exp(nll / tokens),
            "token_accuracy": right / tokens,
        }
        metrics = {f"{metric_key_prefix}_{k}": v for k, v in found.items()}
        self.log(metrics)
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics

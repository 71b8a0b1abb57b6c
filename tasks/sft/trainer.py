"""SFTTrainer: supervised fine-tuning; the answers to one question share it in the forest."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager
from functools import partial
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import gather_object
from torch import Tensor
from transformers import EvalPrediction, Trainer, TrainingArguments, set_seed
from transformers.trainer_utils import PredictionOutput

from tasks.lm.adapters.lora import add_adapter, merge_checked, merge_onto
from tasks.lm.attention.forest import has_forest, run_forest
from tasks.lm.attention.padding import pad_forest
from tasks.lm.logprobs.lm_head import Predictions, check_causal, predict
from tasks.lm.logprobs.roads import take_road
from tasks.lm.model.context import room_of
from tasks.lm.model.ends import fit_special_tokens, save_tokenizer
from tasks.lm.model.freezing import freeze_layers
from tasks.lm.model.kinds import unwrapped
from tasks.lm.model.loading import fit_embeddings, load_causal, load_tokenizer
from tasks.lm.numerics.precision import autocast
from tasks.run.finite import check_weights
from tasks.sft.config import SFTConfig
from tasks.sft.documents import Reader
from tasks.sft.records import PackedRow, collate
from tasks.training.checkpoints import SafeCheckpoints
from tasks.training.evaluation import HeldOut
from tasks.training.finite import FiniteTraining
from tasks.training.microbatches import InParts, Parts, part_tokens, parts_or
from tasks.training.optimizer import NamedOptimizer, refuse_two_optimizers
from tasks.training.start import Announced
from tasks.training.supported import check_hooks, check_model, check_trained, configured, take_tokenizer

Dataset = Iterable[PackedRow | Mapping] | Mapping[str, Any]  # rows, or columns
PROBES = 8  # documents on which a merge is checked
MOST_NATS = 709.0  # whose exponential is still a number
_log = logging.getLogger(__name__)


class SFTTrainer(FiniteTraining, InParts, HeldOut, NamedOptimizer, Announced, SafeCheckpoints, Trainer):
    """A light subclass of transformers.Trainer: documents packed without padding, a shared prompt read once.

    Five lines tune a model, or an adapter, on a dataset of one's own:

        from tasks.sft import SFTConfig, SFTTrainer
        rows = [{"prompt": "2 + 2 =", "completion": " 4"}, {"prompt": "3 + 4 =", "completion": " 7"}]
        trainer = SFTTrainer("path/to/model", SFTConfig("tuned", loss_on="response"), rows)
        trainer.train()
        trainer.save_model()

    Args:
        model: a causal language model, or its folder or Hub id.
        args: an SFTConfig; None: its defaults.
        train_dataset: :class:`PackedRow`, or rows as :func:`tasks.sft.documents.read_document` takes them, in
            whatever :func:`tasks.training.rows.rows_of` reads; None: it will not be trained.
        eval_dataset: likewise, or a dict of such.
        processing_class: the tokenizer; the one beside the model where the model is a name.
        peft_config: of an adapter; a dict too. :meth:`merged` ends it.
        formatting_func: a row -> its text, in the stead of the row's form.
        keys: Trainer's, and `tokenizer`; what each does stands in docs/trainers.md.

    Raises:
        ValueError: a model that no road serves (:func:`tasks.lm.logprobs.roads.take_road`); a weight that is
            not finite; a row that cannot teach, by its number; several GPUs in one process; a setting that
            nothing follows. In training, a loss or gradient that is not finite, or no step at all.
        TypeError: an argument that is none.
    """

    def __init__(
        self,
        model=None,
        args: TrainingArguments | None = None,
        train_dataset: Dataset | None = None,
        eval_dataset: Dataset | dict[str, Dataset] | None = None,
        processing_class=None,
        peft_config=None,
        formatting_func: Callable[[Any], str] | None = None,
        **keys,
    ) -> None:
        processing_class = take_tokenizer(keys, processing_class)
        collator = keys.pop("data_collator", None)
        check_hooks("SFTTrainer", SFTConfig, keys)
        args = configured(args, SFTConfig)
        refuse_two_optimizers(args, keys)
        check_model("SFTTrainer", model)
        if isinstance(model, str | Path):
            set_seed(args.seed)  # of embeddings that grow
            processing_class = processing_class or load_tokenizer(model)
            model = load_causal(model)
            fit_embeddings(model, processing_class)
        check_causal(model)
        check_weights("model", model)
        if processing_class is not None:
            fit_special_tokens(unwrapped(model), processing_class)
        if peft_config is not None:
            model = add_adapter(model, config=peft_config)
        freeze_layers(model, args.num_layers_unfrozen)
        take_road(model, learns=True)
        _warn_of_halves(model)
        self.read = Reader(
            tokenizer=processing_class,
            vocabulary=len(model.get_input_embeddings().weight),
            row_tokens=args.row_tokens,
            loss_on=args.loss_on,
            positions=room_of(model),
            max_length=args.max_length,
            assistant_only=args.assistant_only,
            drops=args.invalid_rows == "drop",
            formatting=formatting_func,
        )
        parts = Parts(
            partial(collate, loss_on=args.loss_on), lambda row: len(row.tokens), part_tokens(args)
        )
        super().__init__(
            model=model,
            args=args,
            data_collator=parts_or(collator, parts),
            train_dataset=None if train_dataset is None else self.read(train_dataset, "train_dataset"),
            eval_dataset=None if eval_dataset is None else self.read_held_out(eval_dataset),
            processing_class=processing_class,
            **keys,
        )
        if args.n_gpu > 1:
            raise ValueError(f"{args.n_gpu} GPUs in one process: start one process for each (torchrun)")
        self.tokens_seen = 0
        self.model_accepts_loss_kwargs = True  # the loss below divides by the tokens of the whole batch
        self._loss_shifts_labels = False  # and ours are aligned already: every label counts

    def unit(self, count: int) -> str:
        """So many packed rows, in words."""
        documents = sum(len(row.lengths) for row in self.train_dataset)
        rows = f"{count} packed rows (of {self.args.row_tokens} tokens or one longer document"
        return f"{rows}; {documents} documents in {len(self.train_dataset)} rows)"

    def save_tokenizer(self, tokenizer, folder: Path) -> None:
        """Beside the model, as a language model's."""
        save_tokenizer(tokenizer, folder)

    def merged(self, onto=None):
        """The plain model, its adapter merged in; checked on documents of the training data.

        As :meth:`whole`, None on the other ranks where weights are sharded.

        Args:
            onto: the base in full precision, where the model's own is quantised.

        Raises:
            ValueError: it does not say what the adapter says (:func:`tasks.lm.adapters.merge_checked`).
        """
        check_trained("merged", self.train_dataset)
        documents = [document for row in self.train_dataset[:PROBES] for document in row.documents()]
        whole = self.whole()
        if whole is None:
            return None
        if onto is not None:
            return merge_onto(onto, whole, documents[:PROBES])
        return merge_checked(whole, documents[:PROBES])

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        """A part's share of the mean negative log-likelihood per predicted token of the batch, nats."""
        labels = inputs["labels"]

        def summed_nll(model) -> Tensor:
            with self._precision():
                return self._predict(model, inputs).summed_nll(labels)

        loss = self.mean_over_batch(self.inside(model, summed_nll), len(labels), num_items_in_batch)
        self.tokens_seen += len(inputs["forest"].tokens)
        return (loss, {}) if return_outputs else loss

    def _predict(self, model, inputs) -> Predictions:
        forest, places = inputs["forest"], inputs["predicts"]
        if has_forest(unwrapped(model)):
            return predict(model, lambda model: run_forest(model, forest), places)
        tokens, where = pad_forest(forest)
        return predict(model, lambda model: model(tokens, use_cache=False), where[places])

    def _precision(self) -> AbstractContextManager:
        return autocast(self.args.device, "bfloat16" if self.args.bf16 else "float32")

    def measure(self, rows: Sequence[PackedRow], prefix: str) -> dict[str, float]:
        """Loss (nats), perplexity and token accuracy per predicted token of held-out documents.

        `compute_metrics` gets the most probable token in the stead of each predicted one, [N], and these.
        """
        return self._predicted(rows, prefix).metrics

    def predict(
        self, test_dataset: Dataset, ignore_keys=None, metric_key_prefix: str = "test"
    ) -> PredictionOutput:
        """The most probable token in the stead of each predicted one, these, and what `measure` says."""
        found = self._predicted(self.read(test_dataset, "test_dataset"), metric_key_prefix)
        self.control = self.callback_handler.on_predict(self.args, self.state, self.control, found.metrics)
        return found

    @torch.no_grad()
    def _predicted(self, rows: Sequence[PackedRow], prefix: str) -> PredictionOutput:
        self.model.eval()
        found = []
        for part, counts in self.held_out_parts(rows):
            with self._precision():
                said = self._predict(self.model, part).read(part["labels"], best=True)
            if counts:
                found.append([said.logprobs.cpu(), said.best.cpu(), part["labels"].cpu()])
        logprobs, best, labels = (torch.cat(each) for each in zip(*gather_object(found), strict=True))
        loss, accuracy = -logprobs.double().mean().item(), (best == labels).double().mean().item()
        perplexity = math.exp(loss) if loss < MOST_NATS else math.inf
        metrics = {"loss": loss, "perplexity": perplexity, "token_accuracy": accuracy}
        self.check_measured({f"{prefix}_{name}": value for name, value in metrics.items()})
        if self.compute_metrics is not None:
            metrics |= self.compute_metrics(EvalPrediction(best.numpy(), labels.numpy()))
        metrics = {f"{prefix}_{name}": value for name, value in metrics.items()}
        return PredictionOutput(best.numpy(), labels.numpy(), metrics)


def _warn_of_halves(model) -> None:
    halves = {str(p.dtype) for p in model.parameters() if p.requires_grad and p.element_size() < 4}
    if halves:
        _log.warning(
            "%s trains weights in %s, which round small updates away; load it with dtype=torch.float32 and "
            "set bf16", type(unwrapped(model)).__name__, ", ".join(sorted(halves)),
        )  # fmt: skip

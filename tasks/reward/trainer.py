"""RewardTrainer: a question once, its answers as children, every pair with different scores in the loss."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import gather_object
from torch import Tensor
from transformers import EvalPrediction, Trainer, TrainingArguments, set_seed
from transformers.trainer_utils import PredictionOutput

from tasks.lm.adapters.lora import add_adapter, merge_checked, merge_onto
from tasks.lm.heads.scores import check_scorer, forest_scores, take_scoring_road
from tasks.lm.model.context import room_of
from tasks.lm.model.dropout import disable_dropout
from tasks.lm.model.freezing import freeze_layers
from tasks.lm.model.kinds import is_encoder
from tasks.lm.model.loading import load_reward, load_tokenizer
from tasks.lm.numerics.precision import autocast
from tasks.reward.config import RewardConfig
from tasks.reward.fitting import (
    ends_to_leave_out,
    fit_special_tokens,
    length_rule_of,
    weighted_by_gap,
)
from tasks.reward.losses import expected_loss, pair_loss
from tasks.reward.records import GroupedAnswers, collate
from tasks.reward.rows import Reader
from tasks.run.finite import check_weights
from tasks.training.checkpoints import SafeCheckpoints
from tasks.training.evaluation import HeldOut
from tasks.training.finite import FiniteTraining
from tasks.training.microbatches import InParts, Parts, part_tokens, parts_or
from tasks.training.optimizer import NamedOptimizer, refuse_two_optimizers
from tasks.training.start import Announced
from tasks.training.supported import check_hooks, check_model, check_trained, configured, take_tokenizer

Dataset = Iterable[GroupedAnswers | Mapping] | Mapping[str, Any]  # rows, or columns
PROBES = 8  # groups on which a merge is checked


class RewardTrainer(FiniteTraining, InParts, HeldOut, NamedOptimizer, Announced, SafeCheckpoints, Trainer):
    """A light subclass of transformers.Trainer over a sequence-classification model with one label.

    Args:
        model: the model, or its folder or Hub id; a causal model gets a fresh score head. Encoders serve too.
        args: a RewardConfig; None: its defaults.
        train_dataset: :class:`GroupedAnswers`, or rows as :func:`tasks.reward.rows.read_row` takes them, in
            whatever :func:`tasks.training.rows.rows_of` reads; None: it will not be trained.
        eval_dataset: likewise, or a dict of such.
        processing_class: the tokenizer; it gets a pad token that is not eos, and the model is fitted to it.
        peft_config: of an adapter, a dict too; the score head is trained in full beside it. :meth:`merged`
            ends it.
        keys: Trainer's, and `tokenizer`; what each does stands in docs/trainers.md.

    Raises:
        ValueError: a model that gives no score, has a weight that is not finite, or has no pad id apart from
            eos (plain transformers would read its score elsewhere); a row that cannot teach, by its name. In
            training, a loss (names its rows) or gradient that is not finite, or no step at all.
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
        **keys,
    ) -> None:
        processing_class = take_tokenizer(keys, processing_class)
        collator = keys.pop("data_collator", None)
        check_hooks("RewardTrainer", RewardConfig, keys)
        args = configured(args, RewardConfig)
        refuse_two_optimizers(args, keys)
        check_model("RewardTrainer", model)
        if isinstance(model, str | Path):
            set_seed(args.seed)  # of a fresh score head
            processing_class = processing_class or load_tokenizer(model, key="model", needs_eos=False)
            model = load_reward(model, key="model")
        check_scorer(model)
        check_weights("model", model)
        fit_special_tokens(model, processing_class)
        if peft_config is not None:
            model = add_adapter(model, config=peft_config)
        freeze_layers(model, args.num_layers_unfrozen)
        if args.disable_dropout:
            disable_dropout(model)
        take_scoring_road(model, learns=True)
        is_causal = not is_encoder(model)
        self.read = Reader(
            tokenizer=processing_class,
            vocabulary=len(model.get_input_embeddings().weight),
            positions=room_of(model),
            is_causal=is_causal,
            max_length=args.max_length,
            uses_gaps=bool(args.margin or args.gap_weight),
            drops=args.invalid_rows == "drop",
        )
        train = None if train_dataset is None else self._read_training(train_dataset, args.gap_weight)
        has_rule = bool(train and args.length_offset)
        self.length_coefficient = args.length_offset * length_rule_of(train) if has_rule else 0.0
        if eval_dataset is not None:
            eval_dataset = self.read_held_out(eval_dataset)
        ends = ends_to_leave_out(model, processing_class, train, args.without_eos_share)
        parts = Parts(
            partial(collate, weigh=args.weigh, is_causal=is_causal, ends=ends),
            partial(GroupedAnswers.tokens, is_causal=is_causal),
            part_tokens(args),
        )
        super().__init__(
            model=model,
            args=args,
            data_collator=parts_or(collator, parts),
            train_dataset=train,
            eval_dataset=eval_dataset,
            processing_class=processing_class,
            **keys,
        )
        self.tokens_seen = 0
        self.model_accepts_loss_kwargs = True  # the loss below divides by the items of the whole batch

    def _read_training(self, dataset: Dataset, gap_power: float) -> list[GroupedAnswers]:
        groups = self.read(dataset, "train_dataset")
        lacking = next((group.name for group in groups if not group.gaps), None)
        if self.read.uses_gaps and lacking:
            raise ValueError(f"train_dataset, {lacking}: margin and gap_weight need the gap of every pair")
        return weighted_by_gap(groups, gap_power) if gap_power else groups

    def unit(self, count: int) -> str:
        """So many questions, in words."""
        pairs = sum(len(group.pairs) for group in self.train_dataset)
        return f"{count} questions or rows ({pairs} pairs in {len(self.train_dataset)})"

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        """A part's share of the batch's mean loss, nats.

        Raises:
            ValueError: the loss of a pair is not finite; the message names its row.
        """
        args = self.args
        readings = self.inside(model, lambda model: self._readings(model, inputs))
        _, better, worse = readings[0]
        ahead = self.length_coefficient * inputs["longer"] - args.margin * inputs["gaps"] + inputs["odds"]
        centering = args.center_rewards_coefficient or 0.0
        losses = inputs["weights"] * expected_loss(readings, ahead, args.label_smoothing, centering)
        if rows := _not_finite(losses, inputs["names"]):
            raise self.diverged(f"the loss of {rows} is not finite")
        loss = self.mean_over_batch(losses.sum(), len(inputs["labels"]), num_items_in_batch)
        if self.model.training and self._counts:
            self._note(better.detach().float() - worse.detach().float())
        self.tokens_seen += len(inputs["forest"].tokens)
        return (loss, {"margins": better - worse}) if return_outputs else loss

    def _note(self, margins: Tensor) -> None:
        """Of the pairs since the last line of the log: how many are right, the sum of leads, their number."""
        found = torch.stack([(margins > 0).sum(), margins.sum(), margins.new_tensor(len(margins))])
        self.unlogged = found if self.unlogged is None else self.unlogged.to(found) + found

    def log(self, logs: dict[str, float], *args: Any, **keys: Any) -> None:
        """As Trainer's; beside the loss the share of training pairs in order, and by how much they lead."""
        if "loss" in logs:  # of all processes, also of one that had no pair
            own = torch.zeros(3) if self.unlogged is None else self.unlogged
            right, lead, count = self.accelerator.reduce(own.to(self.args.device)).tolist()
            logs |= {"accuracy": right / count, "margin": lead / count} if count else {}
            self.unlogged = None
        super().log(logs, *args, **keys)

    def scores(self, model, inputs, but_last: Sequence[int] = ()) -> Tensor:
        """Scores of all answers of a part, and of C of them without their last tokens, [A + C]."""
        with autocast(self.args.device, "bfloat16" if self.args.bf16 else "float32"):
            return forest_scores(model, inputs["forest"], inputs["answers"], but_last)

    def _readings(self, model, inputs) -> list[tuple[float, Tensor, Tensor]]:
        """How answers are read, first as they stand: a way's chance, its better scores [P] and its worse."""
        share, pairs, count = self.args.without_eos_share, inputs["pairs"], len(inputs["answers"])
        if not share:
            return [(1.0, *pair_scores(self.scores(model, inputs), pairs))]
        found = self.scores(model, inputs, inputs["ended"])
        ended = torch.tensor(inputs["ended"], dtype=torch.long, device=found.device)
        cut = found[:count].index_copy(0, ended, found[count:])  # what has no eos is read as it stands
        return [(1 - share, *pair_scores(found[:count], pairs)), (share, *pair_scores(cut, pairs))]

    def measure(self, groups: Sequence[GroupedAnswers], prefix: str) -> dict[str, float]:
        """Plain pairwise loss (nats; no weight, margin or other option) and accuracy over held-out pairs.

        A tie is wrong. Mean and deviation of the scores.

        Raises:
            ValueError: a score is not finite, with its row.
        """
        return self._scored(groups, prefix).metrics

    def predict(
        self, test_dataset: Dataset, ignore_keys=None, metric_key_prefix: str = "test"
    ) -> PredictionOutput:
        """Scores of the better and the worse answer of each pair, [P, 2]; labels, the better's index 0, [P].

        With them what `measure` says. A row of one answer and a label has the score 0 for the other side.
        """
        found = self._scored(self.read(test_dataset, "test_dataset"), metric_key_prefix)
        self.control = self.callback_handler.on_predict(self.args, self.state, self.control, found.metrics)
        return found

    @torch.no_grad()
    def _scored(self, groups: Sequence[GroupedAnswers], prefix: str) -> PredictionOutput:
        self.model.eval()
        pairs, scores = [], []
        for part, counts in self.held_out_parts(groups):
            found = self.scores(self.model, part)
            compared = torch.stack(pair_scores(found, part["pairs"]), 1)
            if rows := _not_finite(compared.sum(1), part["names"]):
                raise ValueError(f"the score of {rows} is not finite")
            if counts:
                pairs += compared.tolist()
                scores += found.tolist()
        pair, score = (torch.tensor(gather_object(values)) for values in (pairs, scores))
        better, worse = pair.unbind(1)
        found = {
            "loss": pair_loss(better, worse).mean().item(),
            "accuracy": (better > worse).float().mean().item(),
            "score_mean": score.mean().item(),
            "score_std": score.std(correction=0).item(),
        }
        self.check_measured({f"{prefix}_{name}": value for name, value in found.items()})
        labels = torch.zeros(len(pair)).numpy()
        if self.compute_metrics is not None:
            found |= self.compute_metrics(EvalPrediction(pair.numpy(), labels))
        return PredictionOutput(pair.numpy(), labels, {f"{prefix}_{k}": v for k, v in found.items()})

    def merged(self, onto=None):
        """The plain model, its adapter merged in; checked on documents of the training data.

        As :meth:`whole`, None on the other ranks where weights are sharded.

        Args:
            onto: the base in full precision, where the model's own is quantised.

        Raises:
            ValueError: it does not score as the adapter does (:func:`tasks.lm.adapters.merge_checked`).
        """
        check_trained("merged", self.train_dataset)
        documents = [(*group.prompt, *r) for group in self.train_dataset[:PROBES] for r in group.responses]
        whole = self.whole()
        if whole is None:
            return None
        return merge_checked(whole, documents) if onto is None else merge_onto(onto, whole, documents)


def pair_scores(scores: Tensor, pairs: Tensor) -> tuple[Tensor, Tensor]:
    """Scores of the better and of the worse of each pair. [A], [P, 2] -> [P], [P]; index −1 scores 0."""
    return torch.cat([scores, scores.new_zeros(1)])[pairs].unbind(1)


def _not_finite(values: Tensor, names: Sequence[str]) -> str:
    """The names of the rows whose value is not finite, a few of them; empty: all values are."""
    is_bad = ~values.detach().isfinite()
    if not is_bad.any():
        return ""
    return ", ".join(sorted({name for name, bad in zip(names, is_bad.tolist(), strict=True) if bad})[:5])

"""RewardTrainer: a question once, its answers as children, every pair with different scores in the loss."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch
from accelerate.utils import gather_object
from torch import Tensor
from transformers import EvalPrediction, Trainer, set_seed

from tasks.lm.adapters import add_adapter, merge_checked, merge_onto
from tasks.lm.dropout import disable_dropout
from tasks.lm.forest import unwrapped
from tasks.lm.freezing import freeze_layers
from tasks.lm.loading import fit_embeddings, give_pad, load_reward, load_tokenizer
from tasks.lm.optimizer import NamedOptimizer
from tasks.lm.precision import autocast
from tasks.lm.scoring import check_scorer, forest_scores, is_encoder, room_of, take_scoring_road
from tasks.reward.config import RewardConfig
from tasks.reward.losses import gap_weights, length_rule, pair_loss
from tasks.reward.records import GroupedAnswers, collate
from tasks.reward.rows import Reader
from tasks.run.held_out import HeldOut
from tasks.run.parts import InParts, Parts, part_tokens, parts_or
from tasks.run.trainer import SafeCheckpoints

Dataset = Collection[GroupedAnswers | Mapping]  # a list, or a datasets.Dataset
PROBES = 8  # groups on which a merge is checked


class RewardTrainer(InParts, HeldOut, NamedOptimizer, SafeCheckpoints, Trainer):
    """A light subclass of transformers.Trainer over a sequence-classification model with one label.

    Args:
        model: the model, or its folder or Hub id; a causal model gets a fresh score head. Encoders serve too.
        args: a RewardConfig.
        train_dataset: :class:`GroupedAnswers`, or rows as :func:`tasks.reward.rows.read_row` takes them.
        eval_dataset: likewise, or a dict of such.
        processing_class: the tokenizer; it gets a pad token that is not eos, and the model is fitted to it.
        peft_config: of an adapter; the score head is trained in full beside it. :meth:`merged` ends it.
        keys: Trainer's.

    Raises:
        ValueError: a model that gives no score, or has no pad id apart from eos (plain transformers would
            read its score elsewhere); a row that cannot teach, by its name.
    """

    def __init__(
        self,
        model,
        args: RewardConfig,
        train_dataset: Dataset,
        eval_dataset: Dataset | dict[str, Dataset] | None = None,
        processing_class=None,
        peft_config=None,
        **keys,
    ) -> None:
        if isinstance(model, str | Path):
            set_seed(args.seed)  # of a fresh score head
            processing_class = processing_class or load_tokenizer(model, key="model", needs_eos=False)
            model = load_reward(model, key="model")
        check_scorer(model)
        _fit_special_tokens(model, processing_class)
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
        train = self._read_training(train_dataset, args.gap_weight)
        self.length_coefficient = args.length_offset * _length_rule(train) if args.length_offset else 0.0
        if eval_dataset is not None:
            eval_dataset = self.read_held_out(eval_dataset)
        parts = Parts(
            partial(collate, weigh=args.weigh, is_causal=is_causal),
            partial(GroupedAnswers.tokens, is_causal=is_causal),
            part_tokens(args),
        )
        super().__init__(
            model=model,
            args=args,
            data_collator=parts_or(keys.pop("data_collator", None), parts),
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
        return _weighted_by_gap(groups, gap_power) if gap_power else groups

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        """A part's share of the batch's mean loss, nats.

        Raises:
            ValueError: the loss of a pair is not finite; the message names its row.
        """
        args = self.args
        scores = self.inside(model, lambda model: self.scores(model, inputs))
        better, worse = pair_scores(scores, inputs["pairs"])
        ahead = self.length_coefficient * inputs["longer"] - args.margin * inputs["gaps"]
        centering = args.center_rewards_coefficient or 0.0
        losses = inputs["weights"] * pair_loss(better, worse, ahead, args.label_smoothing, centering)
        _refuse_not_finite(losses, inputs["names"], f"step {self.state.global_step}: the loss")
        loss = self.mean_over_batch(losses.sum(), len(inputs["labels"]), num_items_in_batch)
        self.tokens_seen += len(inputs["forest"].tokens)
        return (loss, {"margins": better - worse}) if return_outputs else loss

    def scores(self, model, inputs) -> Tensor:
        """Scores of all answers of a part, [A]."""
        with autocast(self.args.device, "bfloat16" if self.args.bf16 else "float32"):
            return forest_scores(model, inputs["forest"], inputs["answers"])

    @torch.no_grad()
    def measure(self, groups: Sequence[GroupedAnswers], prefix: str) -> dict[str, float]:
        """Plain pairwise loss (nats; no weight, margin or other option) and accuracy over held-out pairs.

        A tie is wrong. Mean and deviation of the scores.

        Raises:
            ValueError: a score is not finite, with its row.
        """
        self.model.eval()
        pairs, scores = [], []
        for part, counts in self.held_out_parts(groups):
            found = self.scores(self.model, part)
            compared = torch.stack(pair_scores(found, part["pairs"]), 1)
            _refuse_not_finite(compared.sum(1), part["names"], "the score")
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
        if self.compute_metrics is not None:
            found |= self.compute_metrics(EvalPrediction(pair.numpy(), torch.zeros(len(pair)).numpy()))
        return {f"{prefix}_{k}": v for k, v in found.items()}

    def merged(self, onto=None):
        """The plain model, its adapter merged in; checked on documents of the training data.

        As :meth:`whole`, None on the other ranks where weights are sharded.

        Args:
            onto: the base in full precision, where the model's own is quantised.

        Raises:
            ValueError: it does not score as the adapter does (:func:`tasks.lm.adapters.merge_checked`).
        """
        documents = [(*group.prompt, *r) for group in self.train_dataset[:PROBES] for r in group.responses]
        whole = self.whole()
        if whole is None:
            return None
        return merge_checked(whole, documents) if onto is None else merge_onto(onto, whole, documents)


def pair_scores(scores: Tensor, pairs: Tensor) -> tuple[Tensor, Tensor]:
    """Scores of the better and of the worse of each pair. [A], [P, 2] -> [P], [P]; index −1 scores 0."""
    return torch.cat([scores, scores.new_zeros(1)])[pairs].unbind(1)


def _fit_special_tokens(model, tokenizer) -> None:
    bare = unwrapped(model)
    if tokenizer is not None:
        if tokenizer.eos_token_id is None and not is_encoder(model):
            raise ValueError(f"processing_class: no eos token, which {type(bare).__name__} is read at")
        give_pad(tokenizer)
        fit_embeddings(bare, tokenizer)
    pad, eos = bare.config.pad_token_id, bare.config.eos_token_id
    if pad is None or pad in (eos if isinstance(eos, list) else [eos]):
        raise ValueError(
            f"{type(bare).__name__}: pad_token_id is {pad}, eos_token_id {eos}; transformers reads the score "
            "at the last token that is not pad, so give processing_class, or set another pad_token_id"
        )


def _weighted_by_gap(groups: Sequence[GroupedAnswers], power: float) -> list[GroupedAnswers]:
    factors = iter(gap_weights([gap for group in groups for gap in group.gaps], power))
    return [
        replace(group, weights=tuple(group.weight(i) * next(factors) for i in range(len(group.pairs))))
        for group in groups
    ]


def _length_rule(groups: Sequence[GroupedAnswers]) -> float:
    pairs = [(group, i) for group in groups for i in range(len(group.pairs))]
    return length_rule([g.longer(i) for g, i in pairs], [g.weight(i) for g, i in pairs])


def _refuse_not_finite(values: Tensor, names: Sequence[str], what: str) -> None:
    is_bad = ~values.detach().isfinite()
    if is_bad.any():
        rows = sorted({name for name, bad in zip(names, is_bad.tolist(), strict=True) if bad})
        raise ValueError(f"{what} of {', '.join(rows[:5])} is not finite")

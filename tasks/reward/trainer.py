"""RewardTrainer: a question once, its answers as children, every pair with different scores in the loss."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor
from torch.nn import functional
from transformers import Trainer, TrainingArguments

from tasks.lm.forest import Forest, Segment, enable_forest, plant
from tasks.lm.optimizer import NamedOptimizer
from tasks.lm.precision import autocast
from tasks.lm.scoring import forest_scores
from tasks.run.parts import InParts, Parts
from tasks.run.trainer import SafeCheckpoints


@dataclass(frozen=True, slots=True)
class GroupedAnswers:
    """A prompt, its responses, and pairs (better, worse).

    Miniature: in `GroupedAnswers((5, 6), ((7, 1), (8, 1)), ((1, 0),), (0.5,), (3.0,))` the second response is
    better; the pair counts half, and its scores were three apart.
    """

    prompt: tuple[int, ...]
    responses: tuple[tuple[int, ...], ...]
    pairs: tuple[tuple[int, int], ...]
    weights: tuple[float, ...] = ()  # of each pair; empty: 1 for all
    gaps: tuple[float, ...] = ()  # difference of the published scores of each pair; empty: not known

    def __len__(self) -> int:
        """Tokens."""
        return len(self.prompt) + sum(map(len, self.responses))


@dataclass
class RewardConfig(TrainingArguments):
    """`transformers.TrainingArguments`; a batch counts questions."""

    microbatch_tokens: int = field(
        default=0, metadata={"help": "most tokens of one forward; a longer question goes alone; 0: no bound"}
    )
    optimizer: str = field(default="adamw", metadata={"help": "adamw or muon (tasks.lm.optimizer)"})
    remove_unused_columns: bool = field(default=False, metadata={"help": "groups are records, not columns"})
    report_to: str | list[str] | None = field(default="none")


def pair_loss(better: Tensor, worse: Tensor) -> Tensor:
    """Negative log-likelihood of each preference under Bradley-Terry (arXiv 1706.03741, eq. 1).

    [P], [P] -> [P], nats.
    """
    return -functional.logsigmoid(better - worse)


def collate(groups: Sequence[GroupedAnswers]) -> dict[str, Forest | Tensor | list[int]]:
    """Groups -> one forest, its answers, and the pairs among them.

    Returns:
        forest; `answers` [A] the segments that are answers; `pairs` [P, 2] (better, worse) into the answers;
        `weights` [P]; `labels` [P] zeros: the first of each pair is the better one.
    """
    segments, answers, pairs, weights = [], [], [], []
    for group in groups:
        root, first = len(segments), len(answers)
        segments.append(Segment(group.prompt))
        for response in group.responses:
            answers.append(len(segments))
            segments.append(Segment(response, root))
        pairs += [(first + better, first + worse) for better, worse in group.pairs]
        weights += group.weights or [1.0] * len(group.pairs)
    forest = plant(segments)
    return {
        "forest": forest,
        "answers": answers,
        "pairs": torch.tensor(pairs),
        "weights": torch.tensor(weights),
        "labels": torch.zeros(len(pairs)),
    }


class RewardTrainer(InParts, NamedOptimizer, SafeCheckpoints, Trainer):
    """A light subclass of transformers.Trainer over a sequence-classification model with one label.

    Args are Trainer's; `train_dataset` and `eval_dataset` are sequences of :class:`GroupedAnswers`. The
    loss is the mean over pairs of weight times loss. Dropout must be off for the shared question to be exact.
    """

    def __init__(self, model, args: RewardConfig, train_dataset: Sequence[GroupedAnswers], **keys) -> None:
        enable_forest(model)
        keys.setdefault("data_collator", Parts(collate, len, args.microbatch_tokens))
        super().__init__(model=model, args=args, train_dataset=train_dataset, **keys)
        self.tokens_seen = 0
        self.model_accepts_loss_kwargs = True  # the loss below divides by the pairs of the whole batch

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        """A part's share of the mean pairwise logistic loss over the pairs of the batch, nats."""
        better, worse = self.inside(model, lambda model: self.score_pairs(model, inputs))
        loss = self.mean_over_batch(inputs["weights"] * pair_loss(better, worse), num_items_in_batch)
        self.tokens_seen += len(inputs["forest"].tokens)
        return (loss, {"margins": better - worse}) if return_outputs else loss

    def score_pairs(self, model, inputs) -> tuple[Tensor, Tensor]:
        """Scores of the better and of the worse answer of each pair, [P] and [P]."""
        scores = self.scores(model, inputs)
        return scores[inputs["pairs"][:, 0]], scores[inputs["pairs"][:, 1]]

    def scores(self, model, inputs) -> Tensor:
        """Scores of all answers of a batch, [A]."""
        with autocast(self.args.device, "bfloat16" if self.args.bf16 else "float32"):
            return forest_scores(model, inputs["forest"], inputs["answers"])

    @torch.no_grad()
    def evaluate(
        self, eval_dataset=None, ignore_keys=None, metric_key_prefix: str = "eval"
    ) -> dict[str, float]:
        """Loss (nats) and accuracy over the held-out pairs, a tie counted as wrong.

        Mean and deviation of the scores.
        """
        self.model.eval()
        margins, scores = [], []
        for part in self.parts_of(self.get_eval_dataloader(eval_dataset)):
            found = self.scores(self.model, part)
            scores.append(found)
            margins.append(found[part["pairs"][:, 0]] - found[part["pairs"][:, 1]])
        margin, score = torch.cat(margins), torch.cat(scores)
        found = {
            "loss": pair_loss(margin, torch.zeros_like(margin)).mean().item(),
            "accuracy": (margin > 0).float().mean().item(),
            "score_mean": score.mean().item(),
            "score_std": score.std(correction=0).item(),
        }
        metrics = {f"{metric_key_prefix}_{k}": v for k, v in found.items()}
        self.log(metrics)
        return metrics

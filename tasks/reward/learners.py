"""The two that the reward stage trains: what each learns from, and starts from.

The judge is what arXiv 2210.10760 calls gold, as far as votes can give it. PPO never raises its score on
purpose; and so that it does not rise by whatever fools the reward model, the judge is of another kind. It has
other questions, another start (models that share their pre-training share their errors, arXiv 2312.09244),
and need not learn what length and style alone tell of its pairs (:mod:`tasks.reward.style`).
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from pyarrow import parquet

from params.schema import Params
from tasks.lm.heads.reward_model import RewardModel
from tasks.run.layout import Layout


@dataclass(frozen=True, slots=True)
class Start:
    """What a training starts from: ``Start("artifacts/sft/model", is_new=True)``."""

    base: str | Path  # folder or Hub id
    revision: str = "main"
    key: str = "artifacts/sft/model"  # for messages
    is_new: bool = False  # its shape and tokenizer alone, with new weights

    def load(self, policy_tokenizer, **keys) -> RewardModel:
        """The model, before it learns."""
        named = {"revision": self.revision, "key": self.key, "is_new": self.is_new}
        return RewardModel.load(self.base, policy_tokenizer, **named, **keys)


@dataclass(frozen=True, slots=True)
class Learner:
    """One of the two: ``Learner("judge", "judge", "judge", "judge", 2.0, Start("…"), 1.0)``."""

    out: str  # folder under artifacts/reward, and under scratch
    groups: str  # file under pack/groups
    run: str  # prefix of what is logged
    purpose: str  # of its seed
    epochs: float  # passes over its questions
    start: Start
    style_offset: float = 0.0  # share of what length and style tell that it need not learn


def learners(params: Params, layout: Layout) -> tuple[Learner, Learner]:
    """The reward model and its judge.

    The judge starts from `reward.judge_base`; else from `model.base` as it came, or from new weights where
    `model.config` made the base. Without a `judge_base`, its adapter (`reward.lora_rank`) has SFT's model
    under it: one base serves all in ppo, and new weights under an adapter would learn nothing.
    """
    reward, sft = params.reward, layout.artifact("sft", "model")
    start = Start(reward.base, reward.revision, "reward.base") if reward.base else Start(sft)
    own = Learner("model", "reward", "reward", "train", reward.epochs, start)
    if reward.judge_base:
        start = Start(reward.judge_base, reward.judge_revision, "reward.judge_base")
    elif reward.lora_rank:
        start = Start(sft)
    elif params.model.base:
        start = Start(params.model.base, params.model.revision, "model.base")
    else:
        start = Start(sft, is_new=True)
    offset = reward.judge_style_offset
    return own, Learner("judge", "judge", "judge", "judge", reward.judge_epochs, start, offset)


def refuse_without_pairs(learner: Learner, layout: Layout) -> None:
    """Raises ValueError where there is no training question for it, before another one has been trained."""
    path = layout.artifact("pack", "groups", f"{learner.groups}.parquet")
    rows = parquet.read_table(path, columns=["pairs", "is_validation"]).to_pylist()
    if not any(row["pairs"] and not row["is_validation"] for row in rows):
        part = "sft" if learner.groups == "judge" else learner.groups
        raise ValueError(
            f"reward: artifacts/pack/groups/{learner.groups}.parquet holds no training question with answers "
            f"of different scores; the {learner.out} learns from those of data.split.{part}"
        )

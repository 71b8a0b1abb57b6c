"""What RewardTrainer can be told beyond transformers' arguments, and what each setting optimises."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

from transformers import TrainingArguments

from tasks.training.optimizer import check_optim
from tasks.training.start import SHOWN_AS_A_WHOLE
from tasks.training.supported import check_written
from tasks.training.trl_names import MODEL, Only, takes

TRL = MODEL | {
    "max_prompt_length": Only((None,), "max_length bounds prompt and answer together"),
}


@takes(TRL)
@dataclass
class RewardConfig(TrainingArguments):
    """`transformers.TrainingArguments`; a batch counts questions, or rows. What TRL has too keeps its name.

    Raises:
        ValueError: a setting out of its bounds.
    """

    weigh: str = field(
        default="pair",
        metadata={
            "help": "pair: the mean over pairs, which optimises accuracy over pairs; a question of five "
            "answers counts as ten of two. question: the mean over questions of the mean over their pairs "
            "(InstructGPT, arXiv 2203.02155, eq. 1), which optimises accuracy averaged over questions"
        },
    )
    margin: float = field(
        default=0.0,
        metadata={
            "help": "the better answer is to lead by margin times the score gap: -log sigmoid(better - worse "
            "- margin gap) (Llama 2, arXiv 2307.09288, eq. 2); 1 takes a row's `margin` as TRL does. "
            "Optimises score differences that follow the gaps"
        },
    )
    gap_weight: float = field(
        default=0.0,
        metadata={
            "help": "a pair weighs gap^gap_weight over its mean; 1: scaled Bradley-Terry (arXiv 2410.01257). "
            "Optimises accuracy where answers differ clearly, at the price of close calls"
        },
    )
    label_smoothing: float = field(
        default=0.0,
        metadata={
            "help": "share e of wrong labels: -(1 - e) log sigmoid(d) - e log sigmoid(-d). Optimises the "
            "likelihood of noisy labels: no difference need grow beyond log((1 - e) / e)"
        },
    )
    center_rewards_coefficient: float | None = field(
        default=None,
        metadata={
            "help": "adds coefficient times (better + worse)^2 (arXiv 2312.09244, eq. 2): the comparable "
            "scores of mean 0 that differences alone leave open; 0.01 is usual"
        },
    )
    length_offset: float = field(
        default=0.0,
        metadata={
            "help": "times the log-odds that length alone gives a pair, fitted on the training pairs and "
            "added to the difference in training only (product of experts, arXiv 2310.05199). At 1 the model "
            "need not learn length: optimises what length does not tell, not plain accuracy; 0 is off"
        },
    )
    without_eos_share: float = field(
        default=0.0,
        metadata={
            "help": "chance of an answer to be read without the eos it ends with; the loss is the mean over "
            "both readings of either answer. Optimises one score for an answer, whether it has come to its "
            "eos or was cut before; 0: read as it stands, as TRL does"
        },
    )
    max_length: int | None = field(
        default=None, metadata={"help": "tokens of a document; longer ones are cut (TRL leaves them out)"}
    )
    invalid_rows: str = field(
        default="refuse",
        metadata={"help": "a row that cannot teach is an error (refuse), or left out with a warning (drop)"},
    )
    num_layers_unfrozen: int | None = field(
        default=None, metadata={"help": "last blocks that train, with the head; None: all of the model"}
    )
    disable_dropout: bool = field(
        default=True, metadata={"help": "False: the answers to one question share the noise on it"}
    )
    microbatch_tokens: int = field(
        default=1024, metadata={"help": "most tokens of one forward; a longer question is alone; 0: no bound"}
    )
    optimizer: str | None = field(
        default=None, metadata={"help": "by its name in tasks.lm.numerics.optimizer; None: as optim says"}
    )
    logging_steps: float = field(
        default=SHOWN_AS_A_WHOLE, metadata={"help": "steps between two lines; fewer than 10 in all: each"}
    )
    remove_unused_columns: bool = field(default=False, metadata={"help": "groups are records, not columns"})
    report_to: str | list[str] | None = field(default="none")

    def __post_init__(self) -> None:
        check_written(self)
        super().__post_init__()
        check_optim(self)
        for name, allowed in (("weigh", ("pair", "question")), ("invalid_rows", ("refuse", "drop"))):
            if getattr(self, name) not in allowed:
                raise ValueError(f"{name} is {' or '.join(allowed)}, not {getattr(self, name)!r}")
        bounds = {
            "margin": math.inf, "gap_weight": math.inf, "label_smoothing": 1.0,
            "center_rewards_coefficient": math.inf, "length_offset": math.inf,
        }  # fmt: skip
        for name, bound in bounds.items():
            if not 0 <= (getattr(self, name) or 0.0) < bound:
                raise ValueError(f"{name} is at least 0 and below {bound}, not {getattr(self, name)}")
        if not 0 <= self.without_eos_share <= 1:
            raise ValueError(f"without_eos_share is between 0 and 1, not {self.without_eos_share}")

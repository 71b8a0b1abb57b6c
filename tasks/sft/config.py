"""What SFTTrainer can be told beyond transformers' arguments."""

from __future__ import annotations

from dataclasses import dataclass, field

from transformers import TrainingArguments


@dataclass
class SFTConfig(TrainingArguments):
    """`transformers.TrainingArguments`; a batch counts packed rows, and so tokens.

    `per_device_train_batch_size` rows of `row_tokens` tokens: 8 × 2048 by default.

    Raises:
        ValueError: a setting out of its bounds, or one of transformers' that the loss does not know.
    """

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
    invalid_rows: str = field(
        default="refuse",
        metadata={"help": "a row that cannot teach is an error (refuse), or left out with a warning (drop)"},
    )
    num_layers_unfrozen: int | None = field(
        default=None, metadata={"help": "blocks that are trained, from the last; None: the whole model"}
    )
    microbatch_tokens: int = field(
        default=2048, metadata={"help": "most tokens of one forward; a longer row goes alone; 0: no bound"}
    )
    optimizer: str = field(default="adamw", metadata={"help": "by its name in tasks.lm.optimizer"})
    remove_unused_columns: bool = field(default=False, metadata={"help": "rows are records, not columns"})
    report_to: str | list[str] | None = field(default="none")

    def __post_init__(self) -> None:
        super().__post_init__()
        for name, allowed in (("loss_on", ("all", "response")), ("invalid_rows", ("refuse", "drop"))):
            if getattr(self, name) not in allowed:
                raise ValueError(f"{name} is {' or '.join(allowed)}, not {getattr(self, name)!r}")
        for name in ("row_tokens", "max_length"):
            if getattr(self, name) is not None and getattr(self, name) < 2:
                raise ValueError(f"{name} is at least 2, not {getattr(self, name)}")
        if self.label_smoothing_factor:
            raise ValueError("label_smoothing_factor: the loss is the plain negative log-likelihood")

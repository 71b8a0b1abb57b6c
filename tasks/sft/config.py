"""What SFTTrainer can be told beyond transformers' arguments."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from transformers import TrainingArguments

from tasks.training.optimizer import check_optim
from tasks.training.start import SHOWN_AS_A_WHOLE
from tasks.training.supported import check_written
from tasks.training.trl_names import MODEL, Is, Only, Unused, takes


def _packing(name: str, value: Any, keys: Mapping[str, Any]) -> dict[str, Any]:
    """TRL's rows of `max_length` tokens; without packing each document is a row of its own."""
    if value is None or "row_tokens" in keys:
        return {}
    if not value:
        return {"row_tokens": LEAST}
    most = keys.get("max_length") or keys.get("max_seq_length")
    return {"row_tokens": most} if most else {}


LEAST = 2  # tokens of a row: every document is longer, or a row of its own
TRL = MODEL | {
    "packing": _packing,
    "router_aux_loss_coef": Only((None,), "the loss is that of the model's words alone"),
    "dataset_text_field": Only((None, "text"), "rename the column to text, or give formatting_func"),
    "dataset_kwargs": Only((None, {}), "rows of input_ids are taken as they are"),
    "truncation_mode": Only((None, "keep_start"), "documents are cut at their end"),
    "shuffle_dataset": Only((False, None), "batches are drawn in the order of data_seed"),
    "packing_strategy": Only((None, "bfd"), "documents are packed whole"),
    "padding_free": Unused("nothing is ever padded"),
    "eval_packing": Unused("held-out documents are measured one by one, however they are packed"),
    "completion_only_loss": Is("loss_on", {True: "response", False: "all"}),
    "assistant_only_loss": Is("assistant_only"),
    "loss_type": Only((None, "nll"), "the loss is the negative log-likelihood"),
    "num_of_sequences": Unused("all rows are packed at once"),
    "chars_per_token": Unused("rows are packed by their tokens"),
    "dataset_batch_size": Unused("rows are read one by one"),
}


@takes(TRL)
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
    optimizer: str | None = field(
        default=None, metadata={"help": "by its name in tasks.lm.numerics.optimizer; None: as optim says"}
    )
    logging_steps: float = field(
        default=SHOWN_AS_A_WHOLE, metadata={"help": "steps between two lines; fewer than 10 in all: each"}
    )
    remove_unused_columns: bool = field(default=False, metadata={"help": "rows are records, not columns"})
    report_to: str | list[str] | None = field(default="none")

    def __post_init__(self) -> None:
        check_written(self)
        super().__post_init__()
        check_optim(self)
        for name, allowed in (("loss_on", ("all", "response")), ("invalid_rows", ("refuse", "drop"))):
            if getattr(self, name) not in allowed:
                raise ValueError(f"{name} is {' or '.join(allowed)}, not {getattr(self, name)!r}")
        for name in ("row_tokens", "max_length"):
            if getattr(self, name) is not None and getattr(self, name) < 2:
                raise ValueError(f"{name} is at least 2, not {getattr(self, name)}")

"""transformers.Trainer without pickles: the doors that wrote and read them lead to `tasks.run.checkpoint`."""

from __future__ import annotations

import dataclasses
import json
import logging
import time
from collections.abc import Sequence
from copy import copy
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_model
from transformers import TrainerCallback, TrainerState
from transformers.trainer_callback import ExportableState
from transformers.trainer_utils import SaveStrategy

from tasks.run.checkpoint import Checkpoint, latest, load, restore_rng, rng_state, save
from tasks.run.finite import check_tensors, check_weights
from tasks.training.sharded import whole_model

STATE_NAME, WEIGHTS_NAME = "trainer_state.json", "model.safetensors"  # transformers' names
_log = logging.getLogger(__name__)


class SafeCheckpoints:
    """A mixin that stands before Trainer: ``class SFTTrainer(SafeCheckpoints, Trainer)``.

    `args.output_dir` holds checkpoints of `tasks.run.checkpoint`: safetensors and JSON, two of them (or
    `save_total_limit`, if more). ``trainer.train(resume_from_checkpoint=trainer.latest_checkpoint())``, or
    ``trainer.resume()``, goes on from the newest that verifies, bit for bit on a CPU: weights, optimizer,
    schedule, generators, data position, callbacks, log history and the loss that is not logged yet. What
    is frozen of a PEFT model is left out: it is the base model's. Data parallel ranks keep their generators
    in ``rank-<i>/``. Sharded training (FSDP, DeepSpeed) cannot be checkpointed here and is refused.
    """

    unlogged: torch.Tensor | None = None  # what a trainer of ours has summed since the last line of the log
    _resumed: Checkpoint | None = None
    _special: Sequence[tuple[Any, str, Any]] = ()
    _seconds_before = 0.0  # of training before the checkpoint that was resumed

    def __init__(self, *args: Any, **keys: Any) -> None:
        super().__init__(*args, **keys)
        self.add_callback(_AtStart(self))

    def latest_checkpoint(self) -> str | None:
        """The folder of the newest checkpoint in `args.output_dir` that verifies, or None."""
        self._resumed = latest(Path(self.args.output_dir))
        return str(self._resumed.path) if self._resumed else None

    def resume(self, **keys: Any) -> Any:
        """Train from the newest valid checkpoint, or from the start where there is none."""
        return self.train(resume_from_checkpoint=self.latest_checkpoint(), **keys)

    def train(self, resume_from_checkpoint: str | bool | None = None, *args: Any, **keys: Any) -> Any:
        """As Trainer's; True means `latest_checkpoint`.

        Raises:
            ValueError: no valid checkpoint where one is asked for, or sharded training.
        """
        if resume_from_checkpoint is True:
            resume_from_checkpoint = self.latest_checkpoint()
            if resume_from_checkpoint is None:
                raise ValueError(f"no valid checkpoint in {self.args.output_dir}")
        if not resume_from_checkpoint:
            self._resumed = None
        if resume_from_checkpoint or self.args.save_strategy != SaveStrategy.NO:
            self._refuse_sharded()
        self.args.restore_callback_states_from_checkpoint = True
        self._special = _special_tokens(self.model)
        try:
            return super().train(resume_from_checkpoint or None, *args, **keys)
        finally:
            self._resumed = None

    def _refuse_sharded(self) -> None:
        for name in ("fsdp", "deepspeed"):
            if getattr(self, f"is_{name}_enabled"):
                raise ValueError(f"{name}: sharded training has no checkpoints; set save_strategy to 'no'")

    # ---- writing

    def _save_checkpoint(self, model: torch.nn.Module, trial: Any) -> None:
        self._refuse_sharded()
        self.store_flos()
        folder, step = Path(self._get_output_dir(trial=trial)), self.state.global_step
        keep = max(2, self.args.save_total_limit or 0)
        rank = {"rng": rng_state(), "unlogged_loss": self._tr_loss, "unlogged": self.unlogged}
        if self.args.process_index:
            save(folder / f"rank-{self.args.process_index}", step, rank, keep)
        self.accelerator.wait_for_everyone()  # rank 0's folder makes the checkpoint valid, so it comes last
        if not self.args.should_save:
            return
        weights = self._weights()
        _check_weights(f"no checkpoint of step {step}", self.model, weights)
        if self.args.load_best_model_at_end and self.state.best_global_step == step:
            self.state.best_model_checkpoint = str(save(folder / "best", step, {"model": weights}, keep=1))
        callbacks = [*self.callback_handler.callbacks, self.control]
        exportable = [each for each in callbacks if isinstance(each, ExportableState)]
        self.state.stateful_callbacks = TrainerState(stateful_callbacks=exportable).stateful_callbacks
        state = {"model": weights, "rank": rank, "logged": self._logged(), **self._moving_parts()}
        save(folder, step, state, keep, {STATE_NAME: json.dumps(dataclasses.asdict(self.state), indent=2)})

    def _weights(self) -> dict[str, torch.Tensor]:
        model = self.accelerator.unwrap_model(self.model, keep_torch_compile=False)
        left_out = _of_base(model)
        return {name: value for name, value in model.state_dict().items() if name not in left_out}

    def _moving_parts(self) -> dict[str, Any]:
        scaler = getattr(self.accelerator, "scaler", None)
        return {
            "optimizer": self.optimizer.state_dict(),
            "scheduler": self.lr_scheduler.state_dict(),
            "scaler": scaler.state_dict() if scaler is not None else None,
        }

    def _logged(self) -> dict[str, Any]:
        """What Trainer forgets when it resumes: the loss so far, the step of the last log, the time."""
        seconds = time.time() - self._started + self._seconds_before
        return {"loss": self._total_loss_scalar, "step": self._globalstep_last_logged, "seconds": seconds}

    def whole(self) -> torch.nn.Module | None:
        """The plain model with all of its weights (:func:`tasks.training.sharded.whole_model`)."""
        return whole_model(self.accelerator, self.model)

    def _save(self, output_dir: str | None = None, state_dict: dict | None = None) -> None:
        """A plain transformers folder, without training_args.bin."""
        if not self.args.should_save:
            return
        folder = Path(output_dir or self.args.output_dir)
        model = self.accelerator.unwrap_model(self.model, keep_torch_compile=False)
        _check_weights(f"the model is not saved in {folder}", model, state_dict)
        folder.mkdir(parents=True, exist_ok=True)
        if hasattr(model, "save_pretrained"):
            model.save_pretrained(folder, state_dict=state_dict)
        else:
            save_model(model, str(folder / WEIGHTS_NAME))
        tokenizer = self.processing_class or getattr(self.data_collator, "tokenizer", None)
        if tokenizer is not None:
            self.save_tokenizer(tokenizer, folder)

    def save_tokenizer(self, tokenizer: Any, folder: Path) -> None:
        """Beside the model."""
        tokenizer.save_pretrained(folder)

    # ---- reading

    def _read(self, path: str) -> Checkpoint:
        if self._resumed is None or self._resumed.path != Path(path):
            self._resumed = load(Path(path))
        return self._resumed

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        self._fit(self._read(resume_from_checkpoint))

    def _load_best_model(self) -> None:
        self._fit(load(Path(self.state.best_model_checkpoint)))

    def _fit(self, checkpoint: Checkpoint) -> None:
        model = self.accelerator.unwrap_model(self.model, keep_torch_compile=False)
        missing, unknown = model.load_state_dict(checkpoint.state["model"], strict=False)
        if wrong := sorted((set(missing) - _of_base(model)) | set(unknown)):
            raise ValueError(f"{checkpoint.path} is of another model: {len(wrong)} weights, {wrong[0]} first")

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        if checkpoint is not None:
            state = self._read(checkpoint).state
            self.optimizer.load_state_dict(state["optimizer"])
            self.lr_scheduler.load_state_dict(state["scheduler"])

    def _load_scaler(self, checkpoint: str | None) -> None:
        if checkpoint is not None and (state := self._read(checkpoint).state["scaler"]) is not None:
            self.accelerator.scaler.load_state_dict(state)

    def _load_rng_state(self, checkpoint: str | None) -> None:
        if checkpoint is not None and (rank := self._rank(self._read(checkpoint))) is not None:
            restore_rng(rank["rng"])

    def _rank(self, checkpoint: Checkpoint) -> dict[str, Any] | None:
        if not self.args.process_index:
            return checkpoint.state["rank"]
        own = latest(checkpoint.path.parent / f"rank-{self.args.process_index}", checkpoint.step)
        if own is None:
            _log.warning("%s: no generators of rank %d", checkpoint.path, self.args.process_index)
        return own and own.state

    def _init_training_state(self, max_steps: int, per_epoch: int, epochs: int, *rest: Any) -> tuple:
        position = super()._init_training_state(max_steps, per_epoch, epochs, *rest)
        # Resumed at its last step in the middle of an epoch, Trainer would train one step too many.
        return (epochs, 0) if self.state.global_step >= max_steps else position

    def _start(self) -> None:
        """After Trainer has set its counters to zero: back to those of the checkpoint.

        And after it has put the tokenizer's special tokens over those of the model, which are the base's.
        """
        for config, name, value in self._special:
            setattr(config, name, value)
        self._started, self._seconds_before = time.time(), 0.0
        self.unlogged = None
        if self._resumed is None:
            return
        logged = self._resumed.state["logged"]
        self._total_loss_scalar, self._globalstep_last_logged = logged["loss"], logged["step"]
        self._seconds_before, self._initial_global_step = logged["seconds"], 0
        if rank := self._rank(self._resumed):
            self._tr_loss = rank["unlogged_loss"].to(self.args.device)
            self.unlogged = rank.get("unlogged")

    def _finalize_training(self, trial: Any, num_train_samples: int, start_time: float) -> Any:
        return super()._finalize_training(trial, num_train_samples, start_time - self._seconds_before)


class _AtStart(TrainerCallback):
    """Calls the trainer back when everything else is set up."""

    def __init__(self, trainer: SafeCheckpoints) -> None:
        self.trainer = trainer

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.trainer._start()


def _special_tokens(model: torch.nn.Module) -> list[tuple[Any, str, Any]]:
    """(configuration, name, id or ids) of each special token that a model's configurations tell."""
    bare = model.get_base_model() if hasattr(model, "peft_config") else model
    if not hasattr(bare, "config"):
        return []
    configs = [bare.config, bare.config.get_text_config(), getattr(bare, "generation_config", None)]
    names = [f"{kind}_token_id" for kind in ("bos", "eos", "pad")]
    return [(c, name, copy(getattr(c, name, None))) for c in configs if c is not None for name in names]


def _check_weights(what: str, model: torch.nn.Module, state: dict[str, torch.Tensor] | None) -> None:
    """Of a state without its buffers, in which a mask may hold −∞; None: of the model itself."""
    if state is None:
        check_weights(what, model)
    else:
        buffers = {name for name, _ in model.named_buffers()}
        check_tensors(what, {name: value for name, value in state.items() if name not in buffers})


def _of_base(model: torch.nn.Module) -> set[str]:
    """What of a PEFT model's state belongs to its base; of a quantised one more than parameters."""
    if not hasattr(model, "peft_config"):
        return set()
    named = model.named_parameters(remove_duplicate=False)
    return set(model.state_dict()) - {name for name, value in named if value.requires_grad}

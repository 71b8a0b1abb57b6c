"""A transformers callback: progress on the screen, metrics to the tracker."""

from __future__ import annotations

from collections.abc import Callable

from transformers import PrinterCallback, Trainer, TrainerCallback

from tasks.run.progress import Progress
from tasks.run.ranks import processes
from tasks.run.tracking import log_metrics


class Follow(TrainerCallback):
    """Shows steps, tokens per second and time left; logs what Trainer logs under `<stage>/…`.

    Args:
        stage: name of the run.
        tokens_seen: tokens trained on so far, without padding.
    """

    def __init__(self, stage: str, tokens_seen: Callable[[], int]) -> None:
        self.stage, self.tokens_seen = stage, tokens_seen
        self.progress: Progress | None = None
        self.tokens = 0

    def on_train_begin(self, args, state, control, **_) -> None:
        """Start the clock, at the step a checkpoint left off."""
        self.progress = Progress(self.stage, state.max_steps, done=state.global_step)
        self.tokens = self.tokens_seen()

    def on_step_end(self, args, state, control, **_) -> None:
        """One optimizer step more; the other processes are taken to have had as many tokens."""
        seen = self.tokens_seen()
        self.progress.update(state.global_step, (seen - self.tokens) * processes())
        self.tokens = seen

    def on_log(self, args, state, control, logs=None, **_) -> None:
        """Values to the tracker; throughput goes there alone, never into a file that is hashed."""
        values = {
            k: float(v)
            for k, v in (logs or {}).items()
            if isinstance(v, int | float) and not k.startswith("train_")
        }
        if self.progress and "loss" in values:
            self.progress.values |= {"loss": values["loss"]}
            values["tokens_per_second"] = self.progress.rate
        names = {
            k: f"{self.stage}/" + (f"validation_{k[5:]}" if k.startswith("eval_") else k) for k in values
        }
        log_metrics({names[k]: v for k, v in values.items()}, step=state.global_step)


def follow(trainer: Trainer, stage: str) -> None:
    """Let :class:`Follow` report on a trainer that counts `tokens_seen`; Trainer itself prints no more."""
    trainer.remove_callback(PrinterCallback)
    trainer.add_callback(Follow(stage, lambda: trainer.tokens_seen))

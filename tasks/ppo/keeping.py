"""What PPOTrainer tells a tracker, and what is kept of it: a checkpoint's state, a folder, the Hub."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tasks.lm.switching import learnt, load_learnt
from tasks.run.tracking import track


class Kept:
    """A part of :class:`tasks.ppo.trainer.PPOTrainer`, whose attributes it reads."""

    def log_stats(
        self,
        stats: dict[str, Any],
        batch: dict[str, Any],
        rewards: Sequence[Tensor] | Tensor,
        columns_to_log: Sequence[str] = ("query", "response"),
    ) -> None:
        """Write a step's statistics to `config.log_with`; scalars, and with wandb the texts in `batch`.

        Raises:
            ValueError: a column that `batch` does not have.
        """
        if missing := [name for name in columns_to_log if name not in batch]:
            raise ValueError(f"columns_to_log: the batch has no {missing[0]}; it has {', '.join(batch)}")
        scores = torch.stack([torch.as_tensor(r).float().reshape(-1).sum() for r in rewards]).to(self.device)
        scores = self.accelerator.gather(scores)
        if self.accelerator.is_main_process and self.config.log_with:
            found = {k: float(v) for k, v in stats.items() if isinstance(v, int | float)}
            found |= {
                "env/reward_mean": scores.mean().item(),
                "env/reward_std": scores.std(correction=0).item(),
            }
            rows = zip(*(batch[name] for name in columns_to_log), scores.tolist(), strict=False)
            track(self.config.log_with, found, self.updates, [*columns_to_log, "reward"], list(rows))

    def save_pretrained(self, folder: str | Path) -> None:
        """The model, with its value head in a file of its own, and the tokenizer; from one process."""
        if self.accelerator.is_main_process:
            self.model.save_pretrained(folder)
            self.tokenizer.save_pretrained(folder)

    def push_to_hub(self, repo_id: str, **keys: Any) -> Any:
        """Model and tokenizer to the Hub; `keys` as of the model's `push_to_hub`."""
        if self.accelerator.is_main_process:
            self.tokenizer.push_to_hub(repo_id, **keys)
            return self.model.push_to_hub(repo_id, **keys)
        return None

    def state_dict(self) -> dict[str, Any]:
        """All that the next step depends on; of a model under an adapter, what is not the base's."""
        scheduler = None if self.lr_scheduler is None else self.lr_scheduler.state_dict()
        return {
            "model": learnt(self.model),
            "optimizer": self.optimizer.state_dict(),
            "scheduler": scheduler,
            "kl_coef": self.kl_ctl.value,
            "running": self.running.state_dict(),
            "guard": self.guard.state_dict(),
            "updates": self.updates,
            "draws": self.draws,
            "returns": self.returns,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """The inverse of :meth:`state_dict`.

        Raises:
            ValueError: it is of another model; nothing has moved.
        """
        load_learnt(self.model, state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        if self.lr_scheduler is not None:
            self.lr_scheduler.load_state_dict(state["scheduler"])
        self.running.load_state_dict(state["running"])
        self.guard.load_state_dict(state["guard"])
        self.kl_ctl.value = state["kl_coef"]
        self.updates, self.draws, self.returns = state["updates"], state["draws"], state["returns"]

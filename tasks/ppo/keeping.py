"""What PPOTrainer tells a tracker, and what is kept of it: a checkpoint's state, a folder, the Hub."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from accelerate.utils import gather_object
from torch import Tensor

from tasks.lm.adapters.active import learnt, load_learnt
from tasks.lm.model.ends import save_tokenizer
from tasks.ppo.trackers import send, wants_table

CARD = """---
library_name: transformers
tags: [trl, ppo, reinforcement-learning]
---

# {name}

A language model that was trained by proximal policy optimisation. It loads as any model of transformers
(`AutoModelForCausalLM.from_pretrained`); its value head stands in `value_head.safetensors`, and
`tasks.lm.AutoModelForCausalLMWithValueHead.from_pretrained` reads both.
"""
_log = logging.getLogger(__name__)


class Kept:
    """A part of :class:`tasks.ppo.trainer.PPOTrainer`, whose attributes it reads."""

    def log_stats(
        self,
        stats: Mapping[str, Any],
        batch: Mapping[str, Any],
        rewards: Sequence[Tensor] | Tensor,
        columns_to_log: Iterable[str] = ("query", "response"),
    ) -> None:
        """Write a step's statistics to the trackers of `config.log_with`; with wandb the texts in `batch`.

        Args:
            stats: what `step` returned.
            batch: columns of texts or numbers.
            rewards: of the batch; of rewards per token, each response's sum is told.
            columns_to_log: of `batch`, for wandb's table.

        Raises:
            ValueError: wandb is to show a column that `batch` does not have.
        """
        scores = torch.stack([torch.as_tensor(r).float().reshape(-1).sum() for r in rewards]).to(self.device)
        scores, columns, rows = self.accelerator.gather(scores), list(columns_to_log), []
        if wants_table(self.accelerator):
            if missing := [name for name in columns if name not in batch]:
                raise ValueError(f"columns_to_log: the batch has no {missing[0]}; it has {', '.join(batch)}")
            texts = [list(batch[name]) for name in columns]
            texts = [gather_object(column) for column in texts] if self.is_distributed else texts
            rows = list(zip(*texts, scores.tolist(), strict=False))
        if self.accelerator.is_main_process and self.config.log_with:
            found = {
                **stats,
                "env/reward_mean": scores.mean().item(),
                "env/reward_std": scores.std(correction=min(1, len(scores) - 1)).item(),
                "env/reward_dist": scores.cpu().numpy(),
            }
            send(self.accelerator, self.config, found, self.updates, [*columns, "reward"], rows)

    def save_pretrained(
        self,
        save_directory: str | Path,
        *,
        repo_id: str | None = None,
        push_to_hub: bool = False,
        **push_to_hub_kwargs: Any,
    ) -> Any:
        """The model, with its value head in a file of its own, and the tokenizer; from one process.

        Args:
            save_directory: made where it is missing.
            repo_id: where to push it; the folder's name where none is said.
            push_to_hub: whether it goes to the Hub as well.
            push_to_hub_kwargs: as of :meth:`push_to_hub`.

        Raises:
            ValueError: arguments of a push, and none is asked for.
        """
        given = [*push_to_hub_kwargs, *(["repo_id"] if repo_id else [])]
        if given and not push_to_hub:
            raise ValueError(f"save_pretrained: {given[0]} says how to push, and push_to_hub is not set")
        if self.accelerator.is_main_process:
            self._save_pretrained(save_directory)
        if push_to_hub:
            return self.push_to_hub(repo_id or Path(save_directory).name, **push_to_hub_kwargs)
        return None

    def _save_pretrained(self, save_directory: str | Path) -> None:
        """Write the files of :meth:`save_pretrained` and of a push; override it to write others."""
        self.model.save_pretrained(save_directory)
        save_tokenizer(self.tokenizer, save_directory)

    def create_model_card(self, path: str | Path, model_name: str | None = "StackRL Model") -> None:
        """Write `README.md` into the folder `path`, made where it is missing; a push has it, a save not."""
        Path(path).mkdir(parents=True, exist_ok=True)
        Path(path, "README.md").write_text(CARD.format(name=model_name), encoding="utf-8")

    def push_to_hub(
        self,
        repo_id: str,
        *,
        commit_message: str = "PPOTrainer's model",
        private: bool | None = None,
        token: str | None = None,
        branch: str | None = None,
        create_pr: bool | None = None,
        allow_patterns: list[str] | str | None = None,
        ignore_patterns: list[str] | str | None = None,
        delete_patterns: list[str] | str | None = None,
    ) -> Any:
        """Model, value head, tokenizer and a card, as one commit to a repository, made where it is missing.

        Args:
            repo_id: `name` or `owner/name`.
            commit_message: of the commit.
            private: whether a new repository is; None: as its owner's are.
            token: of one who may write there.
            branch: of the commit; None: the main one.
            create_pr: whether it is proposed, not made.
            allow_patterns: files that go.
            ignore_patterns: files that stay.
            delete_patterns: files there that are removed.

        Returns:
            huggingface_hub's `CommitInfo`; None on all processes but the first.
        """
        if not self.accelerator.is_main_process:
            return None
        from huggingface_hub import HfApi

        api = HfApi(token=token)
        with TemporaryDirectory() as folder:
            self._save_pretrained(folder)
            self.create_model_card(folder, repo_id)
            name = api.create_repo(repo_id, private=private, exist_ok=True).repo_id
            return api.upload_folder(
                repo_id=name, folder_path=folder, commit_message=commit_message, revision=branch,
                create_pr=create_pr, allow_patterns=allow_patterns, ignore_patterns=ignore_patterns,
                delete_patterns=delete_patterns,
            )  # fmt: skip

    def _push_if_best(self, scores: Tensor) -> None:
        """Push the model where the mean score, as it is paid, is the best of those compared so far."""
        if not self.push_to_hub_kwargs:
            return
        if self.compare_step % self.config.compare_steps == 0:
            mean = self.mean(scores.tolist())
            if mean > self.highest_reward:
                self.highest_reward = torch.tensor(mean, dtype=torch.float64)
                self.push_to_hub(**self.push_to_hub_kwargs)
        self.compare_step += 1

    def state_dict(self) -> dict[str, Any]:
        """All that the next step depends on; of a model under an adapter, what is not the base's."""
        scheduler = None if self.lr_scheduler is None else self.lr_scheduler.state_dict()
        state = {
            "model": learnt(self.model),
            "optimizer": self.optimizer.state_dict(),
            "scheduler": scheduler,
            "kl_coef": self.kl_ctl.value,
            "kl_error": getattr(self.kl_ctl, "error", None),
            "running": self.running.state_dict(),
            "guard": self.guard.state_dict(),
            "updates": self.updates,
            "draws": self.draws,
            "returns": self.returns,
        }
        if self.push_to_hub_kwargs:
            highest = float(self.highest_reward) if self.highest_reward.isfinite() else None
            state["pushed"] = {"compared": self.compare_step, "highest": highest}
        return state

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
        self.kl_ctl.value, self.kl_ctl.error = state["kl_coef"], state.get("kl_error")
        self.kl_ctl.updates = state["updates"]
        self.updates, self.draws, self.returns = state["updates"], state["draws"], state["returns"]
        if "pushed" in state:
            self.compare_step, highest = state["pushed"]["compared"], state["pushed"]["highest"]
            highest = -torch.inf if highest is None else highest
            self.highest_reward = torch.tensor(highest, dtype=torch.float64)

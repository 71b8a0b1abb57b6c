"""The whole loop: sample, score, step; look at held-out prompts; keep what a killed or lost run needs."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import wraps
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from tasks.lm.adapters.active import learnt, load_learnt
from tasks.lm.model.kinds import is_seq2seq
from tasks.lm.model.reading import encode
from tasks.lm.model.template import without_eos
from tasks.lm.sampling.generation import Responses, row_seeds
from tasks.ppo.batch import check_tokens
from tasks.ppo.config import PPOConfig
from tasks.ppo.looks import HELD_OUT, OF_JUDGE, Looks
from tasks.ppo.preflight import preflight
from tasks.ppo.reward_functions import RewardFunction, scores_of, texts_of
from tasks.run import checkpoint
from tasks.run.curve import Curve
from tasks.run.devices import derive_seed
from tasks.run.monitor.text import has_ended
from tasks.run.progress import Progress

if TYPE_CHECKING:
    from tasks.ppo.trainer import PPOTrainer

COLUMNS = {  # curve.csv -> statistic
    "score": "ppo/mean_scores",
    "kl_nats": "objective/kl",
    "kl_coef": "objective/kl_coef",
    "entropy_nats": "rollout/token_entropy_nats",
    "value_loss": "ppo/loss/value",
    "policy_loss": "ppo/loss/policy",
    "clipfrac": "ppo/policy/clipfrac",
    "approxkl_nats": "ppo/policy/approxkl",
    "response_tokens": "tokens/responses_len_mean",
    "eos_rate": "eos_rate",
}


def train(
    trainer: PPOTrainer,
    prompts: Sequence[str] | Sequence[Sequence[int]],
    reward_fn: RewardFunction,
    *,
    held_out: Sequence | None = None,
    judge: RewardFunction | None = None,
    folder: Path | str | None = None,
    checkpoint_updates: int = 10,
    decode_rows: int = 512,
    on_update: Callable[[int, dict[str, Any]], None] | None = None,
    show_progress: bool = True,
) -> Curve:
    """`trainer.config.total_ppo_epochs` rollouts and updates.

    Args:
        trainer: trained in place; in the end it holds the weights that `select` names.
        prompts: texts, or lists of token ids.
        reward_fn: scores B responses to B prompts: texts where `prompts` are texts (special tokens left out)
            and it does not ask for token ids by an attribute `reads_tokens`, else token ids. -> B numbers, or
            B rows of a reward per token (:mod:`tasks.ppo.reward_functions` makes some).
        held_out: prompts of the looks every `eval_updates`; None: the first 64 of `prompts`.
        judge: a second opinion on what is sampled there, in the units of `reward_fn` and asked as it is: a
            reward model trained on other questions, say. `config.monitor` warns when it does not follow.
        folder: for checkpoints; a run that finds one there goes on from it, bit for bit.
        checkpoint_updates: updates between two of them.
        decode_rows: most rows sampled side by side.
        on_update: told the number of each update and its statistics.
        show_progress: a bar on a terminal, a line every few seconds elsewhere, on stderr.

    Returns:
        A row of statistics per update; printed, what became of each.

    Raises:
        ValueError: no prompt, one that is empty or too long (names it), what `preflight` found, or what
            `PPOTrainer.step` refuses.
    """
    if isinstance(prompts, str):
        raise ValueError("prompts is one text; a list of texts, or of rows of token ids, is wanted")
    if not len(prompts):
        raise ValueError("prompts is empty; PPO needs at least one")
    is_text = isinstance(prompts[0], str)
    if is_text:
        reward_fn, judge = (_of_tokens(trainer.tokenizer, each) for each in (reward_fn, judge))
    rows = [
        _tokens(trainer, name, given, is_text)
        for name, given in (("prompts", prompts), ("held_out", held_out))
    ]
    loop = Loop(trainer, reward_fn, rows[0], rows[1] or rows[0][:64], decode_rows, judge)
    if show_progress:
        on_update = _shown(trainer, on_update)
    loop.run(Path(folder) if folder else None, checkpoint_updates, on_update)
    loop.select()
    return loop.curve


def _shown(trainer: PPOTrainer, on_update: Callable | None) -> Callable[[int, dict[str, Any]], None]:
    """`on_update`, with progress on stderr."""
    progress = Progress("ppo", trainer.config.total_ppo_epochs, done=trainer.updates)

    def told(update: int, stats: dict[str, Any]) -> None:
        progress.update(update, stats["tokens"], score=stats["ppo/mean_scores"], kl=stats["objective/kl"])
        if on_update is not None:
            on_update(update, stats)

    return told


def _tokens(trainer: PPOTrainer, name: str, given: Sequence | None, is_text: bool) -> list[list[int]]:
    if given is None:
        return []
    ids = list(given)
    if is_text:
        ids = encode(trainer.tokenizer, ids, "text")
        if not is_seq2seq(trainer.model.pretrained_model):  # an encoder's source ends as its tokenizer says
            ids = [without_eos(row, trainer.tokenizer) for row in ids]
    most = trainer.room().of_prompt(trainer.config.response_tokens)
    return check_tokens(name, ids, trainer.vocabulary(), room=most)


def _of_tokens(tokenizer, reward_fn: RewardFunction | None) -> RewardFunction | None:
    if reward_fn is None or getattr(reward_fn, "reads_tokens", False):
        return reward_fn

    @wraps(reward_fn)
    def scored(prompts: list[list[int]], responses: list[list[int]]):
        return reward_fn(*texts_of(tokenizer, prompts, responses))

    return scored


def prompts_of_update(update: int, prompts: int, batch: int, seed: int) -> list[int]:
    """Which prompts rollout number `update` uses.

    Shuffled passes over all of them, a function of its number alone.
    """
    wanted, found = range(update * batch, (update + 1) * batch), []
    for epoch in range(wanted.start // prompts, (wanted.stop - 1) // prompts + 1):
        order = torch.randperm(
            prompts, generator=torch.Generator().manual_seed((seed + epoch) % 2**63)
        ).tolist()
        found += [order[i - epoch * prompts] for i in wanted if i // prompts == epoch]
    return found


class Loop:
    """The updates of one run, with all that a checkpoint must hold.

    Args:
        trainer: its configuration and seed decide everything.
        reward_fn: of token ids.
        train: prompts of the rollouts.
        held: prompts of the looks.
        decode_rows: most rows sampled side by side.
        judge: of token ids, for the looks.
    """

    def __init__(
        self,
        trainer: PPOTrainer,
        reward_fn: RewardFunction,
        train: list[list[int]],
        held: list[list[int]],
        decode_rows: int = 512,
        judge: RewardFunction | None = None,
    ) -> None:
        self.trainer, self.reward_fn, self.train, self.held = trainer, reward_fn, train, held
        self.config: PPOConfig = trainer.config
        self.decode_rows = decode_rows
        self.looks = Looks(trainer, reward_fn, judge, held, decode_rows)
        self.curve = Curve([*COLUMNS, *HELD_OUT, *(OF_JUDGE if judge else ())])
        self.best: dict | None = None  # update, score, weights of the best held-out score within the budget

    def run(
        self,
        folder: Path | None,
        checkpoint_updates: int,
        on_update: Callable[[int, dict[str, Any]], None] | None = None,
    ) -> None:
        """All updates that are left, from the newest checkpoint in `folder` if there is one."""
        trainer = self.trainer
        found = checkpoint.latest(folder) if folder else None
        trainer.accelerator.wait_for_everyone()  # all have looked before one of them writes there
        if found:
            self.load_state_dict(found.state)
        else:
            if self.config.preflight:
                preflight(trainer, self.train, self.reward_fn)
            if folder:
                self._save(folder)
        if folder:
            trainer.restore = lambda: self.load_state_dict(checkpoint.latest(folder).state)
        try:
            while trainer.updates < self.config.total_ppo_epochs:
                stats = self.update()
                if on_update is not None:
                    on_update(trainer.updates, stats)
                if folder and trainer.updates % checkpoint_updates == 0:
                    self._save(folder)
        finally:
            trainer.restore = None

    def update(self) -> dict[str, Any]:
        """Sample, score, step; returns the statistics, with `tokens` that were worked on."""
        trainer, config, number = self.trainer, self.config, self.trainer.updates
        self.looks.begin()
        each = config.samples_per_prompt
        chosen = prompts_of_update(
            number, len(self.train), config.batch_size // each, self._seed(f"prompts/{trainer.returns}")
        )
        seeds = row_seeds(self._seed(f"rollout/{trainer.returns}/{number}"), config.batch_size)
        own = slice(trainer.rank * trainer.batch_rows, (trainer.rank + 1) * trainer.batch_rows)
        queries = [self.train[i] for i in chosen for _ in range(each)][own]
        responses = self._sample(queries, seeds[own]).lists()
        stats = trainer.step(queries, responses, scores_of(self.reward_fn, queries, responses))
        stats["eos_rate"] = self._eos_rate(responses)
        of_rows = [len(q) + len(r) for q, r in zip(queries, responses, strict=True)]
        stats["tokens"] = round(trainer.mean(of_rows) * config.batch_size)
        if trainer.updates != number + 1:
            return stats  # earlier weights returned, and their curve with them
        self.curve.add(number + 1, **{name: stats[key] for name, key in COLUMNS.items()})
        if (number + 1) % config.eval_updates == 0 or number + 1 == config.total_ppo_epochs:
            stats |= self._look_at_held_out(number + 1)
        return stats

    def _seed(self, purpose: str) -> int:
        return derive_seed(self.trainer.seed, "ppo", purpose)

    def _sample(self, prompts: list[list[int]], seeds: Sequence[int]) -> Responses:
        return self.trainer.sample(prompts, seeds, self.decode_rows)

    def _eos_rate(self, responses: Sequence[Sequence[int]]) -> float:
        ended = [float(has_ended(r, self.trainer.ends)) for r in responses]
        return self.trainer.mean(ended)

    def _look_at_held_out(self, number: int) -> dict[str, float]:
        """Its columns of the curve, and what the monitor measures, for the tracker."""
        score, measures = self.looks.take(number)
        kl = measures["kl_nats"]
        self.curve.add(number, held_out_score=score, **{f"held_out_{k}": v for k, v in measures.items()})
        if kl <= self.config.kl_budget_nats and (self.best is None or score > self.best["score"]):
            weights = {k: v.detach().clone() for k, v in learnt(self.trainer.model).items()}
            self.best = {"update": number, "score": score, "weights": weights}
        found = {f"monitor/{name}": value for name, value in measures.items()}
        found["monitor/findings"] = float(len(self.looks.findings[number]))
        return found | {"held_out_score": score, "held_out_kl_nats": kl}

    def _save(self, folder: Path) -> None:
        if self.trainer.accelerator.is_main_process:
            checkpoint.save(folder, self.trainer.updates, self.state_dict())
        self.trainer.accelerator.wait_for_everyone()

    def state_dict(self) -> dict:
        """Trainer, curve and best weights."""
        best = self.best if self.config.select == "best" else None
        kept = {"curve": self.curve.rows, "best": best, "looks": self.looks.state_dict()}
        return {"trainer": self.trainer.state_dict(), **kept}

    def load_state_dict(self, state: dict) -> None:
        """The inverse of :meth:`state_dict`."""
        self.trainer.load_state_dict(state["trainer"])
        self.curve = Curve(self.curve.columns, state["curve"])
        self.best = state["best"]
        self.looks.load_state_dict(state["looks"])

    def select(self) -> int:
        """Put the chosen weights into the model; returns the update they are from."""
        if self.config.select == "best" and self.best:
            load_learnt(self.trainer.model, self.best["weights"])
            return self.best["update"]
        return self.trainer.updates

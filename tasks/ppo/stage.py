"""The ppo stage: SFT model, reward model and prompts on disk -> policy on disk."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from pyarrow import parquet
from torch import Tensor

from params.schema import Params, PPOConfig
from tasks.lm import AutoModelForCausalLMWithValueHead
from tasks.lm.generation import Responses
from tasks.lm.loading import load_causal, load_tokenizer
from tasks.lm.reward_model import RewardModel
from tasks.ppo.trainer import PPOTrainer
from tasks.run import checkpoint
from tasks.run.curve import Curve, plot
from tasks.run.devices import derive_seed, seed_everything, use_device
from tasks.run.files import staged
from tasks.run.layout import Layout, Refusal, StageResult
from tasks.run.progress import Progress
from tasks.run.tracking import log_artifact, log_metrics

COLUMNS = {  # curve.csv -> statistic
    "score": "ppo/mean_scores",
    "kl_nats": "objective/kl",
    "kl_coef": "objective/kl_coef",
    "entropy_nats": "objective/entropy",
    "value_loss": "ppo/loss/value",
    "policy_loss": "ppo/loss/policy",
    "clipfrac": "ppo/policy/clipfrac",
    "approxkl_nats": "ppo/policy/approxkl",
    "response_tokens": "tokens/responses_len_mean",
    "eos_rate": "eos_rate",
}
HELD_OUT = ("held_out_score", "held_out_kl_nats")


@dataclass(frozen=True, slots=True)
class Judge:
    """The reward model with everything that turns a response into the score PPO sees."""

    reward_model: RewardModel
    eos_id: int
    mean: float
    std: float
    missing_eos_penalty: float
    rows: int

    def __call__(self, prompts: Sequence[Sequence[int]], responses: Sequence[Sequence[int]]) -> Tensor:
        """B prompts, B responses -> [B]: normalised score, less the penalty where eos is missing."""
        scores = (self.reward_model.score(prompts, responses, self.rows) - self.mean) / self.std
        open_ended = torch.tensor([r[-1] != self.eos_id for r in responses])
        return scores - self.missing_eos_penalty * open_ended


def refuse_unless_passed(layout: Layout) -> None:
    """Raises Refusal, quoting the card, when the reward model did not pass its gate."""
    if not json.loads(layout.artifact("reward_eval", "gate.json").read_text())["passed"]:
        card = layout.artifact("reward_eval", "card.json")
        reason = json.loads(card.read_text())["verdict"] if card.is_file() else "see the report card"
        raise Refusal(f"the reward model did not pass its gate: {reason}")


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
    """The updates of one run, with all that a checkpoint must hold."""

    def __init__(
        self,
        trainer: PPOTrainer,
        judge: Judge,
        train: list[list[int]],
        held: list[list[int]],
        seed: int,
        decode_rows: int,
    ) -> None:
        self.trainer, self.judge, self.train, self.held = trainer, judge, train, held
        self.config: PPOConfig = trainer.config
        self.seed, self.decode_rows = seed, decode_rows
        self.curve = Curve([*COLUMNS, *HELD_OUT])
        self.best: dict | None = (
            None  # update, score and weights of the best held-out score within the budget
        )

    def update(self) -> tuple[dict[str, float], int]:
        """Sample, score, step; returns the statistics and the tokens worked on."""
        number, batch = self.trainer.updates, self.config.batch_size
        chosen = prompts_of_update(number, len(self.train), batch, derive_seed(self.seed, "ppo", "prompts"))
        queries = [self.train[i] for i in chosen]
        sampled = self._sample(queries, f"rollout/{number}")
        responses = sampled.lists()
        stats = self.trainer.step(queries, responses, self.judge(queries, responses))
        stats["eos_rate"] = self._eos_rate(responses)
        self.curve.add(number + 1, **{name: stats[key] for name, key in COLUMNS.items()})
        if (number + 1) % self.config.eval_updates == 0 or number + 1 == self.config.updates:
            stats |= self._look_at_held_out(number + 1)
        return stats, sum(map(len, queries)) + sum(map(len, responses))

    def _sample(self, prompts: list[list[int]], purpose: str) -> Responses:
        return self.trainer.generate(prompts, derive_seed(self.seed, "ppo", purpose), self.decode_rows)

    def _eos_rate(self, responses: Sequence[Sequence[int]]) -> float:
        return sum(r[-1] == self.judge.eos_id for r in responses) / len(responses)

    def _look_at_held_out(self, number: int) -> dict[str, float]:
        """Score and KL on the held-out prompts, always with the same random numbers."""
        responses = self._sample(self.held, "held_out").lists()
        score = self.judge(self.held, responses).mean().item()
        kl = self.trainer.observe(self.held, responses).kl_nats().mean().item()
        found = dict(zip(HELD_OUT, (score, kl), strict=True))
        self.curve.add(number, **found)
        if kl <= self.config.kl_budget_nats and (self.best is None or score > self.best["score"]):
            weights = {k: v.detach().clone() for k, v in self.trainer.model.state_dict().items()}
            self.best = {"update": number, "score": score, "weights": weights}
        return found

    def state_dict(self) -> dict:
        """Trainer, curve and best weights."""
        best = self.best if self.config.select == "best" else None
        return {"trainer": self.trainer.state_dict(), "curve": self.curve.rows, "best": best}

    def load_state_dict(self, state: dict) -> None:
        """The inverse of :meth:`state_dict`."""
        self.trainer.load_state_dict(state["trainer"])
        self.curve = Curve(self.curve.columns, state["curve"])
        self.best = state["best"]

    def select(self) -> int:
        """Put the chosen weights into the model; returns the update they are from."""
        if self.config.select == "best" and self.best:
            self.trainer.model.load_state_dict(self.best["weights"])
            return self.best["update"]
        return self.trainer.updates


def prepare(params: Params, layout: Layout) -> tuple[Loop, object]:
    """Models, prompts and trainer, as the stage needs them; returns the loop and the tokenizer.

    Raises:
        ValueError: no prompt, or a reward model without its scores.json.
    """
    machine, device = params.machine, use_device(params.machine.device, params.machine.threads)
    seed_everything(derive_seed(params.seed, "ppo", "models"))
    source = layout.artifact("sft", "model")
    tokenizer = load_tokenizer(source)
    policy = AutoModelForCausalLMWithValueHead(load_causal(source)).to(device)
    trainer = PPOTrainer(
        params.ppo,
        policy,
        load_causal(source).to(device).requires_grad_(False),
        tokenizer,
        derive_seed(params.seed, "ppo", "minibatches"),
        machine.microbatch_rows,
    )
    scale = json.loads(layout.artifact("reward", "model", "scores.json").read_text())
    mean, std = (scale["mean"], max(scale["std"], 1e-6)) if params.ppo.normalize_scores else (0.0, 1.0)
    judge = Judge(
        RewardModel.load(layout.artifact("reward", "model"), tokenizer, device),
        tokenizer.eos_token_id,
        mean,
        std,
        params.ppo.missing_eos_penalty,
        machine.microbatch_rows,
    )
    rows = parquet.read_table(
        layout.artifact("pack", "prompts", "rl.parquet"), columns=["prompt", "is_validation"]
    ).to_pylist()
    train, held = ([r["prompt"] for r in rows if r["is_validation"] is flag] for flag in (False, True))
    if not train:
        raise ValueError("ppo: artifacts/pack/prompts/rl.parquet holds no training prompt")
    return Loop(trainer, judge, train, held or train[:64], params.seed, machine.decode_rows), tokenizer


def run(params: Params, layout: Layout) -> StageResult:
    """The stage.

    Raises:
        Refusal: the reward model did not pass its gate.
        ValueError: as :func:`prepare`.
    """
    refuse_unless_passed(layout)
    loop, tokenizer = prepare(params, layout)
    trainer, folder = loop.trainer, layout.scratch("ppo")
    if found := checkpoint.latest(folder):
        loop.load_state_dict(found.state)
    with Progress("ppo", params.ppo.updates, done=trainer.updates) as progress:
        while trainer.updates < params.ppo.updates:
            stats, tokens = loop.update()
            progress.update(trainer.updates, tokens, score=stats["ppo/mean_scores"], kl=stats["objective/kl"])
            log_metrics(stats | {"ppo/tokens_per_second": progress.rate}, step=trainer.updates)
            if trainer.updates % params.machine.checkpoint_updates == 0:
                checkpoint.save(folder, trainer.updates, loop.state_dict())
    chosen = loop.select()
    with staged(layout.artifact("ppo", "model")) as out:
        trainer.model.save_pretrained(out)
        tokenizer.save_pretrained(out)
    loop.curve.write(layout.artifact("ppo", "curve.csv"))
    pictures = ["score", "kl_nats", "entropy_nats", "value_loss"]
    log_artifact(plot(layout.home / "reports/ppo/curve.png", loop.curve, pictures, "PPO"))
    rows = loop.curve.rows
    last = {
        k: v for k, v in rows[-1].items() if k in ("score", "kl_nats", "kl_coef", "entropy_nats", *HELD_OUT)
    }
    return StageResult(
        {"updates": trainer.updates, "selected_update": chosen, "first_score": rows[0]["score"], **last}
    )

"""PPOTrainer: (prompts, responses, scores) in, a better policy out; the interface of TRL 0.11."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from params.schema import PPOConfig
from tasks.lm.adapter_kinds import check_adapters
from tasks.lm.checkpointing import recompute_blocks
from tasks.lm.forest import unwrapped
from tasks.lm.freezing import blocks_of, freeze_layers
from tasks.lm.generation import Responses, draw_uniforms, generate, row_seeds
from tasks.lm.masked import alone, whiten
from tasks.lm.modes import in_evaluation
from tasks.lm.optimizer import check_optimizer, make_optimizer
from tasks.lm.precision import autocast
from tasks.lm.reference import create_reference_model
from tasks.lm.roads import take_road
from tasks.lm.room import Room, speaking_room
from tasks.lm.seq2seq import is_seq2seq, warn_of_start
from tasks.lm.sequences import lay_out, read_responses
from tasks.lm.switching import at_work, learnt, load_learnt, reference_adapters
from tasks.lm.trunk import Hydra
from tasks.lm.value_head import ModelWithValueHead
from tasks.ppo.advantages import gae
from tasks.ppo.asking import Asked, asked_of
from tasks.ppo.batch import Batch, check_batch, check_tokens
from tasks.ppo.first_step import begins_as_reference
from tasks.ppo.first_step import warn_of_start as warn_of_first_step
from tasks.ppo.guard import SpikeGuard
from tasks.ppo.losses import policy_loss, ratio_of, value_loss
from tasks.ppo.rewards import KLController, RunningMoments, kl_estimate, token_rewards
from tasks.ppo.rollout import Rollout, observe
from tasks.ppo.statistics import OF_TOKENS, Passes, moments_of, rollout_statistics, token_sums
from tasks.run.devices import derive_seed
from tasks.run.tracking import check_tracker, track

MOST_RETURNS = 8  # to earlier weights, before the training is given up
_log = logging.getLogger(__name__)


class PPOTrainer:
    """Proximal policy optimisation against scores from anywhere.

    One optimizer step takes `mini_batch_size × gradient_accumulation_steps` responses over all processes and
    is the mean over their tokens, however they are split. Models are in evaluation mode, whatever mode they
    are left in: no dropout, in rollouts and in updates. Global random numbers are neither drawn nor seeded.

    Args:
        config: learning rate, batch sizes, KL price and clip ranges.
        model: AutoModelForCausalLMWithValueHead or AutoModelForSeq2SeqLMWithValueHead, trained in place.
        ref_model: a language model of the same kind, with or without a value head; KL is measured to it.
            None: what the model says now, as a frozen copy of it, or of its adapter where it has one (a
            fresh adapter: the model without it).
        tokenizer: gives eos and pad, and is saved with the model.
        dataset: rows for `dataloader`, which gives batches of `batch_size`, shuffled, without a remainder.
        optimizer: over the model's parameters; None: the one that `config.optimizer` names.
        data_collator: of `dataloader`.
        num_shared_layers: without a `ref_model`: first layers that are frozen and that it shares in memory;
            `config.num_layers_unfrozen` counts from the other end.
        lr_scheduler: of `optimizer`, moved once per step.
        seed: of sampling and minibatches where the configuration has none.
        device: for the models; None: what accelerate chooses.
        microbatch_rows: most rows in one forward; caps memory, changes nothing else.
        trunk_megabytes: most memory for what frozen first layers make of a rollout (H numbers for each
            token), which is kept for all passes over it; a rollout that needs more is read anew in each.

    Raises:
        ValueError: a model of another kind, a tokenizer without eos or pad, a reference of another
            vocabulary or no model, an optimizer of other parameters, batch sizes that the processes do not
            divide, a tracker or an optimizer that is not there, more layers unfrozen or shared than there
            are, weights of the base that learn beside an adapter.
    """

    def __init__(
        self,
        config: PPOConfig | None = None,
        model: ModelWithValueHead | None = None,
        ref_model: nn.Module | None = None,
        tokenizer: Any = None,
        dataset: Any = None,
        optimizer: torch.optim.Optimizer | None = None,
        data_collator: Callable | None = None,
        num_shared_layers: int | None = None,
        lr_scheduler: Any = None,
        *,
        seed: int = 0,
        device: torch.device | str | None = None,
        microbatch_rows: int = 64,
        trunk_megabytes: int = 2048,
    ) -> None:
        self.config = config = PPOConfig() if config is None else config
        if not isinstance(config, PPOConfig):
            raise ValueError(f"config must be a PPOConfig, not {type(config).__name__}")
        if microbatch_rows < 1:
            raise ValueError(f"microbatch_rows is {microbatch_rows}; a forward takes at least one row")
        _check_models(model, ref_model, tokenizer)
        _check_optimizer(optimizer, model)
        check_tracker(config.log_with)
        check_optimizer(config.optimizer, "ppo.optimizer")
        if config.lora_rank and not model.is_peft_model:
            raise ValueError(
                f"ppo.lora_rank is {config.lora_rank}, but the model has no adapter; put one on "
                "(from_pretrained with peft_config), or leave ppo.lora_rank at 0"
            )
        self.accelerator = Accelerator(cpu=device is not None and torch.device(device).type == "cpu")
        processes = self.accelerator.num_processes
        for name in ("batch_size", "mini_batch_size"):
            if getattr(config, name) % processes:
                raise ValueError(
                    f"ppo.{name} ({getattr(config, name)}) is not a multiple of {processes} processes"
                )
        self.batch_rows, self.mini_rows = config.batch_size // processes, config.mini_batch_size // processes
        self.device = torch.device(device) if device is not None else self.accelerator.device
        self.model, self.tokenizer = model.to(self.device).eval(), tokenizer
        self.ref_adapters: list[str] = []  # at work in the reference, where there is no ref_model
        self.ref_model = self._reference_of(ref_model, num_shared_layers)
        for served in (self.model, self.ref_model):
            if served is not None:
                take_road(_causal(served), learns=served is self.model)
        branch = self.model.v_head.branch
        self.hydra = Hydra.of(
            _causal(self.model),
            None if self.ref_model is None else _causal(self.ref_model),
            0 if branch is None else len(branch.blocks),
            trunk_megabytes * 2**20,
        )
        self.seed = config.seed if config.seed is not None else seed
        self.microbatch_rows, self.updates, self.draws, self.returns = microbatch_rows, 0, 0, 0
        self.kl_ctl = KLController(
            config.init_kl_coef, config.target if config.adap_kl_ctrl else None, config.horizon
        )
        self.running = RunningMoments(self._total)
        self.guard = SpikeGuard(config.ratio_threshold, config.spike_factor, config.max_skipped_steps)
        self.restore: Callable[[], None] | None = None  # brings the last good state back; a loop sets it
        self.parameters = [p for p in self.model.parameters() if p.requires_grad]
        self.optimizer = optimizer or make_optimizer(
            self.model, config.optimizer, config.learning_rate, config.weight_decay,
            betas=(0.9, config.adam_beta2), key="ppo.optimizer",
        )  # fmt: skip
        self.lr_scheduler, self.dataset = lr_scheduler, dataset
        self.dataloader = None if dataset is None else self._load(dataset, data_collator)

    # ---- rollouts

    def sample(
        self,
        prompts: Sequence[Sequence[int]],
        seeds: Sequence[int],
        rows: int = 512,
        model: nn.Module | None = None,
        asked: Asked | None = None,
    ) -> Responses:
        """One response to each prompt, at `config.temperature`. B lists -> Responses [B, R].

        Args:
            prompts: B lists of token ids; equal ones are read once.
            seeds: B numbers, one for each response; nothing else of the batch decides it.
            rows: most rows sampled side by side.
            model: None: the policy.
            asked: lengths and the like; None: `response_tokens` tokens until eos.
        """
        asked = asked or self._asked({}, len(prompts))
        return generate(
            _causal(self.model) if model is None else model,
            prompts,
            max_tokens=asked.max_tokens,
            eos_id=asked.eos_id,
            pad_id=self.tokenizer.pad_token_id,
            uniforms=draw_uniforms(seeds, max(asked.max_tokens)) if asked.do_sample else None,
            temperature=self.config.temperature,
            top_k=asked.top_k,
            top_p=asked.top_p,
            min_tokens=asked.min_tokens,
            rows=rows,
            dtype=self.config.dtype,
        )

    def generate(
        self,
        query_tensor: Tensor | list[Tensor],
        length_sampler: Callable[[], int] | None = None,
        batch_size: int | None = None,
        return_prompt: bool = True,
        generate_ref_response: bool = False,
        **generation_kwargs: Any,
    ) -> Any:
        """Responses as TRL's `generate` gives them, one uniform number per token and row.

        Args:
            query_tensor: one prompt [P], or a list of them.
            length_sampler: gives the most new tokens of each row in turn.
            batch_size: most rows sampled side by side; None: 512. It changes no response.
            return_prompt: whether the prompt stands before its response; never where an encoder reads it.
            generate_ref_response: the reference's responses as well, of the same random numbers.
            generation_kwargs: as in transformers: `max_new_tokens`, `min_new_tokens`, `min_length`,
                `do_sample` (True unless told otherwise), `temperature` (that of the configuration), `top_k`,
                `top_p`, `eos_token_id` (−1: never), `pad_token_id`.

        Returns:
            A list of tensors [tokens], cut behind the first eos of the response; a tensor [1, tokens] where
            one prompt came. With `generate_ref_response` a pair of these.

        Raises:
            ValueError: a 2-D tensor, an empty or too long prompt (names the row), or an argument that this
                sampler does not know.
        """
        is_one = isinstance(query_tensor, Tensor)
        queries = [query_tensor] if is_one else query_tensor
        prompts = check_tokens("query_tensor", queries, self.vocabulary())
        if not prompts:
            raise ValueError("query_tensor is empty; generate needs at least one prompt")
        lengths = None if length_sampler is None else [int(length_sampler()) for _ in prompts]
        asked = self._asked(generation_kwargs, len(prompts), lengths)
        room = self.room()
        for i, (prompt, most) in enumerate(zip(prompts, asked.max_tokens, strict=True)):
            if not room.holds(len(prompt), most):
                raise ValueError(
                    f"query_tensor[{i}] has {len(prompt)} tokens and may get {most} more; the model has "
                    f"room for {room}"
                )
        self.draws += 1
        seeds = row_seeds(derive_seed(self.seed, "ppo", f"generate/{self.rank}/{self.draws}"), len(prompts))
        found = [self._generated(prompts, seeds, batch_size or 512, None, asked, return_prompt)]
        if generate_ref_response:
            with self.reference() as ref_model:
                found.append(
                    self._generated(prompts, seeds, batch_size or 512, ref_model, asked, return_prompt)
                )
        if is_one:
            found = [rows[0][None] for rows in found]
        return tuple(found) if generate_ref_response else found[0]

    def _generated(self, prompts, seeds, rows, model, asked: Asked, return_prompt: bool) -> list[Tensor]:
        responses = self.sample(prompts, seeds, rows, model, asked).lists()
        with_prompt = return_prompt and not is_seq2seq(_causal(self.model))
        whole = [p + r if with_prompt else r for p, r in zip(prompts, responses, strict=True)]
        return [torch.tensor(ids, dtype=torch.long, device=self.device) for ids in whole]

    @in_evaluation
    def observe(
        self,
        queries: Sequence[Sequence[int]],
        responses: Sequence[Sequence[int]],
        is_action: Sequence[Sequence[bool]] | None = None,
    ) -> Rollout:
        """What policy, critic and reference think of B responses, before any update."""
        pad_id = self.tokenizer.pad_token_id  # often a token that was added, and no model has heard of
        pad_id = pad_id if 0 <= pad_id < self.vocabulary() else 0
        sequences = lay_out(queries, responses, pad_id, self.device)
        mask = sequences.is_response
        if is_action is not None:
            flat = [flag for row in is_action for flag in row]
            mask = mask.clone().masked_scatter(mask, torch.tensor(flat, dtype=torch.bool, device=self.device))
        return observe(
            self.model, self.ref_model, self.reference, sequences, mask, self.config.temperature,
            self.config.kl_penalty, self.microbatch_rows, self._precision, self.hydra,
        )  # fmt: skip

    @contextmanager
    def reference(self) -> Iterator[nn.Module]:
        """The causal model that KL is measured to: `ref_model`, or the policy's base under `ref_adapters`."""
        if self.ref_model is not None:
            yield _causal(self.ref_model)
        else:
            with at_work(self.model.pretrained_model, self.ref_adapters) as causal:
                yield causal

    # ---- updates

    @in_evaluation
    def step(
        self,
        queries: Sequence[Tensor],
        responses: Sequence[Tensor],
        scores: Sequence[Tensor] | Tensor,
        response_masks: Sequence[Tensor] | None = None,
    ) -> dict[str, Any]:
        """One update: `ppo_epochs` passes over one rollout.

        Args:
            queries: prompts, token ids; this process's share of `batch_size`.
            responses: as many, eos included where there is one; an empty one teaches nothing.
            scores: one number each, or one for each token of each response (dense rewards).
            response_masks: as the responses: 0 where a token is not the policy's (a tool's answer).

        Returns:
            Statistics, under TRL's names where TRL has them (:mod:`tasks.ppo.statistics`); `time/…` in
            seconds.

        Raises:
            ValueError: as :func:`tasks.ppo.batch.check_batch`; nothing has moved.
        """
        clock = _Clock()
        room = self.room()
        batch = check_batch(
            queries, responses, scores, response_masks, self.batch_rows, self.vocabulary(), room
        )
        warn_of_start(_causal(self.model), batch.responses)
        seen = self.observe(batch.queries, batch.responses, batch.is_action)
        is_reference = self.updates == 0 and begins_as_reference(self)
        clock.lap("forward_pass")
        paid, price = self.shape(batch), self.kl_ctl.value
        in_reward = price if self.config.kl_in == "reward" else 0.0
        rewards = token_rewards(paid, seen.kl, seen.is_action, in_reward)
        clock.lap("compute_rewards")
        if self.config.whiten_rewards:
            rewards = whiten(rewards, seen.is_action, self._total, shift_mean=False)
        advantages, returns = gae(rewards, seen.values, seen.is_action, self.config.gamma, self.config.lam)
        advantages = whiten(advantages, seen.is_action, self._total)
        clock.lap("compute_advantages")
        passes = self._improve(seen, advantages, returns)
        clock.lap("optimize_step")
        if self.updates == 0:
            warn_of_first_step(self, seen, passes, is_reference)
        each = torch.stack([s.sum() for s in paid]) if isinstance(paid, list) else paid
        stats = rollout_statistics(seen, each, price, batch.queries, self._total) | passes.statistics()
        stats |= {
            "ppo/learning_rate": self.optimizer.param_groups[0]["lr"],
            "ppo/steps_skipped": self.guard.skipped,
        }
        self.kl_ctl.update(stats["objective/kl"], self.config.batch_size)
        if self.lr_scheduler is not None:
            self.lr_scheduler.step()
        self.updates += 1
        if self.guard.is_lost:
            self._return()
        clock.lap("calc_stats")
        return stats | clock.statistics()

    def shape(self, batch: Batch, learn: bool = True) -> Tensor | list[Tensor]:
        """Scores as they are paid: less the baseline, scaled, clipped, less the penalty of a missing eos.

        Args:
            batch: what came.
            learn: whether the running moments take the scores in.

        Returns:
            [B], or B rows of a reward per token.

        Raises:
            ValueError: a reward per token came, and the configuration scales or clips scores.
        """
        config, scores = self.config, batch.scores
        if isinstance(scores, list):
            if config.use_score_scaling or config.score_clip or config.score_baseline:
                raise ValueError("scores: a reward per token is neither scaled, clipped nor given a baseline")
            if config.missing_eos_penalty:
                for row, response in zip(scores, batch.responses, strict=True):
                    if response and response[-1] != self.tokenizer.eos_token_id:
                        row[-1] -= config.missing_eos_penalty
            return [row.to(self.device) for row in scores]
        scores = scores.to(self.device) - config.score_baseline
        if config.use_score_scaling:
            if learn:
                self.running.update(scores)
            scores = (scores - (self.running.mean if config.use_score_norm else 0.0)) / self.running.std
        if config.score_clip is not None:
            scores = scores.clamp(-config.score_clip, config.score_clip)
        is_open = [not r or r[-1] != self.tokenizer.eos_token_id for r in batch.responses]
        return scores - config.missing_eos_penalty * torch.tensor(is_open, device=self.device)

    def _improve(self, seen: Rollout, advantages: Tensor, returns: Tensor) -> Passes:
        """The passes over the rollout; they end early where KL to the old policy or a spike says so."""
        config, passes = self.config, Passes(self.config.vf_coef)
        for order in self._orders():
            for step in order.split(config.mini_batch_size * config.gradient_accumulation_steps):
                rows = self._own(step)
                self._optimize(seen.rows(rows), advantages[rows], returns[rows], passes)
                if self.guard.is_lost:
                    return passes
            moved = passes.rows[-1]["policy/policykl"] if passes.rows else 0.0
            if config.early_stopping and abs(moved) > 1.5 * config.target_kl:
                break
        return passes

    def _orders(self) -> Iterator[Tensor]:
        """The order of all processes' rows in each pass; a function of seed, update and pass alone."""
        for epoch in range(self.config.ppo_epochs):
            purpose = f"minibatches/{self.returns}/{self.updates}/{epoch}"
            draw = torch.Generator().manual_seed(derive_seed(self.seed, "ppo", purpose))
            yield torch.randperm(self.config.batch_size, generator=draw)

    def _own(self, rows: Tensor) -> Tensor:
        """Which of its own rows this process has among those of the whole batch; there may be none."""
        own = rows - self.rank * self.batch_rows
        return own[(own >= 0) & (own < self.batch_rows)].to(self.device)

    def _optimize(self, seen: Rollout, advantages: Tensor, returns: Tensor, passes: Passes) -> None:
        """One optimizer step."""
        count = self._total(seen.is_action.sum().double()).item()
        if not count:
            return
        sums = torch.zeros(len(OF_TOKENS), dtype=torch.float64, device=self.device)
        every = torch.arange(len(advantages), device=self.device)
        for part in every.split(min(self.mini_rows, self.microbatch_rows)) if len(every) else ():
            sums += self._backward(seen.rows(part), advantages[part], returns[part], count, passes)
        means = dict(zip(OF_TOKENS, (self._total(sums) / count).tolist(), strict=True))
        self._sum_gradients()
        norm = self._clip()
        passes.add(means, norm, moments_of(returns, seen.values, seen.is_action, self._total))
        if self.guard.allows(passes.rows[-1]["loss/total"], means["ratio"], norm):
            self.optimizer.step()
        self.optimizer.zero_grad()

    def _clip(self) -> float:
        """The norm of the gradient, which is no longer than `max_grad_norm` afterwards."""
        norm = nn.utils.get_total_norm([p.grad for p in self.parameters if p.grad is not None])
        if self.config.max_grad_norm is not None:
            nn.utils.clip_grads_with_norm_(self.parameters, self.config.max_grad_norm, norm)
        return norm.item()

    def _backward(
        self, seen: Rollout, advantages: Tensor, returns: Tensor, count: float, passes: Passes
    ) -> Tensor:
        """Gradient of the mean loss over the `count` tokens of one optimizer step. -> sums, as OF_TOKENS."""
        config, mask = self.config, seen.is_action
        is_warming = self.updates < config.critic_warmup_updates
        with self._precision(), recompute_blocks(self.model, config.gradient_checkpointing):
            logprobs, entropy, values = read_responses(
                self.model, seen.sequences, config.temperature, freeze_trunk=is_warming, trunk=seen.trunk
            )
            ratio = ratio_of(logprobs, seen.logprobs, mask)
            policy, is_clipped = policy_loss(ratio, advantages, config.cliprange)
            value, is_value_clipped = value_loss(values, seen.values, returns, config.cliprange_value)
            loss, kl_loss = config.vf_coef * value, torch.zeros_like(policy)
            if not is_warming:
                if config.kl_in == "loss":
                    kl_loss = self.kl_ctl.value * kl_estimate(logprobs - seen.ref_logprobs, config.kl_penalty)
                loss = loss + policy + kl_loss
            (loss.masked_fill(~mask, 0).sum() / count).backward()
        moved = (logprobs - seen.logprobs).detach()
        passes.ratios.append(ratio.detach()[mask])
        passes.advantages.append(advantages[mask])
        of_tokens = (
            policy, value, is_clipped, is_value_clipped, 0.5 * moved**2, -moved,
            entropy, advantages, values, (values - returns) ** 2, ratio, kl_loss,
        )  # fmt: skip
        return token_sums(dict(zip(OF_TOKENS, of_tokens, strict=True)), mask)

    def _return(self) -> None:
        """After too many skipped steps in a row: earlier weights where a loop keeps some, half the rate."""
        returns = self.returns + 1
        if returns > MOST_RETURNS:
            raise RuntimeError(f"PPO: the training was lost {returns} times; lower ppo.learning_rate")
        if self.restore is not None:
            self.restore()
        for group in self.optimizer.param_groups:
            group["lr"] *= 0.5 ** (returns - self.returns)
        if self.lr_scheduler is not None:
            self.lr_scheduler.base_lrs = [
                lr * 0.5 ** (returns - self.returns) for lr in self.lr_scheduler.base_lrs
            ]
        self.returns, self.guard.in_a_row = returns, 0
        _log.error(
            "PPO: %d steps in a row were skipped; going on from update %d with the learning rate %.3g",
            self.config.max_skipped_steps, self.updates, self.optimizer.param_groups[0]["lr"],
        )  # fmt: skip

    # ---- facts

    @property
    def rank(self) -> int:
        """Of this process."""
        return self.accelerator.process_index

    def vocabulary(self) -> int:
        """Tokens the model can say."""
        return _vocabulary_of(self.model)

    def room(self) -> Room:
        """For a prompt and its response."""
        return speaking_room(_causal(self.model))

    def mean(self, values: Sequence[float]) -> float:
        """Mean over all processes."""
        summed = torch.tensor([sum(values), len(values)], dtype=torch.float64, device=self.device)
        total, count = self._total(summed).tolist()
        return total / max(count, 1)

    # ---- the whole loop, what is kept, and what is told

    def train(self, prompts: Sequence, reward_fn: Callable, **keys: Any):
        """`config.updates` rollouts and updates; see :func:`tasks.ppo.loop.train`."""
        from tasks.ppo.loop import train

        return train(self, prompts, reward_fn, **keys)

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

    # ---- small things

    def _precision(self):
        return autocast(self.device, self.config.dtype)

    def _asked(self, given: dict[str, Any], rows: int, lengths: Sequence[int] | None = None) -> Asked:
        return asked_of(given, self.config, self.tokenizer.eos_token_id, self.vocabulary(), rows, lengths)

    def _total(self, values: Tensor) -> Tensor:
        """The sum over processes."""
        return (
            alone(values) if self.accelerator.num_processes == 1 else self.accelerator.reduce(values, "sum")
        )

    def _sum_gradients(self) -> None:
        """Every process holds the gradient of its own rows; from here on that of all."""
        if self.accelerator.num_processes > 1:
            for parameter in self.parameters:
                if parameter.grad is None:
                    parameter.grad = torch.zeros_like(parameter)
                parameter.grad = self.accelerator.reduce(parameter.grad, "sum")

    def _reference_of(self, ref_model, num_shared_layers: int | None):
        """The reference; layers that stay what they are get frozen in the policy."""
        causal, unfrozen = _causal(self.model), self.config.num_layers_unfrozen
        if unfrozen is not None and num_shared_layers is None:
            num_shared_layers = len(blocks_of(causal)) - unfrozen
            if num_shared_layers < 0:
                raise ValueError(
                    f"ppo.num_layers_unfrozen is {unfrozen}; the model has {len(blocks_of(causal))} blocks"
                )
        if ref_model is not None:
            if unfrozen is None and num_shared_layers is not None:
                _log.warning("num_shared_layers has no effect beside a ref_model: the two share nothing")
            freeze_layers(causal, unfrozen)
            return ref_model.to(self.device).eval()
        if self.model.is_peft_model:
            self.ref_adapters = reference_adapters(causal)
            freeze_layers(causal, unfrozen)
            return None
        return create_reference_model(self.model, num_shared_layers)

    def _load(self, dataset, collate):
        draw = torch.Generator().manual_seed(derive_seed(self.seed, "ppo", "dataset"))
        loader = torch.utils.data.DataLoader(
            dataset, self.batch_rows, shuffle=True, drop_last=True, collate_fn=collate, generator=draw
        )
        return self.accelerator.prepare(loader)


class _Clock:
    """Seconds between laps, under TRL's names."""

    def __init__(self) -> None:
        self.start = self.last = time.perf_counter()
        self.laps: dict[str, float] = {}

    def lap(self, name: str) -> None:
        now = time.perf_counter()
        self.laps[f"time/ppo/{name}"], self.last = now - self.last, now

    def statistics(self) -> dict[str, float]:
        return self.laps | {"time/ppo/total": self.last - self.start}


def _causal(model: nn.Module) -> nn.Module:
    """The language model of one with a value head; another one as it is."""
    return getattr(model, "pretrained_model", model)


def _vocabulary_of(model: nn.Module) -> int:
    return unwrapped(_causal(model)).get_output_embeddings().weight.shape[0]


def _check_models(model, ref_model, tokenizer) -> None:
    if not isinstance(model, ModelWithValueHead):
        raise ValueError(
            "model must be an AutoModelForCausalLMWithValueHead or AutoModelForSeq2SeqLMWithValueHead, not "
            f"{type(model).__name__}"
        )
    for name in ("eos_token_id", "pad_token_id"):
        if getattr(tokenizer, name, None) is None:
            raise ValueError(f"tokenizer: it has no {name}")
    if ref_model is None:
        return
    other = unwrapped(_causal(ref_model)) if isinstance(ref_model, nn.Module) else None
    if getattr(other, "get_output_embeddings", lambda: None)() is None:
        raise ValueError(f"ref_model must be a language model, not {type(ref_model).__name__}")
    check_adapters(_causal(ref_model), "ref_model")
    if _causal(ref_model) is _causal(model):
        raise ValueError("ref_model is the model itself, which would move with it; leave it out for a copy")
    names = [type(unwrapped(_causal(each))).__name__ for each in (model, ref_model)]
    if is_seq2seq(_causal(model)) != is_seq2seq(_causal(ref_model)):
        raise ValueError(f"ref_model is a {names[1]}, the model a {names[0]}; one of both has an encoder")
    own, other = _vocabulary_of(model), _vocabulary_of(ref_model)
    if own != other:
        raise ValueError(f"ref_model has a vocabulary of {other} tokens, the model one of {own}")


def _check_optimizer(optimizer, model: nn.Module) -> None:
    """One that moves another model would let this one stand still, and say nothing."""
    if optimizer is None:
        return
    held = [p for group in getattr(optimizer, "param_groups", []) for p in group["params"]]
    own = set(map(id, model.parameters()))
    if not any(id(p) in own for p in held):
        raise ValueError("optimizer holds none of the model's parameters; nothing would be learnt")

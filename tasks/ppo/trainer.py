"""PPOTrainer: (prompts, responses, scores) in, a better policy out; the interface of TRL 0.11."""

from __future__ import annotations

import inspect
import logging
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from tasks.lm.adapters.active import at_work, reference_adapters
from tasks.lm.attention.padding import lay_out
from tasks.lm.heads.reference import create_reference_model
from tasks.lm.heads.value_head import ModelWithValueHead
from tasks.lm.logprobs.frozen_layers import Hydra
from tasks.lm.logprobs.responses import read_responses
from tasks.lm.logprobs.roads import take_road
from tasks.lm.model.context import Room, speaking_room
from tasks.lm.model.ends import ends_of
from tasks.lm.model.freezing import blocks_of, freeze_layers
from tasks.lm.model.kinds import is_seq2seq, start_of, warn_of_start
from tasks.lm.model.modes import in_evaluation
from tasks.lm.model.recompute import recompute_blocks
from tasks.lm.numerics.masked import alone, masked_mean
from tasks.lm.numerics.optimizer import check_optimizer, make_optimizer
from tasks.lm.numerics.precision import autocast
from tasks.lm.sampling.generation import Responses, draw_uniforms, generate, row_seeds
from tasks.lm.sampling.steering import Steering
from tasks.ppo.asking import Asked, asked_of
from tasks.ppo.batch import Batch, check_batch, check_tokens
from tasks.ppo.checks import (
    causal_of,
    check_lr_scheduler,
    check_models,
    check_own_optimizer,
    check_value_layers,
    vocabulary_of,
)
from tasks.ppo.config import PPOConfig
from tasks.ppo.first_step import begins_as_reference
from tasks.ppo.first_step import warn_of_start as warn_of_first_step
from tasks.ppo.guard import SpikeGuard
from tasks.ppo.keeping import Kept
from tasks.ppo.kl_control import controller_of
from tasks.ppo.losses import policy_loss, ratio_of, value_loss
from tasks.ppo.rewards import RunningMoments, kl_estimate
from tasks.ppo.rollout import Rollout, observe
from tasks.ppo.statistics import OF_TOKENS, Passes, moments_of, rollout_statistics, token_sums
from tasks.ppo.trackers import make_accelerator, start_trackers
from tasks.ppo.trl_calls import TRLCalls
from tasks.run.devices import derive_seed
from tasks.run.finite import check_weights
from tasks.run.monitor.text import has_ended

AT_START = {  # settings that are followed once, and what to write later instead
    "learning_rate": "the rates in trainer.optimizer.param_groups", "init_kl_coef": "trainer.kl_ctl.value",
    "seed": "trainer.seed", "adap_kl_ctrl": "trainer.kl_ctl", "target": "trainer.kl_ctl.target",
    "horizon": "trainer.kl_ctl.horizon", "ratio_threshold": "trainer.guard.ratio_threshold",
    "spike_factor": "trainer.guard.spike_factor", "max_skipped_steps": "trainer.guard.patience",
    **dict.fromkeys(
        (
            "log_with", "optimizer", "adam_beta2", "weight_decay", "num_layers_unfrozen",
            "num_value_layers_unfrozen", "tracker_kwargs", "accelerator_kwargs", "project_kwargs",
            "tracker_project_name", "push_to_hub_if_best_kwargs", "remove_unused_columns",
        ),
        "",
    ),
}  # fmt: skip
MOST_RETURNS = 8  # to earlier weights, before the training is given up
_log = logging.getLogger(__name__)


class PPOTrainer(Kept, TRLCalls):
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
        tokenizer: gives eos, beside those of the model's configuration, and pad; saved with the model.
        dataset: rows for `dataloader`, which gives batches of `batch_size`, shuffled, without a remainder.
        optimizer: over the model's parameters; None: the one that `config.optimizer` names.
        data_collator: of `dataloader`.
        num_shared_layers: without a `ref_model`: first layers that are frozen and that it shares in memory;
            `config.num_layers_unfrozen` counts from the other end.
        lr_scheduler: of `optimizer`, moved once per step.
        training_data_collator: TRL's, which pads rollouts; refused, for nothing is padded here.
        seed: of sampling and minibatches; None: `config.seed`.
        device: for the models; None: what accelerate chooses.
        microbatch_rows: most rows in one forward; caps memory, changes nothing else.
        trunk_megabytes: most memory for what frozen first layers make of a rollout (H numbers for each
            token), which is kept for all passes over it; a rollout that needs more is read anew in each.

    Raises:
        ValueError: a model of another kind, a tokenizer without eos or pad, a weight that is not finite,
            a reference of another vocabulary or no model, an optimizer of other parameters, batch sizes that
            the processes do not divide, a tracker or an optimizer that is not there, more layers unfrozen or
            shared than there are, weights of the base that learn beside an adapter.
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
        training_data_collator: None = None,
        *,
        seed: int | None = None,
        device: torch.device | str | None = None,
        microbatch_rows: int = 64,
        trunk_megabytes: int = 2048,
    ) -> None:
        self.config = config = PPOConfig() if config is None else config
        if not isinstance(config, PPOConfig):
            raise ValueError(f"config must be a PPOConfig, not {type(config).__name__}")
        if microbatch_rows < 1:
            raise ValueError(f"microbatch_rows is {microbatch_rows}; a forward takes at least one row")
        check_models(model, ref_model, tokenizer)
        check_own_optimizer(optimizer, model)
        check_lr_scheduler(lr_scheduler)
        for name, each in (("model", model), ("ref_model", ref_model)):
            if each is not None:
                check_weights(name, each)
        check_optimizer(config.optimizer, "ppo.optimizer")
        if training_data_collator is not None:
            raise ValueError("training_data_collator: a step pads no responses; nothing is collated")
        config.check()
        check_value_layers(config.num_value_layers_unfrozen, model)
        self.accelerator = make_accelerator(config, device is not None and torch.device(device).type == "cpu")
        self._check_processes()
        self.device = torch.device(device) if device is not None else self.accelerator.device
        self.model, self.tokenizer = model.to(self.device).eval(), tokenizer
        self.ends = ends_of(causal_of(model), tokenizer)  # tokens each of which ends a response
        self.ref_adapters: list[str] = []  # at work in the reference, where there is no ref_model
        self.ref_model = self._reference_of(ref_model, num_shared_layers)
        for served in (self.model, self.ref_model):
            if served is not None:
                take_road(causal_of(served), learns=served is self.model)
        branch = self.model.v_head.branch
        self.hydra = Hydra.of(
            causal_of(self.model),
            None if self.ref_model is None else causal_of(self.ref_model),
            0 if branch is None else len(branch.blocks),
            trunk_megabytes * 2**20,
        )
        self.seed = config.seed if seed is None else seed
        self.microbatch_rows, self.updates, self.draws, self.returns = microbatch_rows, 0, 0, 0
        self.kl_ctl = controller_of(config)
        self.running = RunningMoments(self._total)
        self.guard = SpikeGuard(config.ratio_threshold, config.spike_factor, config.max_skipped_steps)
        self.restore: Callable[[], None] | None = None  # brings the last good state back; a loop sets it
        self.parameters = [p for p in self.model.parameters() if p.requires_grad]
        self.optimizer = optimizer or make_optimizer(
            self.model, config.optimizer, config.learning_rate, config.weight_decay,
            betas=(0.9, config.adam_beta2), key="ppo.optimizer",
        )  # fmt: skip
        self.optimizer.optimizer = self.optimizer  # what accelerate's wrapper, which TRL has here, calls it
        self.lr_scheduler, self.dataset = lr_scheduler, dataset
        self.dataloader = None if dataset is None else self.prepare_dataloader(dataset, data_collator)
        self.push_to_hub_kwargs = config.push_to_hub_if_best_kwargs
        if self.push_to_hub_kwargs and "repo_id" not in self.push_to_hub_kwargs:
            raise ValueError("ppo.push_to_hub_if_best_kwargs: it has no repo_id to push to")
        self.compare_step, self.highest_reward = 0, torch.tensor(-torch.inf, dtype=torch.float64)
        config.world_size, config.is_peft_model = self.accelerator.num_processes, self.model.is_peft_model
        config.is_encoder_decoder = is_seq2seq(causal_of(self.model))
        self._started_with = {name: getattr(config, name) for name in AT_START}
        start_trackers(self.accelerator, config)

    def _check_config(self) -> None:
        """Refuse what was written into the configuration since, where it cannot be followed.

        Raises:
            ValueError: one line that names the key.
        """
        self.config.check()
        for name, value in self._started_with.items():
            if (now := getattr(self.config, name)) != value:
                hint = f"; write {AT_START[name]}" if AT_START[name] else ""
                raise ValueError(f"ppo.{name} is {now!r:.40}, the trainer was made with {value!r:.40}{hint}")
        self._check_processes()

    def _check_processes(self) -> None:
        processes = self.accelerator.num_processes
        for name in ("batch_size", "mini_batch_size"):
            if (size := getattr(self.config, name)) % processes:
                raise ValueError(f"ppo.{name} ({size}) is not a multiple of {processes} processes")

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
        speaker, steering = causal_of(self.model) if model is None else model, None
        if asked.processors or asked.stop_strings:
            before = [[start_of(speaker)]] * len(prompts) if is_seq2seq(speaker) else prompts
            steering = Steering(before, asked.processors, asked.stop_strings, self.tokenizer)
        return generate(
            speaker,
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
            steering=steering,
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
            generation_kwargs: as in transformers (:mod:`tasks.ppo.asking`): `max_new_tokens`,
                `min_new_tokens`, `do_sample` (True unless told otherwise), `temperature` (that of the
                configuration), `top_k` (0 unless told otherwise), `top_p`, `eos_token_id` (one or
                several; −1: never), `num_return_sequences`, `stop_strings`, `repetition_penalty`,
                `no_repeat_ngram_size`, `bad_words_ids`, `logits_processor`, `generation_config`; any
                other one at its default.

        Returns:
            A list of tensors [tokens], cut behind the first eos of the response, those to one prompt side by
            side; a tensor [responses, tokens] where one prompt came. With `generate_ref_response` a pair of
            these.

        Raises:
            ValueError: a 2-D tensor, an empty or too long prompt (names the row), or an argument that this
                sampler does not know.
        """
        is_one = isinstance(query_tensor, Tensor)
        queries = [query_tensor] if is_one else query_tensor
        prompts = check_tokens("query_tensor", queries, self.vocabulary())
        if not prompts:
            raise ValueError("query_tensor is empty; generate needs at least one prompt")
        self._check_config()
        asked, room = self._asked(generation_kwargs, len(prompts), length_sampler), self.room()
        prompts = [prompt for prompt in prompts for _ in range(asked.each)]
        for row, (prompt, most) in enumerate(zip(prompts, asked.max_tokens, strict=True)):
            if not room.holds(len(prompt), most):
                raise ValueError(
                    f"query_tensor[{row // asked.each}] has {len(prompt)} tokens and may get {most} more; "
                    f"the model has room for {room}"
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
            pad = self.tokenizer.pad_token_id
            found = [pad_sequence(rows, batch_first=True, padding_value=pad) for rows in found]
        return tuple(found) if generate_ref_response else found[0]

    def _generated(self, prompts, seeds, rows, model, asked: Asked, return_prompt: bool) -> list[Tensor]:
        responses = self.sample(prompts, seeds, rows, model, asked).lists()
        with_prompt = return_prompt and not is_seq2seq(causal_of(self.model))
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
            yield causal_of(self.ref_model)
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
        self._check_config()
        given = self._step_safety_checker(self.batch_rows, queries, responses, scores, response_masks)
        batch = check_batch(*given, self.batch_rows, self.vocabulary(), self.room())
        warn_of_start(causal_of(self.model), batch.responses)
        seen = self.observe(batch.queries, batch.responses, batch.is_action)
        is_reference = self.updates == 0 and begins_as_reference(self)
        clock.lap("forward_pass")
        paid, price = self.shape(batch), self.kl_ctl.value
        full = {"kl": seen.kl} if self.config.kl_penalty == "full" else {}
        rewards, of_kl, kl = self.compute_rewards(
            paid, seen.logprobs, seen.ref_logprobs, seen.is_action, **full
        )
        clock.lap("compute_rewards")
        values, advantages, returns = self.compute_advantages(seen.values, rewards, seen.is_action)
        seen = replace(seen, kl=kl, values=values)
        clock.lap("compute_advantages")
        passes = self._improve(seen, advantages, returns)
        clock.lap("optimize_step")
        if self.updates == 0:
            warn_of_first_step(self, seen, passes, is_reference)
        each = torch.stack([s.sum() for s in paid]) if isinstance(paid, list) else paid
        stats = rollout_statistics(seen, each, price, batch.queries, self._total) | passes.statistics()
        stats |= {
            "ppo/mean_non_score_reward": masked_mean(of_kl, seen.is_action, self._total).item(),
            "ppo/learning_rate": self.optimizer.param_groups[0]["lr"],
            "ppo/steps_skipped": self.guard.skipped,
        }
        self.kl_ctl.update(stats["objective/kl"], self.config.batch_size)
        if self.lr_scheduler is not None:
            self.lr_scheduler.step()
        self.updates += 1
        if self.guard.is_lost:
            self._return()
        self._push_if_best(each)
        if self.config.optimize_device_cache and self.device.type == "cuda":
            torch.cuda.empty_cache()
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
                    if response and not has_ended(response, self.ends):
                        row[-1] -= config.missing_eos_penalty
            return [row.to(self.device) for row in scores]
        scores = scores.to(self.device) - config.score_baseline
        if config.use_score_scaling:
            if learn:
                self.running.update(scores)
            scores = (scores - (self.running.mean if config.use_score_norm else 0.0)) / self.running.std
        if config.score_clip is not None:
            scores = scores.clamp(-config.score_clip, config.score_clip)
        is_open = [not has_ended(response, self.ends) for response in batch.responses]
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
            if self._early_stop(moved):
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
            loss = self.token_loss(loss, logprobs, entropy, values, seen, advantages, returns)
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
    def batch_rows(self) -> int:
        """Responses of a rollout, of this process."""
        return self.config.batch_size // self.accelerator.num_processes

    @property
    def mini_rows(self) -> int:
        """Responses of a minibatch, of this process."""
        return self.config.mini_batch_size // self.accelerator.num_processes

    @property
    def rank(self) -> int:
        """Of this process."""
        return self.accelerator.process_index

    def vocabulary(self) -> int:
        """Tokens the model can say."""
        return vocabulary_of(self.model)

    def room(self) -> Room:
        """For a prompt and its response."""
        return speaking_room(causal_of(self.model))

    def mean(self, values: Sequence[float]) -> float:
        """Mean over all processes."""
        summed = torch.tensor([sum(values), len(values)], dtype=torch.float64, device=self.device)
        total, count = self._total(summed).tolist()
        return total / max(count, 1)

    # ---- the whole loop

    def train(self, prompts: Sequence, reward_fn: Callable, **keys: Any):
        """`config.total_ppo_epochs` rollouts and updates; see :func:`tasks.ppo.loop.train`."""
        from tasks.ppo.loop import train

        return train(self, prompts, reward_fn, **keys)

    # ---- small things

    def _precision(self):
        return autocast(self.device, self.config.dtype)

    def _asked(self, given: dict[str, Any], rows: int, draw_length: Callable[[], int] | None = None) -> Asked:
        return asked_of(given, self.config, self.ends, self.vocabulary(), rows, draw_length)

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
        causal, unfrozen = causal_of(self.model), self.config.num_layers_unfrozen
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

    def prepare_dataloader(self, dataset: Any, data_collator: Callable | None = None):
        """Batches of `batch_size` over all processes, shuffled by the seed, without a remainder.

        Args:
            dataset: rows; of one of datasets' columns go as `remove_unused_columns` says.
            data_collator: makes a batch of a list of rows; None: torch's.
        """
        draw = torch.Generator().manual_seed(derive_seed(self.seed, "ppo", "dataset"))
        rows = self._remove_unused_columns(dataset) if hasattr(dataset, "remove_columns") else dataset
        loader = torch.utils.data.DataLoader(
            rows, self.batch_rows, shuffle=True, drop_last=True, collate_fn=data_collator, generator=draw
        )
        return self.accelerator.prepare(loader)

    def _remove_unused_columns(self, dataset: Any) -> Any:
        """Without the columns that are no argument of the model and none of label, query and response."""
        if not self.config.remove_unused_columns:
            return dataset
        kept = {*inspect.signature(self.model.forward).parameters, "label", "query", "response"}
        return dataset.remove_columns([name for name in dataset.column_names if name not in kept])


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

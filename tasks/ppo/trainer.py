"""PPOTrainer: (prompts, responses, scores) in, a better policy out."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from params.schema import PPOConfig
from tasks.lm.forest import serve_forest
from tasks.lm.generation import Responses, draw_uniforms, generate, row_seeds
from tasks.lm.masked import masked_mean, masked_var, whiten
from tasks.lm.optimizer import make_optimizer
from tasks.lm.precision import autocast
from tasks.lm.sequences import Sequences, lay_out, read_responses
from tasks.ppo.advantages import gae
from tasks.ppo.losses import policy_loss, value_loss
from tasks.ppo.rewards import KLController, token_rewards
from tasks.ppo.rollout import Rollout, observe


class PPOTrainer:
    """Proximal policy optimisation against scores from anywhere.

    Args:
        config: learning rate, batch sizes, KL price and clip ranges.
        model: AutoModelForCausalLMWithValueHead, trained in place and kept in evaluation mode (no dropout).
        ref_model: a frozen causal language model; KL is measured to it.
        tokenizer: gives eos and pad.
        seed: decides the order of minibatches.
        microbatch_rows: most rows in one forward; caps memory, changes nothing else.
    """

    def __init__(
        self, config: PPOConfig, model, ref_model, tokenizer, seed: int = 0, microbatch_rows: int = 64
    ) -> None:
        self.config, self.model, self.ref_model, self.tokenizer = (
            config,
            model.eval(),
            ref_model.eval(),
            tokenizer,
        )
        for served in (model.pretrained_model, ref_model):
            serve_forest(served)
        self.device = next(model.parameters()).device
        self.microbatch_rows, self.seed, self.updates = microbatch_rows, seed, 0
        self.kl_ctl = KLController(
            config.init_kl_coef, config.target if config.adap_kl_ctrl else None, config.horizon
        )
        self.optimizer = make_optimizer(model.pretrained_model, "adamw", config.learning_rate, 0.0)
        self.optimizer.add_param_group({"params": list(model.v_head.parameters()), "weight_decay": 0.0})

    def generate(self, prompts: Sequence[Sequence[int]], seed: int, rows: int = 512) -> Responses:
        """Sample one response per prompt at `config.temperature`; B lists -> Responses [B, R]."""
        uniforms = draw_uniforms(row_seeds(seed, len(prompts)), self.config.response_tokens)
        return generate(
            self.model.pretrained_model,
            prompts,
            max_tokens=self.config.response_tokens,
            rows=rows,
            eos_id=self.tokenizer.eos_token_id,
            pad_id=self.tokenizer.pad_token_id,
            uniforms=uniforms,
            temperature=self.config.temperature,
            dtype=self.config.dtype,
        )

    def step(
        self, queries: Sequence[Sequence[int]], responses: Sequence[Sequence[int]], scores: Tensor
    ) -> dict[str, float]:
        """One update: `ppo_epochs` passes over one rollout.

        Args:
            queries: B prompts, lists of token ids.
            responses: B responses, eos included where there is one.
            scores: [B], one per response.

        Returns:
            Statistics under TRL's names.

        Raises:
            ValueError: not `batch_size` of each, an empty row, or a score that is not finite (names the row).
        """
        sizes = (len(queries), len(responses), len(scores))
        if any(n != self.config.batch_size for n in sizes):
            raise ValueError(f"step takes ppo.batch_size ({self.config.batch_size}) of each; {sizes} came")
        empty = [i for i, response in enumerate(responses) if len(response) == 0]
        if empty:
            raise ValueError(f"response {empty[0]} is empty; each needs at least one token")
        bad = (~torch.isfinite(scores)).nonzero()
        if len(bad):
            raise ValueError(f"the score of response {int(bad[0])} is not finite")
        seen = self.observe(queries, responses)
        kl, price = seen.kl_nats(), self.kl_ctl.value
        rewards = token_rewards(
            scores.to(self.device).float(), seen.logprobs, seen.ref_logprobs, seen.is_response, price
        )
        advantages, returns = gae(rewards, seen.values, seen.is_response, self.config.gamma, self.config.lam)
        losses = self._improve(seen, whiten(advantages, seen.is_response), returns)
        self.kl_ctl.update(kl.mean().item(), len(queries))
        self.updates += 1
        unexplained = masked_var(returns - seen.values, seen.is_response)
        variance = masked_var(returns, seen.is_response).clamp(min=1e-8)
        return losses | {
            "objective/kl": kl.mean().item(),
            "objective/kl_coef": price,
            "objective/entropy": masked_mean(seen.entropy, seen.is_response).item(),
            "ppo/mean_scores": scores.float().mean().item(),
            "ppo/std_scores": scores.float().std(correction=0).item(),
            "ppo/mean_non_score_reward": (-price * kl / seen.is_response.sum(1)).mean().item(),
            "ppo/val/var_explained": (1 - unexplained / variance).item(),
            "tokens/responses_len_mean": seen.is_response.sum(1).float().mean().item(),
        }

    def observe(self, queries: Sequence[Sequence[int]], responses: Sequence[Sequence[int]]) -> Rollout:
        """What policy, critic and reference think of B responses, before any update."""
        sequences = lay_out(queries, responses, self.tokenizer.pad_token_id, self.device)
        return observe(
            self.model,
            self.ref_model,
            sequences,
            self.config.temperature,
            self.microbatch_rows,
            self._precision,
        )

    def _precision(self):
        return autocast(self.device, self.config.dtype)

    def _improve(self, seen: Rollout, advantages: Tensor, returns: Tensor) -> dict[str, float]:
        """The passes over the rollout.

        One optimizer step per mini_batch_size × gradient_accumulation_steps rows.
        """
        config = self.config
        draw = torch.Generator().manual_seed((self.seed + self.updates) % 2**63)
        totals, tokens, norms = (
            torch.zeros(4),
            0,
            [],
        )  # policy loss, value loss, clipped tokens, KL to the old policy
        for _ in range(config.ppo_epochs):
            order = torch.randperm(config.batch_size, generator=draw).to(self.device)
            for rows in order.split(config.mini_batch_size * config.gradient_accumulation_steps):
                count = int(seen.is_response[rows].sum())
                for part in rows.split(min(config.mini_batch_size, self.microbatch_rows)):
                    old = seen.logprobs[part], seen.values[part]
                    totals += self._backward(
                        seen.sequences.rows(part), *old, advantages[part], returns[part], count
                    )
                norms.append(
                    torch.nn.utils.clip_grad_norm_(self.model.parameters(), config.max_grad_norm).item()
                )
                self.optimizer.step()
                self.optimizer.zero_grad()
                tokens += count
        policy, value, clipped, moved = (totals / tokens).tolist()
        return {
            "ppo/loss/policy": policy,
            "ppo/loss/value": value,
            "ppo/loss/total": policy + config.vf_coef * value,
            "ppo/policy/clipfrac": clipped,
            "ppo/policy/approxkl": moved,
            "ppo/grad_norm": sum(norms) / len(norms),
        }

    def _backward(
        self, sequences: Sequences, old_logprobs, old_values, advantages, returns, count: int
    ) -> Tensor:
        """Gradient of the mean loss over the `count` response tokens of one optimizer step.

        Returns sums [4].
        """
        config, mask = self.config, sequences.is_response
        with self._precision():
            logprobs, _, values = read_responses(self.model, sequences, config.temperature, entropy=False)
        policy, clipped, moved = policy_loss(logprobs, old_logprobs, advantages, mask, config.cliprange)
        value = value_loss(values, old_values, returns, mask, config.cliprange_value)
        ((policy + config.vf_coef * value) / count).backward()
        return torch.stack([policy.detach(), value.detach(), clipped.float(), moved]).cpu()

    def state_dict(self) -> dict[str, Any]:
        """All that the next step depends on: weights, optimizer, KL price, number of updates."""
        return {
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "kl_coef": self.kl_ctl.value,
            "updates": self.updates,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """The inverse of :meth:`state_dict`."""
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.kl_ctl.value, self.updates = state["kl_coef"], state["updates"]

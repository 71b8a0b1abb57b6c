"""The rest of TRL 0.11's PPOTrainer: attributes and methods that its users read, call and override.

What may be overridden is what `step` calls: `_step_safety_checker`, `compute_rewards`, `compute_advantages`,
`_kl_penalty`, `_early_stop`, `token_loss`. What `step` has no use for cannot be overridden in vain: a class
that tries is refused with the sentence that says what to override instead.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.utils.rnn import pad_sequence

from tasks.lm.numerics.masked import masked_mean, masked_var, whiten
from tasks.ppo.advantages import gae
from tasks.ppo.batch import check_batch, read_scores
from tasks.ppo.losses import policy_loss, ratio_of, value_loss
from tasks.ppo.rewards import kl_estimate, token_rewards
from tasks.ppo.rollout import Rollout

OF_THE_LOSS = (
    "step never holds a batch's logits; override token_loss, which is given the loss, log-probability, "
    "entropy and value of each token"
)
OF_THE_FORWARD = "step reads responses without padding; override observe, which a rollout goes through"
OF_THE_HUB = "of huggingface_hub's mixin; save_pretrained and push_to_hub are here"
ELSEWHERE = {  # names of TRL's PPOTrainer that are not here, and what serves instead
    "train_minibatch": (
        "an optimizer step is the mean over its tokens, however they are split; override token_loss for "
        "another loss, or give an optimizer"
    ),
    "record_step_stats": "override step, and add to the statistics that super().step(...) returns",
    "gather_stats": "statistics are over all processes already; override step to add some",
    "_generate_batched": "override sample, which generate and train go through",
    "_filter_kwargs": "nothing filters arguments; what generate does not know it refuses",
    "_prepare_deepspeed": "DeepSpeed is not served; accelerate's data-parallel processes are",
    "_set_signature_columns_if_needed": "override _remove_unused_columns",
    "_signature_columns": "override _remove_unused_columns",
    "from_pretrained": "make a trainer anew, and give load_state_dict what state_dict kept",
    "generate_model_card": "create_model_card writes the card",
    **dict.fromkeys(
        (
            "_from_pretrained", "_decode_arg", "_encode_arg", "_is_jsonable", "_load_as_pickle",
            "_load_as_safetensor", "_hub_mixin_coders", "_hub_mixin_config", "_hub_mixin_info",
            "_hub_mixin_init_parameters", "_hub_mixin_inject_config", "_hub_mixin_jsonable_custom_types",
            "_hub_mixin_jsonable_default_values",
        ),
        OF_THE_HUB,
    ),
}  # fmt: skip
NOT_CALLED = {  # here, to be called; step has no use for them
    "loss": OF_THE_LOSS, "batched_forward_pass": OF_THE_FORWARD, "prepare_model_inputs": OF_THE_FORWARD,
}  # fmt: skip


class TRLCalls:
    """A part of :class:`tasks.ppo.trainer.PPOTrainer`, whose attributes it reads."""

    _tag_names = ("trl", "ppo")
    is_using_text_environment = False

    def __init_subclass__(cls, **keys: Any) -> None:
        super().__init_subclass__(**keys)
        if cls.__module__.startswith("tasks.ppo."):
            return
        for name, instead in (ELSEWHERE | NOT_CALLED).items():
            if name in vars(cls):
                raise TypeError(f"{cls.__name__}.{name} would never be called: {instead}")

    def __getattr__(self, name: str) -> Any:
        if name in ELSEWHERE:
            raise AttributeError(f"PPOTrainer.{name} is not here: {ELSEWHERE[name]}")
        raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")

    # ---- what is read

    @property
    def current_device(self) -> torch.device:
        """Where the models are."""
        return self.device

    @property
    def current_step(self) -> int:
        """Updates so far."""
        return self.updates

    @property
    def is_distributed(self) -> bool:
        """Whether there are several processes."""
        return self.accelerator.num_processes > 1

    @property
    def is_encoder_decoder(self) -> bool:
        """Whether the model has an encoder."""
        return self.config.is_encoder_decoder

    @property
    def is_peft_model(self) -> bool:
        """Whether the model is under an adapter."""
        return self.model.is_peft_model

    @property
    def model_params(self) -> Iterator[nn.Parameter]:
        """What learns."""
        return iter(self.parameters)

    @property
    def optional_peft_ctx(self):
        """Opens a context without the policy's adapter, if any; :meth:`reference` gives the reference."""
        return self.model.pretrained_model.disable_adapter if self.is_peft_model else nullcontext

    @cached_property
    def data_collator(self):
        """What TRL pads rollouts with: transformers' collator for language models. `step` pads nothing."""
        from transformers import DataCollatorForLanguageModeling

        return DataCollatorForLanguageModeling(self.tokenizer, mlm=False)

    # ---- what step calls

    def _step_safety_checker(
        self,
        batch_size: int | None,
        queries: Sequence[Tensor],
        responses: Sequence[Tensor],
        scores: Sequence[Tensor] | Tensor,
        masks: Sequence[Tensor] | None = None,
    ) -> tuple[list[Tensor], list[Tensor], list[Tensor], list[Tensor] | None]:
        """What `step` was given, checked: tensors on the trainer's device, scores without empty dimensions.

        Raises:
            ValueError: as :func:`tasks.ppo.batch.check_batch`.
        """
        size = len(queries) if batch_size is None else batch_size
        batch = check_batch(queries, responses, scores, masks, size, self.vocabulary(), self.room())
        rows = [[self._ids(row) for row in each] for each in (batch.queries, batch.responses)]
        numbers = [score.squeeze().to(self.device) for score in read_scores("scores", scores, size)]
        flags = None if masks is None else [self._ids(row) for row in batch.is_action]
        return *rows, numbers, flags

    def compute_rewards(
        self,
        scores: Tensor | list[Tensor],
        logprobs: Tensor,
        ref_logprobs: Tensor,
        masks: Tensor,
        kl: Tensor | None = None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """A reward for each token, what of it is the price of KL, and KL (nats). [B, R] each.

        Args:
            scores: [B], as they are paid; or B rows of a reward per token.
            logprobs: of the policy, [B, R], of the tokens that were sampled.
            ref_logprobs: of the reference, likewise.
            masks: [B, R]: where the policy chose a token.
            kl: [B, R], where `kl_penalty` is `full`; `step` gives it there, and not else.
        """
        mask = masks.bool()
        kl = self._kl_penalty(logprobs, ref_logprobs) if kl is None else kl
        if isinstance(scores, list) and all(score.dim() == 0 for score in scores):
            scores = torch.stack(scores)
        price = self.kl_ctl.value
        paid = price if self.config.kl_in == "reward" else 0.0
        return token_rewards(scores, kl, mask, paid), -price * kl, kl

    def _kl_penalty(self, logprob: Tensor, ref_logprob: Tensor) -> Tensor:
        """KL of each token as `kl_penalty` estimates it; of `full`, from all log-probabilities [..., V]."""
        if self.config.kl_penalty == "full":
            return functional.kl_div(ref_logprob, logprob, log_target=True, reduction="none").sum(-1)
        return kl_estimate(logprob - ref_logprob, self.config.kl_penalty)

    def compute_advantages(
        self, values: Tensor, rewards: Tensor, mask: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """The old values, whitened advantages, and returns. [B, R] each -> [B, R] each."""
        mask = mask.bool()
        if self.config.whiten_rewards:
            rewards = whiten(rewards, mask, self._total, shift_mean=False)
        advantages, returns = gae(rewards, values, mask, self.config.gamma, self.config.lam)
        return values, whiten(advantages, mask, self._total), returns

    def token_loss(
        self,
        loss: Tensor,
        logprobs: Tensor,
        entropy: Tensor,
        values: Tensor,
        seen: Rollout,
        advantages: Tensor,
        returns: Tensor,
    ) -> Tensor:
        """What is learnt from each token, [B, R]; its mean over the tokens of an optimizer step is minimised.

        Override it to add to `loss`, an entropy bonus for instance: `return loss - 0.01 * entropy`.

        Args:
            loss: policy, value and KL loss of each token.
            logprobs: of the policy as it is now, with gradients; so are `entropy` and `values`.
            entropy: nats.
            values: score units.
            seen: the same responses before the update, with their mask.
            advantages: whitened.
            returns: score units.
        """
        return loss

    def _early_stop(self, policykl: float) -> bool:
        """Whether the passes end here: |KL| to the old policy exceeds `target_kl` by half."""
        return self.config.early_stopping and abs(policykl) > 1.5 * self.config.target_kl

    # ---- what scripts call, and step does not

    def prepare_model_inputs(
        self, queries: Sequence[Tensor], responses: Sequence[Tensor]
    ) -> dict[str, Tensor]:
        """Queries and responses in rows padded on the right: `input_ids` and `attention_mask`, [B, S].

        Raises:
            ValueError: the model has an encoder, which reads queries apart.
        """
        if self.is_encoder_decoder:
            raise ValueError("prepare_model_inputs: the model has an encoder; use observe")
        rows = [torch.cat([self._ids(q), self._ids(r)]) for q, r in zip(queries, responses, strict=True)]
        pad = self.tokenizer.pad_token_id
        mask = pad_sequence([torch.ones_like(row) for row in rows], batch_first=True)
        return {"input_ids": pad_sequence(rows, True, pad), "attention_mask": mask}

    def batched_forward_pass(
        self,
        model: nn.Module,
        queries: Sequence[Tensor],
        responses: Sequence[Tensor],
        model_inputs: dict[str, Tensor],
        return_logits: bool = False,
        response_masks: Sequence[Tensor] | None = None,
    ) -> tuple[Tensor, Tensor | None, Tensor, Tensor]:
        """Log-probabilities, logits where wanted, values, and which places predict a response token.

        [B, S − 1] each, logits [B, S − 1, V]; at `temperature`, by plain forwards of `mini_batch_size` rows.

        Args:
            model: with a value head.
            queries: B rows.
            responses: B rows.
            model_inputs: as :meth:`prepare_model_inputs` makes them, padded on either side.
            return_logits: whether logits are kept.
            response_masks: as for `step`.
        """
        ids, is_real = model_inputs["input_ids"], model_inputs["attention_mask"]
        found = []
        for part in torch.arange(len(ids), device=ids.device).split(self.config.mini_batch_size):
            logits, _, values = model(**{name: rows[part] for name, rows in model_inputs.items()})
            logits = logits[:, :-1] / self.config.temperature
            logprobs = logits.log_softmax(-1).gather(-1, ids[part, 1:, None])[..., 0]
            found.append((logprobs, values[:, :-1], *([logits] if return_logits else [])))
        logprobs, values, *logits = (torch.cat(each) for each in zip(*found, strict=True))
        masks = torch.zeros_like(is_real[:, :-1])
        for row, (query, response) in enumerate(zip(queries, responses, strict=True)):
            first = int(is_real[row].argmax()) + len(query) - 1
            flags = torch.ones(len(response)) if response_masks is None else response_masks[row]
            masks[row, first : first + len(response)] = torch.as_tensor(flags).to(masks)
        return logprobs, logits[0] if logits else None, values, masks

    def loss(
        self,
        old_logprobs: Tensor,
        values: Tensor,
        logits: Tensor,
        vpreds: Tensor,
        logprobs: Tensor,
        mask: Tensor,
        advantages: Tensor,
        returns: Tensor,
    ) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
        """The mean policy loss and the weighted mean value loss of some rows, and TRL's statistics of them.

        All [B, R] (or [B, S − 1]), logits [B, R, V]. A step's own losses are the same formulas.
        """
        mask = mask.bool()
        ratio = ratio_of(logprobs, old_logprobs, mask)
        policy, is_clipped = policy_loss(ratio, advantages, self.config.cliprange)
        value, is_value_clipped = value_loss(vpreds, values, returns, self.config.cliprange_value)
        policy, value = masked_mean(policy, mask), masked_mean(value, mask)
        surprise = torch.distributions.Categorical(logits=logits.detach()).entropy()
        means = {
            "policy/entropy": surprise, "policy/approxkl": 0.5 * (logprobs - old_logprobs) ** 2,
            "policy/policykl": old_logprobs - logprobs, "policy/clipfrac": is_clipped.float(),
            "policy/advantages_mean": advantages, "returns/mean": returns, "val/vpred": vpreds,
            "val/error": (vpreds - returns) ** 2, "val/clipfrac": is_value_clipped.float(),
            "val/mean": values,
        }  # fmt: skip
        stats = {name: masked_mean(each, mask).detach() for name, each in means.items()}
        stats |= {"returns/var": masked_var(returns, mask), "val/var": masked_var(values, mask)}
        weighted = self.config.vf_coef * value
        stats |= {"loss/policy": policy.detach(), "loss/value": value.detach()}
        stats |= {"loss/total": (policy + weighted).detach(), "policy/ratio": ratio.detach()}
        return policy, weighted, stats | {"policy/advantages": advantages.detach()}

    def _show_tokens(self, tokens: Sequence[int], masks: Sequence[int]) -> None:
        """Print a row, what its mask leaves out in brackets."""
        shown = [self.tokenizer.decode([int(token)]) for token in tokens]
        print(" ".join(text if flag else f"[{text}]" for text, flag in zip(shown, masks, strict=True)))

    def _ids(self, row: Any) -> Tensor:
        return torch.as_tensor(row, dtype=torch.long, device=self.device)

"""Language models with a scalar output for every token; the API is that of TRL 0.11."""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Self

import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoModelForSeq2SeqLM

from tasks.lm.adapters.lora import add_adapter, has_adapter
from tasks.lm.heads.policy_files import (
    load_policy,
    read_value_head,
    save_policy,
    saved_reward_adapter,
    warn_of_pickle,
)
from tasks.lm.heads.reward_adapter import REWARD, ScoredByAdapter, load_reward_adapter
from tasks.lm.heads.trl_names import TRLNames, as_peft_config
from tasks.lm.heads.value_branch import ValueBranch, ValueHead, branch_layers
from tasks.lm.logprobs.lm_head import check_causal
from tasks.lm.logprobs.roads import mask_keys
from tasks.lm.logprobs.seq2seq import check_seq2seq
from tasks.lm.model.hooks import calls_of, states_of
from tasks.lm.model.hub import VALUE_HEAD
from tasks.lm.model.kinds import unwrapped
from tasks.lm.model.loading import load_causal, load_seq2seq
from tasks.run.finite import check_weights

_log = logging.getLogger(__name__)


class ModelWithValueHead(ScoredByAdapter, TRLNames):
    """`pretrained_model` with a `v_head`; the forward returns (logits, loss, values).

    What there is for a model of each kind: :class:`AutoModelForCausalLMWithValueHead` and
    :class:`AutoModelForSeq2SeqLMWithValueHead`.

    Args:
        pretrained_model: a language model of transformers of that kind, bare or under PEFT.
        v_head_init_strategy: see :class:`tasks.lm.heads.value_branch.ValueHead`.
        v_head_initializer_range: likewise.
        summary_dropout_prob: likewise; None: the configuration's, or 0.
        num_value_layers_unfrozen: k: the head reads copies of the last k blocks, which the policy's losses
            leave alone (:class:`tasks.lm.heads.value_branch.ValueBranch`); 0: the model's last states.

    Raises:
        ValueError: a model of another kind, an adapter that is not served, an unknown strategy, or a k
            that the model has not.
    """

    check: Callable[[nn.Module], None]  # refuses a model of another kind
    load: Callable[..., nn.Module]  # from a folder or the Hub

    def __init__(
        self,
        pretrained_model: nn.Module,
        *,
        v_head_init_strategy: str | None = "zeros",
        v_head_initializer_range: float = 0.2,
        summary_dropout_prob: float | None = None,
        num_value_layers_unfrozen: int = 0,
    ) -> None:
        super().__init__()
        self.check(pretrained_model)
        self.pretrained_model, self.config = pretrained_model, pretrained_model.config
        self.is_peft_model = has_adapter(pretrained_model)
        if summary_dropout_prob is None:
            summary_dropout_prob = getattr(self.config, "summary_dropout_prob", None) or 0.0
        k, bare = num_value_layers_unfrozen, unwrapped(pretrained_model)
        embeddings = bare.get_output_embeddings().weight
        self.v_head = ValueHead(
            embeddings.shape[1],  # not always the hidden size: OPT-350m projects its states
            v_head_init_strategy,
            v_head_initializer_range,
            summary_dropout_prob,
            ValueBranch(pretrained_model, k) if k else None,
        )
        self.v_head.to(embeddings.device).train(bare.training)
        self.training = bare.training

    @classmethod
    def from_pretrained(
        cls,
        pretrained_model_name_or_path: str | Path | nn.Module,
        *,
        peft_config=None,
        reward_adapter: str | Path | None = None,
        reward_adapter_name: str = REWARD,
        revision: str = "main",
        dtype: torch.dtype | str | None = None,
        torch_dtype: torch.dtype | str | None = None,
        is_trainable: bool = True,
        token: str | bool | None = None,
        num_value_layers_unfrozen: int | None = None,
        use_safetensors: bool | None = None,
        **keys: Any,
    ) -> Self:
        """A model with the value head that was saved with it, or with a fresh one.

        Args:
            pretrained_model_name_or_path: the base: a model of transformers or PEFT; or a folder or Hub id,
                of a model or of an adapter whose configuration names its model.
            peft_config: of an adapter to put on, or a mapping with its `peft_type`; one that the folder
                `base` holds is frozen below it.
            reward_adapter: folder or Hub id of an adapter with a score head that was trained on the same
                base (:meth:`compute_reward_score`); None: the one that was saved with the policy.
            reward_adapter_name: what it is called beside the policy's.
            revision: on the Hub, of `base`.
            dtype: of the language model's weights; float32 where None. The head's are float32.
            torch_dtype: the same by its older name.
            is_trainable: whether an adapter that `base` holds is trained further.
            token: for the Hub.
            num_value_layers_unfrozen: as for the class; None: as many as were saved.
            use_safetensors: True whatever is said, for a pickle is never read; False is noted in the log.
            keys: the others of the class, or for transformers' `from_pretrained`; `load_in_8bit=True`,
                `load_in_4bit=True` or a `quantization_config` quantise the base.

        Raises:
            ValueError: nothing to load there, a saved head that does not fit, an adapter on an adapter of a
                model object, a key for loading beside one, a reward adapter of another base or without a
                score head, a quantised base where none can run; and as the class.
        """
        if taken := sorted(keys.keys() & {"key", "load"}):  # words of the loaders below
            raise ValueError(f"{taken[0]}: no argument of from_pretrained")
        base, peft_config = pretrained_model_name_or_path, as_peft_config(peft_config)
        if use_safetensors is False:
            _log.warning("use_safetensors=False: safetensors are read all the same, and a pickle never is")
        own = {name: keys.pop(name) for name in cls.__init__.__kwdefaults__ if name in keys}
        dtype = torch_dtype if dtype is None else dtype
        if isinstance(base, nn.Module):
            if keys or dtype is not None:
                given = ", ".join([*keys, *(["dtype"] if dtype is not None else [])])
                raise ValueError(f"{given}: for loading, but base is a {type(base).__name__} already")
            model, saved, found = base, {}, None
            if peft_config is not None:
                model = add_adapter(model, config=peft_config)
        else:
            there = {"revision": revision, "token": token}
            given = {"load": cls.load, "peft_config": peft_config, "dtype": dtype}
            model = load_policy(base, is_trainable, **given, **there, **keys)
            found = saved_reward_adapter(base, **there)
            saved = read_value_head(base, **there)
            if not saved:
                warn_of_pickle(base, **there)
        layers = branch_layers(saved)
        k = layers if num_value_layers_unfrozen is None else num_value_layers_unfrozen
        if layers not in (0, k):
            raise ValueError(f"num_value_layers_unfrozen is {k}; {base} holds a value branch of {layers}")
        wrapped = cls(model, num_value_layers_unfrozen=k, **own)
        if saved:
            wrapped.v_head.load_saved(saved)
        if reward_adapter is not None:
            found = load_reward_adapter(reward_adapter, token), reward_adapter_name
        if found is not None:
            wrapped.take_reward_adapter(*found)
        return wrapped

    def take_merged(self, model: nn.Module) -> None:
        """Stand over `model` from now on, into which the adapter was merged (tasks.lm.adapters)."""
        self.pretrained_model, self.config = model, model.config
        self.is_peft_model, self.rm_adapter_name, self.score = has_adapter(model), None, None

    def save_pretrained(self, folder: str | Path, **keys: Any) -> None:
        """A plain transformers folder (under PEFT, the adapter's), with the value head in a file of its own.

        Args:
            folder: made where it is missing.
            keys: for the language model's `save_pretrained`, for example `max_shard_size`.

        Raises:
            ValueError: a weight that is not finite; nothing is written.
        """
        check_weights("the model is not saved", self)
        save_policy(self, folder, **keys)
        save_file({k: v.contiguous() for k, v in self.v_head.state_dict().items()}, Path(folder) / VALUE_HEAD)

    def push_to_hub(
        self,
        repo_id: str,
        private: bool | None = None,
        token: str | bool | None = None,
        commit_message: str | None = None,
        **keys: Any,
    ):
        """What :meth:`save_pretrained` writes, as one commit to a repository, made where it is missing.

        Args:
            repo_id: `name` or `owner/name`.
            private: whether a new repository is; None: as its owner's are.
            token: of one who may write there.
            commit_message: of the commit.
            keys: for :meth:`save_pretrained`.

        Returns:
            huggingface_hub's `CommitInfo`.
        """
        from huggingface_hub import HfApi

        api = HfApi(token=token)
        with TemporaryDirectory() as folder:
            self.save_pretrained(folder, **keys)
            name = api.create_repo(repo_id, private=private, exist_ok=True).repo_id
            return api.upload_folder(repo_id=name, folder_path=folder, commit_message=commit_message)

    def forward(
        self,
        input_ids: Tensor | None = None,
        past_key_values=None,
        attention_mask: Tensor | None = None,
        return_past_key_values: bool = False,
        **keys: Any,
    ) -> tuple:
        """Tokens [B, S] -> logits [B, S, V] float32, loss where `labels` come, values [B, S] float32.

        With an encoder these are sources [B, S]; logits [B, R, V] and values [B, R] belong to the places of
        the decoder, which reads `decoder_input_ids` [B, R], or `labels` behind the start token.

        Args:
            input_ids: tokens [B, S].
            past_key_values: a cache of the tokens before these.
            attention_mask: [B, S], with those of the cache before; positions count its ones.
            return_past_key_values: whether the cache is wanted, as a fourth output.
            keys: for the language model.

        Raises:
            ValueError: a cache, where the value head has blocks of its own.
        """
        branch, is_cached = self.v_head.branch, return_past_key_values or past_key_values is not None
        if is_cached and branch is not None:
            raise ValueError("past_key_values: a value branch keeps no cache; it needs the whole sequences")
        blocks = [] if branch is None else branch.originals(self.pretrained_model)
        places = self._positions(input_ids, attention_mask)  # which may try the model, unseen by the hooks
        with calls_of(blocks) as calls, states_of(self.pretrained_model) as states:
            out = self.pretrained_model(
                input_ids=input_ids,
                past_key_values=past_key_values,
                attention_mask=attention_mask,
                **{"use_cache": is_cached, **places, **keys},
            )
        values = self.v_head(states[0] if branch is None else branch(calls))
        outputs = out.logits.float(), out.loss, values
        return (*outputs, out.past_key_values) if return_past_key_values else outputs

    def _positions(self, input_ids: Tensor | None, attention_mask: Tensor | None) -> dict[str, Tensor]:
        """`position_ids` that skip padding, where the model takes some."""
        return {}

    def generate(self, *args, **keys):
        """The language model's own `generate`."""
        return self.pretrained_model.generate(*args, **keys)

    def gradient_checkpointing_enable(self, *args, **keys) -> None:
        """The language model's; blocks of the value head's own follow it."""
        self.pretrained_model.gradient_checkpointing_enable(*args, **keys)

    def gradient_checkpointing_disable(self) -> None:
        """Likewise."""
        self.pretrained_model.gradient_checkpointing_disable()


class AutoModelForCausalLMWithValueHead(ModelWithValueHead):
    """A causal language model with a value head, which reads what the output embeddings read.

    Arguments, forward and errors as of :class:`ModelWithValueHead`.
    """

    check, load = staticmethod(check_causal), staticmethod(load_causal)
    transformers_parent_class = AutoModelForCausalLM

    def _positions(self, input_ids: Tensor | None, attention_mask: Tensor | None) -> dict[str, Tensor]:
        if input_ids is None or attention_mask is None or attention_mask.ndim != 2:
            return {}
        keys = mask_keys(self.pretrained_model, attention_mask)
        return {name: places[:, -input_ids.shape[1] :] for name, places in keys.items()}


class AutoModelForSeq2SeqLMWithValueHead(ModelWithValueHead):
    """An encoder-decoder (T5, BART, …) with a value head, which reads what the decoder gives.

    Arguments, forward and errors as of :class:`ModelWithValueHead`.
    """

    check, load = staticmethod(check_seq2seq), staticmethod(load_seq2seq)
    transformers_parent_class = AutoModelForSeq2SeqLM

"""What TRL 0.11's users read of a model with a value head, beside what it does."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Self

import torch
from torch import Tensor, nn

ELSEWHERE = {  # names of TRL's value-head models that are not here, and what serves instead
    "_init_weights": "give v_head_init_strategy and v_head_initializer_range to from_pretrained",
    "_split_kwargs": "from_pretrained takes the head's arguments by name and hands the rest to transformers",
    "_get_checkpoint_from_hub": "from_pretrained reads the saved head, of a folder or of the Hub",
    "_get_current_device": "device is where the model is",
    "_has_lm_head": "a model without output embeddings is refused when it is wrapped",
    "add_and_load_reward_modeling_adapter": "give reward_adapter to from_pretrained",
}
FIXED = {  # read here, and overridden in vain
    "transformers_parent_class": "override load, which makes the language model",
    "lm_head_namings": "the head is what get_output_embeddings gives, whatever its name",
    "supported_args": "from_pretrained's own arguments are those of __init__",
}


class TRLNames(nn.Module):
    """A part of :class:`tasks.lm.heads.value_head.ModelWithValueHead`, whose attributes it reads."""

    pretrained_model: nn.Module
    lm_head_namings = ("lm_head", "embed_out", "output_projection")
    supported_args = (
        "summary_dropout_prob", "v_head_initializer_range", "v_head_init_strategy",
        "num_value_layers_unfrozen",
    )  # fmt: skip
    supported_modules, supported_rm_modules = ("v_head",), ("score",)
    policy_adapter_name = "default"
    is_sequential_parallel = False

    def __init_subclass__(cls, **keys: Any) -> None:
        super().__init_subclass__(**keys)
        if cls.__module__.startswith("tasks.lm."):
            return
        for name, instead in (ELSEWHERE | FIXED).items():
            if name in vars(cls):
                raise TypeError(f"{cls.__name__}.{name} would never be asked for: {instead}")

    def __getattr__(self, name: str) -> Any:
        if name in ELSEWHERE:
            raise AttributeError(f"{type(self).__name__}.{name} is not here: {ELSEWHERE[name]}")
        return super().__getattr__(name)

    @classmethod
    def from_config(cls, config: Any, **keys: Any) -> Self:
        """A model made from nothing, of transformers' configuration.

        Args:
            config: of a model of this kind.
            keys: as for the class.
        """
        return cls(cls.transformers_parent_class.from_config(config), **keys)

    @property
    def device(self) -> torch.device:
        """Where the language model is."""
        return next(self.pretrained_model.parameters()).device

    @property
    def current_device(self) -> torch.device:
        """The same."""
        return self.device

    @property
    def dtype(self) -> torch.dtype:
        """Of the language model's weights."""
        return self.pretrained_model.dtype

    @property
    def generation_config(self) -> Any:
        """The language model's, which its own `generate` goes by."""
        return self.pretrained_model.generation_config

    @generation_config.setter
    def generation_config(self, config: Any) -> None:
        self.pretrained_model.generation_config = config

    @property
    def is_loaded_in_8bit(self) -> bool:
        """Whether the base is quantised to 8 bits."""
        return bool(getattr(self.pretrained_model, "is_loaded_in_8bit", False))

    @property
    def is_loaded_in_4bit(self) -> bool:
        """Whether the base is quantised to 4 bits."""
        return bool(getattr(self.pretrained_model, "is_loaded_in_4bit", False))

    @property
    def supported_pretrained_model_architectures(self) -> tuple[type, ...]:
        """What may be wrapped."""
        from peft import PeftModel
        from transformers import PreTrainedModel

        return PreTrainedModel, PeftModel

    @property
    def prepare_inputs_for_generation(self):
        """The language model's."""
        return self.pretrained_model.prepare_inputs_for_generation

    def get_input_embeddings(self) -> nn.Module:
        """The language model's."""
        return self.pretrained_model.get_input_embeddings()

    def get_output_embeddings(self) -> nn.Module:
        """The language model's."""
        return self.pretrained_model.get_output_embeddings()

    def resize_token_embeddings(self, *args: Any, **keys: Any) -> nn.Module:
        """The language model's, for a tokenizer that has grown; before a trainer is made."""
        return self.pretrained_model.resize_token_embeddings(*args, **keys)

    def enable_input_require_grads(self) -> None:
        """The language model's."""
        self.pretrained_model.enable_input_require_grads()

    def post_init(self, state_dict: Mapping[str, Tensor]) -> None:
        """Take the value head of a whole state: its keys `v_head.…`; others are left alone."""
        own = {k.removeprefix("v_head."): v for k, v in state_dict.items() if k.startswith("v_head.")}
        self.v_head.load_state_dict(own)


def as_peft_config(given: Any) -> Any:
    """A PeftConfig; of a mapping, as trlX takes it, the one that its `peft_type` names.

    Raises:
        ValueError: a mapping that peft refuses, or nothing of peft's.
    """
    from peft import PeftConfig, get_peft_config

    if given is None or isinstance(given, PeftConfig):
        return given
    if not isinstance(given, Mapping):
        raise ValueError(f"peft_config must be a PeftConfig or a mapping, not {type(given).__name__}")
    if "peft_type" not in given:
        raise ValueError("peft_config: it has no peft_type, LORA for instance")
    try:
        return get_peft_config(dict(given))
    except (TypeError, ValueError, KeyError) as error:
        raise ValueError(f"peft_config: {' '.join(str(error).split())}") from None

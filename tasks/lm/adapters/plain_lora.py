"""An adapter that has cut a part out of its base, as a plain LoRA adapter over the base as it was.

PiSSA (arXiv 2404.02948) and OLoRA (arXiv 2406.01775) begin with s·B₀A₀, which they take from the base:
W = W′ + s·B₀A₀. What was learnt is s·(BA − B₀A₀), of twice the rank, and stands on W itself. A file holds A
and B; A₀ and B₀ follow from W.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from copy import deepcopy
from typing import Any

import torch
from torch import Tensor, nn

from tasks.lm.adapters.kinds import rewrites


@torch.no_grad()
def plain_lora(model: nn.Module, config: Any, tensors: Mapping[str, Tensor]) -> tuple[Any, dict[str, Tensor]]:
    """Configuration and tensors of the plain adapter; of twice the rank.

    Args:
        model: that it is to sit on, bare or under other adapters; unchanged. A copy is made for as long as
            this takes.
        config: peft's, of an initialisation that the same base gives again.
        tensors: as peft names them in its file.

    Raises:
        ValueError: the base is one that this initialisation cannot read.
    """
    from peft import get_peft_model, get_peft_model_state_dict

    twin = deepcopy(model)
    twin = twin.unload() if hasattr(twin, "peft_config") else twin
    try:
        with torch.random.fork_rng(devices=[]):
            first = get_peft_model(twin, deepcopy(config))
    except (TypeError, RuntimeError) as error:
        raise ValueError(
            f"init_lora_weights={rewrites(config)!r} cannot be worked out on this base: "
            f"{' '.join(str(error).split())}; save the adapter with path_initial_model_for_weight_conversion"
        ) from error
    began = get_peft_model_state_dict(first, adapter_name="default", save_embedding_layers=False)
    return _doubled(config), {name: _beside(name, value, began) for name, value in tensors.items()}


def _beside(name: str, value: Tensor, began: Mapping[str, Tensor]) -> Tensor:
    """A over A₀ [2r, in], B beside −B₀ [out, 2r]; anything else as it is."""
    for part, axis, sign in (("lora_A", 0, 1), ("lora_B", 1, -1)):
        if part in name.split(".") or part.replace("lora", "lora_embedding") in name.split("."):
            return torch.cat([value, sign * began[name].to(value)], axis)
    return value


def _doubled(config: Any) -> Any:
    """Twice the rank at the same scale, and no initialisation that would touch the base."""
    config = deepcopy(config)
    grow = math.sqrt(2) if config.use_rslora else 2  # s = alpha / sqrt(r), or alpha / r
    config.r, config.lora_alpha, config.init_lora_weights = 2 * config.r, grow * config.lora_alpha, True
    config.rank_pattern = {name: 2 * rank for name, rank in (config.rank_pattern or {}).items()}
    config.alpha_pattern = {name: grow * alpha for name, alpha in (config.alpha_pattern or {}).items()}
    return config

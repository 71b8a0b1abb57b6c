"""Whole weights from processes that hold a share each (FSDP, DeepSpeed ZeRO-3)."""

from __future__ import annotations

from copy import deepcopy

from accelerate import Accelerator
from accelerate.utils import DistributedType
from torch import nn
from torch.distributed.fsdp import FSDPModule

SHARDED = (DistributedType.FSDP, DistributedType.DEEPSPEED)


def whole_model(accelerator: Accelerator, wrapped: nn.Module) -> nn.Module | None:
    """The model without what accelerate wraps around it; of sharded weights a plain copy on rank 0's CPU.

    All processes must call it together. The copy takes the model's weights in main memory twice over.

    Args:
        accelerator: that prepared the model.
        wrapped: a transformers model, or one of peft's around it.

    Returns:
        None on the other ranks of a sharded training, which cannot do anything with it.
    """
    # without autocast too, or a merged model would be compared with an adapter in bfloat16
    model = accelerator.unwrap_model(wrapped, keep_fp32_wrapper=False, keep_torch_compile=False)
    if accelerator.distributed_type not in SHARDED:
        return model
    state = accelerator.get_state_dict(wrapped)
    if not accelerator.is_main_process:
        return None
    twin = _twin(model)
    twin.load_state_dict(state)
    return twin.eval()


def _twin(model: nn.Module) -> nn.Module:
    """A model of the same shape, with weights of its own."""
    if not hasattr(model, "get_base_model"):
        return _plain_twin(model)
    from peft import get_peft_model

    (config,) = model.peft_config.values()
    return get_peft_model(_plain_twin(model.get_base_model()), deepcopy(config))


def _plain_twin(model: nn.Module) -> nn.Module:
    kind = next(kind for kind in type(model).__mro__ if not issubclass(kind, FSDPModule))
    twin = kind(deepcopy(model.config))
    if hasattr(model, "generation_config"):
        twin.generation_config = model.generation_config
    return twin

"""A base model in 8 or 4 bits, through bitsandbytes: asked for by name, refused where it cannot run."""

from __future__ import annotations

from importlib.util import find_spec
from typing import Any

import torch
from torch import nn

from tasks.lm.model.kinds import unwrapped

PLAIN = ("lm_head", "embed_out", "score", "classifier")  # heads, which stay what they are


def check_bitsandbytes(what: str, instead: str) -> None:
    """Refuse, before anything is loaded, what only bitsandbytes on a GPU can do.

    Args:
        what: key or argument and its value, for the message.
        instead: what to do without them.

    Raises:
        ValueError: bitsandbytes is not installed, or there is no GPU.
    """
    if not torch.cuda.is_available():
        raise ValueError(f"{what} needs a GPU, and there is only a CPU; {instead}")
    if find_spec("bitsandbytes") is None:
        raise ValueError(f"{what} needs bitsandbytes, which is not installed: pip install it, or {instead}")


def quantized_keys(kind: str, key: str = "model.quantize") -> dict[str, Any]:
    """What transformers' `from_pretrained` needs for a base of this kind; nothing where it is `none`.

    Args:
        kind: `none`, `8bit` (LLM.int8, arXiv 2208.07339) or `4bit` (NF4, arXiv 2305.14314).
        key: names it in messages.

    Raises:
        ValueError: another kind, or bitsandbytes or a GPU are missing.
    """
    if kind == "none":
        return {}
    if kind not in ("8bit", "4bit"):
        raise ValueError(f"{key} is {kind!r}; none, 8bit or 4bit is wanted")
    check_bitsandbytes(f"{key}: a quantised base ({kind})", f"set {key} to none, or train where there is one")
    from transformers import BitsAndBytesConfig

    half = torch.bfloat16 if torch.cuda.is_bf16_supported() else torch.float16
    nf4 = {
        "bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True, "bnb_4bit_compute_dtype": half
    }  # fmt: skip
    of_kind = {"load_in_8bit": True} if kind == "8bit" else {"load_in_4bit": True, **nf4}
    config = BitsAndBytesConfig(llm_int8_skip_modules=list(PLAIN), **of_kind)
    return {"quantization_config": config, "device_map": {"": torch.cuda.current_device()}}


def read_quantized(keys: dict[str, Any]) -> dict[str, Any]:
    """A caller's keys for `from_pretrained`: TRL's `load_in_8bit` and `load_in_4bit` in today's words.

    Raises:
        ValueError: both at once or beside a `quantization_config`; bitsandbytes or a GPU are missing.
    """
    keys = dict(keys)
    asked = [name for name in ("load_in_8bit", "load_in_4bit") if keys.pop(name, False)]
    given = keys.pop("quantization_config", None)
    if len(asked) + (given is not None) > 1:
        raise ValueError(f"{', '.join(asked)}: only one way to quantise the base can be asked for")
    instead = "load it in float32, or with dtype=torch.bfloat16"
    if asked:
        kind = asked[0].removeprefix("load_in_")
        check_bitsandbytes(f"{asked[0]}: a quantised base", instead)
        return {**quantized_keys(kind, asked[0]), **keys}
    if given is None:
        return keys
    if not torch.cuda.is_available():
        raise ValueError(
            f"quantization_config: a quantised base needs a GPU, and there is only a CPU; {instead}"
        )
    return {"quantization_config": given, "device_map": {"": torch.cuda.current_device()}, **keys}


def is_quantized(model: nn.Module) -> bool:
    """Whether the weights of a model, bare or under PEFT, are quantised."""
    return getattr(unwrapped(model), "hf_quantizer", None) is not None

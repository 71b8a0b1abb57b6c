"""The generation arguments of transformers that a rollout understands."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from tasks.ppo.config import PPOConfig

IGNORED = {"num_beams": 1, "num_return_sequences": 1, "repetition_penalty": 1.0, "use_cache": True,
           "typical_p": 1.0, "remove_padding": True, "pad_to_multiple_of": None, "pad_token_id": ...,
           "bos_token_id": ..., "synced_gpus": ...}  # fmt: skip
_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Asked:
    """How to sample B responses."""

    max_tokens: Sequence[int]  # [B]
    eos_id: int | None  # None: no token ends a response
    do_sample: bool
    top_k: int  # 0: all
    top_p: float
    min_tokens: int  # eos has no chance before


def asked_of(
    given: dict[str, Any],
    config: PPOConfig,
    eos_id: int,
    vocabulary: int,
    rows: int,
    lengths: Sequence[int] | None = None,
) -> Asked:
    """Generation arguments as transformers names them, for so many rows.

    Args:
        given: the arguments.
        config: its temperature is the only one: `step` computes log-probabilities at it.
        eos_id: of the tokenizer; `eos_token_id` overrides it.
        vocabulary: tokens; an eos outside it never comes.
        rows: B.
        lengths: most new tokens of each row; None: `max_new_tokens`, else `response_tokens`.

    Raises:
        ValueError: an argument that is unknown, or asks for something other than sampling from the policy.
    """
    left = dict(given)
    most = left.pop("max_new_tokens", None)
    for name in ("max_length", "min_length"):
        if (left.pop(name, None) or 0) > 0:
            new = name.replace("length", "new_tokens")
            raise ValueError(f"generate: give {new}; {name} counts the prompt, which differs by row")
    most = config.response_tokens if most is None else most
    eos_id = left.pop("eos_token_id", eos_id)
    if isinstance(eos_id, list | tuple) and len(eos_id) == 1:
        eos_id = eos_id[0]
    if not isinstance(eos_id, int | None):
        raise ValueError(f"generate: eos_token_id must be one token, not {eos_id!r}")
    temperature = left.pop("temperature", config.temperature)
    if temperature != config.temperature:
        raise ValueError(
            f"generate: temperature is {temperature}, but step takes its log-probabilities at "
            f"ppo.temperature, {config.temperature}; set it there"
        )
    asked = Asked(
        max_tokens=list(lengths) if lengths is not None else [most] * rows,
        eos_id=eos_id if eos_id is not None and 0 <= eos_id < vocabulary else None,
        do_sample=bool(left.pop("do_sample", True)),
        top_k=int(left.pop("top_k", 0) or 0),
        top_p=float(left.pop("top_p", 1.0) or 1.0),
        min_tokens=max(int(left.pop("min_new_tokens", 0) or 0), 0),
    )
    for name, value in left.items():
        if name not in IGNORED or IGNORED[name] not in (..., value):
            raise ValueError(f"generate: {name}={value!r} is not known to this sampler")
    if min(asked.max_tokens, default=1) < 1:
        raise ValueError(f"generate: a response needs at least one new token, not {min(asked.max_tokens)}")
    if asked.do_sample and (asked.top_k or asked.top_p < 1 or asked.min_tokens):
        _log.warning(
            "generate: top_k, top_p and min_new_tokens sample from another distribution than the one that "
            "step takes log-probabilities from; KL may become negative"
        )
    return asked

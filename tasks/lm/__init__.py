"""What every trainer needs to touch a language model, in seven rooms on four floors.

model < attention, adapters, numerics < logprobs < heads, sampling: a room imports of those below it alone.

Legend of shapes, used in every docstring: B sequences · P prompt tokens (padded on the left) · R response
tokens (padded on the right) · S = P + R · T tokens of a packed row · A answers · V vocabulary · H hidden. A
mask is named by what True means: `is_real`, `is_response`.

The names below are imported when they are asked for, so that a module which needs neither torch nor
transformers (the prompt's template, say) loads neither.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from tasks.lm.heads.reference import create_reference_model
    from tasks.lm.heads.value_head import (
        AutoModelForCausalLMWithValueHead,
        AutoModelForSeq2SeqLMWithValueHead,
    )

__all__ = [
    "AutoModelForCausalLMWithValueHead",
    "AutoModelForSeq2SeqLMWithValueHead",
    "create_reference_model",
]


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    home = "reference" if name == "create_reference_model" else "value_head"
    return getattr(import_module(f"tasks.lm.heads.{home}"), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})

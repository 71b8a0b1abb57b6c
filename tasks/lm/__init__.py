"""What every trainer needs to touch a language model.

Legend of shapes, used in every docstring: B sequences · P prompt tokens (padded on the left) · R response
tokens (padded on the right) · S = P + R · T tokens of a packed row · A answers · V vocabulary · H hidden. A
mask is named by what True means: `is_real`, `is_response`.
"""

from tasks.lm.reference import create_reference_model
from tasks.lm.value_head import AutoModelForCausalLMWithValueHead, AutoModelForSeq2SeqLMWithValueHead

__all__ = [
    "AutoModelForCausalLMWithValueHead",
    "AutoModelForSeq2SeqLMWithValueHead",
    "create_reference_model",
]

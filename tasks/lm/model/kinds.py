"""What kind of model it is, under whatever wraps it."""

from __future__ import annotations

import logging
from collections.abc import Sequence

from torch import nn

_log = logging.getLogger(__name__)


def unwrapped(model):
    """The transformers model inside distributed wrappers and adapters."""
    model = getattr(model, "module", model)
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def is_seq2seq(model: nn.Module) -> bool:
    """Whether an encoder reads the prompts."""
    return unwrapped(model).config.is_encoder_decoder


def is_encoder(model) -> bool:
    """Whether a reward model reads whole documents by a head of its own; else it is read at the last token.

    An encoder's documents are roots of a forest that is not causal; a decoder's answers can share a question.
    """
    bare = unwrapped(model)
    return bare.config.is_encoder_decoder or not hasattr(bare, "score")


def start_of(model: nn.Module) -> int:
    """The token that the decoder reads first.

    Raises:
        ValueError: the configuration names none.
    """
    bare = unwrapped(model)
    configs = bare.config, getattr(bare, "generation_config", None)
    named = [getattr(config, "decoder_start_token_id", None) for config in configs]
    start = next((token for token in named if token is not None), None)
    if start is None:
        raise ValueError(f"{type(bare).__name__}: its configuration has no decoder_start_token_id")
    return start


def warn_of_start(model: nn.Module, responses: Sequence[Sequence[int]]) -> None:
    """Say so where responses come with the start token before them, as transformers generates them."""
    first = {response[0] for response in responses if response}
    if is_seq2seq(model) and first == {start_of(model)}:
        _log.warning(
            "every response begins with the decoder's start token, %d, as if it had been sampled; cut it off "
            "what transformers' generate gives (PPOTrainer.generate has none)", *first,
        )  # fmt: skip


def first_position(model) -> int:
    """RoBERTa and its kin count positions from behind their padding index, which stands for no position."""
    tables = (m for n, m in model.named_modules() if n.endswith("position_embeddings"))
    padding = next((getattr(table, "padding_idx", None) for table in tables), None)
    return 0 if padding is None else padding + 1

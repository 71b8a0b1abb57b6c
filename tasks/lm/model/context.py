"""How many tokens a model has places for."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from tasks.lm.model.kinds import first_position, unwrapped


@dataclass(frozen=True, slots=True)
class Room:
    """Places for prompt and response together; or for each of them, where one is read by an encoder.

    Example: `Room(8).holds(5, 4)` is False, `Room(8, is_apart=True).holds(5, 4)` True.
    """

    tokens: int | None = None  # None: no bound
    is_apart: bool = False

    def holds(self, prompt_tokens: int, response_tokens: int) -> bool:
        """Whether there are places for both."""
        used = max(prompt_tokens, response_tokens) if self.is_apart else prompt_tokens + response_tokens
        return self.tokens is None or used <= self.tokens

    def of_prompt(self, response_tokens: int) -> int | None:
        """Most tokens of a prompt that leaves places for such a response; None: no bound."""
        return self.tokens if self.tokens is None or self.is_apart else self.tokens - response_tokens

    def __str__(self) -> str:
        return f"{self.tokens} each" if self.is_apart else f"{self.tokens}"


def speaking_room(model) -> Room:
    """Of a language model, causal or with an encoder."""
    return Room(room_of(model), is_apart=unwrapped(model).config.is_encoder_decoder)


def room_of(model) -> int | None:
    """Most tokens of a document that the model has places for; None: no bound.

    A rope that takes other frequencies for long rows (longrope, dynamic) takes them for a batch as a whole:
    documents that are longer than its original length would change what is said of their neighbours.
    """
    config = unwrapped(model).config.get_text_config()
    most = getattr(config, "max_position_embeddings", None)
    ropes = getattr(config, "rope_parameters", None) or {}
    for rope in (ropes, *(each for each in ropes.values() if isinstance(each, dict))):
        original = rope.get("original_max_position_embeddings")
        if rope.get("rope_type") in ("longrope", "dynamic") and original:
            most = original if most is None else min(most, original)
    return most and most - first_position(model)


def check_room(documents: Sequence[Sequence[int]], most: int | None, what: str = "document") -> None:
    """Refuse a document of more tokens than the model has places for.

    Raises:
        ValueError: names its row and both lengths.
    """
    for row, ids in enumerate(documents):
        if most is not None and len(ids) > most:
            raise ValueError(f"{what} {row} has {len(ids)} tokens; the model has room for {most}")

"""How many tokens a language model has places for."""

from __future__ import annotations

from dataclasses import dataclass

from tasks.lm.forest import unwrapped
from tasks.lm.scoring import room_of


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

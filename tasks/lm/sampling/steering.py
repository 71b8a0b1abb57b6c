"""What a caller adds to sampling, row by row: processors of logits, and texts that end a response.

Each row is read as if it were alone, without padding: what is sampled does not depend on the batch.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

TAIL_TOKENS = 8  # of a prompt, for a stop string that begins in it


@dataclass(frozen=True, slots=True)
class Steering:
    """Of B rows."""

    before: Sequence[Sequence[int]]  # [B] what the model reads before a response: prompts, or a start token
    processors: Callable[[Tensor, Tensor], Tensor] | None = None  # ids [1, t], logits [1, V] -> logits [1, V]
    stop_strings: tuple[str, ...] = ()
    tokenizer: Any = None  # for stop_strings

    def logits(self, rows: Sequence[int], said: Tensor, logits: Tensor) -> Tensor:
        """Logits of the next token, processed. Tokens so far [n, t], [n, V] -> [n, V] float32."""
        if self.processors is None:
            return logits
        found = []
        for row, tokens, scores in zip(rows, said, logits.float(), strict=True):
            before = torch.tensor(self.before[row], dtype=torch.long, device=said.device)
            found.append(self.processors(torch.cat([before, tokens])[None], scores[None].clone())[0])
        return torch.stack(found)

    def ends(self, rows: Sequence[int], said: Tensor) -> Tensor:
        """Whether the last token completes a stop string. Tokens [n, t] -> bool [n]."""
        if not self.stop_strings:
            return torch.zeros(len(said), dtype=torch.bool, device=said.device)
        found = [self._ends(row, tokens) for row, tokens in zip(rows, said.tolist(), strict=True)]
        return torch.tensor(found, device=said.device)

    def _ends(self, row: int, said: list[int]) -> bool:
        tokens = [*self.before[row][-TAIL_TOKENS:], *said]
        decode = self.tokenizer.decode
        whole, without = decode(tokens), len(decode(tokens[:-1]))
        return any(text in whole[max(0, without - len(text) + 1) :] for text in self.stop_strings)

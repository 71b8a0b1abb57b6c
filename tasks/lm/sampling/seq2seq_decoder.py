"""Next-token logits of an encoder-decoder's responses, token by token, over the caches that the model makes.

All responses begin with the start token, so that their keys need no padding; the sources' are padded.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor
from torch.nn.functional import pad
from transformers.modeling_outputs import BaseModelOutput

from tasks.lm.logprobs.seq2seq import encode
from tasks.lm.model.kinds import start_of, unwrapped

PREFILL_TOKENS = 8192  # most of one forward of the encoder


class TargetDecoder:
    """Decodes n rows.

    Args:
        model: an encoder-decoder.
        sources: distinct ones, the longest first.
        of: the source of each row, ascending.
    """

    def __init__(self, model, sources: Sequence[Sequence[int]], of: list[int]) -> None:
        self.model, self.sources, self.of = model, sources, of

    def read(self) -> Tensor:
        """Read each source and the start token once. -> logits [n, V].

        Raises:
            ValueError: the model keeps no key-value cache of transformers.
        """
        parts = [encode(self.model, part) for part in self._parts()]
        width = max(is_real.shape[1] for _, is_real in parts)
        self.states = torch.cat([pad(x, (0, 0, 0, width - x.shape[1])) for x, _ in parts])
        self.is_real = torch.cat([pad(is_real, (0, width - is_real.shape[1])) for _, is_real in parts])
        self.cache = None
        start = torch.full((len(self.sources),), start_of(self.model), device=self.states.device)
        logits = self.step(start)
        if self.cache is None:
            raise ValueError(f"{type(unwrapped(self.model)).__name__} keeps no cache to decode with")
        rows = torch.tensor(self.of, device=self.states.device)
        self.select(rows)
        return logits[rows]

    def step(self, tokens: Tensor) -> Tensor:
        """Read one token a row, [n] -> logits [n, V]."""
        out = self.model(
            encoder_outputs=BaseModelOutput(self.states), attention_mask=self.is_real.long(),
            decoder_input_ids=tokens[:, None], past_key_values=self.cache, use_cache=True,
        )  # fmt: skip
        self.cache = getattr(out, "past_key_values", None)
        return out.logits[:, -1]

    def select(self, rows: Tensor) -> None:
        """Give up all rows but these; a row that is named twice is doubled."""
        self.cache.reorder_cache(rows)
        self.states, self.is_real = self.states[rows], self.is_real[rows]

    def _parts(self) -> Iterator[Sequence[Sequence[int]]]:
        """Neighbouring sources of at most so many tokens, padding counted."""
        first = 0
        for stop in range(1, len(self.sources) + 1):
            is_last = stop == len(self.sources)
            if is_last or (stop + 1 - first) * len(self.sources[first]) > PREFILL_TOKENS:
                yield self.sources[first:stop]
                first = stop

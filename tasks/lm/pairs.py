"""Sources and targets of an encoder-decoder (T5), packed: each target sees itself and its own source.

T5 has no positions but a bias that depends on how far a key stands from a query: it is the same wherever a
document stands, so that the row's first rows and columns serve all. The model makes it for the whole row,
heads · T² numbers a forward: keep rows to some thousand tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import ClassVar

import torch
from torch import Tensor

from tasks.lm.blocks import Sight, look
from tasks.lm.forest import NO_MASK, RELATIVE, Forest, Segment, plant, proven, unwrapped


@dataclass(frozen=True, slots=True)
class Pairs:
    """Two rows: the sources, and the targets shifted behind a start token.

    Miniature: sources (5, 6), (7,) with targets (8, 1), (9, 3, 1) and start 0: rows 5 6 7 and 0 8 0 9 3,
    labels 8 1 9 3 1.
    """

    sources: Forest  # each token sees its whole source
    targets: Forest  # causal: start, then all tokens but the last
    labels: Tensor  # [T] int64: the token that each place of the targets' row predicts
    cross: Sight  # the tokens of a target see its source
    mask: ClassVar[None] = None  # the fused kernel knows no biases

    def to(self, device, **_) -> Pairs:
        """The same pairs on another device."""
        return Pairs(*(getattr(self, f.name).to(device) for f in fields(self)))

    def sight_of(self, module, is_causal: bool) -> Sight:
        """What the queries of an attention layer see: the encoder's, the decoder's own, or across."""
        if is_causal:
            return self.targets.sight
        return self.cross if module.is_decoder else self.sources.sight


def plant_pairs(sources: Sequence[Sequence[int]], targets: Sequence[Sequence[int]], start_id: int) -> Pairs:
    """Lay sources in one row and their targets, to be predicted, in another.

    Args:
        sources: B token lists.
        targets: B token lists, each with its eos.
        start_id: the model's `decoder_start_token_id`.

    Raises:
        ValueError: an empty source or target, or not as many of the one as of the other.
    """
    if len(sources) != len(targets):
        raise ValueError(f"{len(sources)} sources, but {len(targets)} targets")
    empty = [i for i, target in enumerate(targets) if not target]
    if empty:
        raise ValueError(f"target {empty[0]} is empty")
    seen = plant([Segment(tokens) for tokens in sources], is_causal=False)
    asking = plant([Segment((start_id, *tokens[:-1])) for tokens in targets])
    return Pairs(
        sources=seen,
        targets=asking,
        labels=torch.tensor([token for tokens in targets for token in tokens]),
        cross=look(_places(asking), _places(seen), is_causal=False),
    )


def _places(forest: Forest) -> list[Tensor]:
    return [torch.arange(s, s + n) for s, n in zip(forest.starts, forest.lengths, strict=True)]


def run_pairs(model, pairs: Pairs, **keys):
    """One forward of an encoder-decoder whose forest is enabled; its logits [1, T, V] predict `pairs.labels`.

    Raises:
        ValueError: an architecture whose biases or positions are of another kind.
    """
    bare = unwrapped(model)
    if bare.config.model_type not in RELATIVE:
        raise ValueError(f"{type(bare).__name__} is none of {', '.join(RELATIVE)}")
    mask = NO_MASK.to(pairs.labels.device)
    with proven(model):
        return model(
            input_ids=pairs.sources.tokens[None],
            decoder_input_ids=pairs.targets.tokens[None],
            attention_mask=mask,
            decoder_attention_mask=mask,
            forest=pairs,
            use_cache=False,
            **keys,
        )

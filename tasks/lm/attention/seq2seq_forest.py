"""Sources and targets of an encoder-decoder (T5), packed: each target sees itself and its own source.

T5 has no positions but a bias that depends on how far a key stands from a query: it is the same wherever a
document stands, so that one of the longest document's size serves all; the model itself would make it for
the whole row, heads · T² numbers a forward.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Any, ClassVar

import torch
from torch import Tensor

from tasks.lm.attention.blocks import Sight, look
from tasks.lm.attention.forest import NO_MASK, RELATIVE, Forest, Segment, plant, proven
from tasks.lm.model.kinds import unwrapped


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


def plant_pairs(
    sources: Sequence[Sequence[int]],
    targets: Sequence[Sequence[int]],
    start_id: int,
    of: Sequence[int] | None = None,
) -> Pairs:
    """Lay sources in one row and their targets, to be predicted, in another.

    Args:
        sources: token lists.
        targets: B token lists, each with its eos.
        start_id: the model's `decoder_start_token_id`.
        of: the source of each target, several of which may share one; None: each has its own.

    Raises:
        ValueError: an empty source or target, or not as many of the one as of the other.
    """
    of = range(len(sources)) if of is None else of
    if len(of) != len(targets):
        raise ValueError(f"{len(of)} sources, but {len(targets)} targets")
    empty = [i for i, target in enumerate(targets) if not target]
    if empty:
        raise ValueError(f"target {empty[0]} is empty")
    seen = plant([Segment(tokens) for tokens in sources], is_causal=False)
    asking = plant([Segment((start_id, *tokens[:-1])) for tokens in targets])
    places = _places(seen)
    return Pairs(
        sources=seen,
        targets=asking,
        labels=torch.tensor([token for tokens in targets for token in tokens]),
        cross=look(_places(asking), [places[source] for source in of], is_causal=False),
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
    _bound_biases(bare)
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


def _bound_biases(bare) -> None:
    """Have the model's attentions make no bias larger than the pairs need."""
    for module in bare.modules():
        if hasattr(module, "compute_bias") and _bounded not in module._forward_pre_hooks.values():
            module.register_forward_pre_hook(_bounded, with_kwargs=True)


def _bounded(module, args: tuple, keys: dict[str, Any]) -> tuple[tuple, dict[str, Any]] | None:
    """The first block's bias, which the others get from it. The hook stays: a checkpoint runs it again."""
    pairs = keys.get("forest")
    if not isinstance(pairs, Pairs) or keys.get("position_bias") is not None:
        return None
    if module.has_relative_attention_bias:
        bias = _bias_of(module, pairs)
    else:  # across there is none
        bias = args[0].new_zeros(1, module.n_heads, 1, 1)
    return args, keys | {"position_bias": bias}


def _bias_of(attention, pairs: Pairs) -> Tensor:
    longest = max((pairs.targets if attention.is_decoder else pairs.sources).lengths)
    return attention.compute_bias(longest, longest)


def handed_on(first, hidden: Tensor, mask=None, bias: Tensor | None = None, *_, forest=None, **__) -> tuple:
    """What a block of T5's decoder gives that computes nothing: its input, and the bias for those above.

    Args:
        first: the decoder's first block, which has the bias.
        hidden: [..., T, H].
        mask: not needed.
        bias: that came; None: it is made here.
        forest: the pairs; None: padded rows.
    """
    if bias is None:
        attention, width = first.layer[0].SelfAttention, hidden.shape[-2]
        bias = attention.compute_bias(width, width) if forest is None else _bias_of(attention, forest)
    return hidden, bias, None

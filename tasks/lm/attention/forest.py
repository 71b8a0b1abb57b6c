"""The forest: token segments in one row without padding, each with its ancestors in sight and nothing else.

A segment may have a parent whose tokens it sees first (a question), then itself, causally; position ids
continue from the parent. Documents of an SFT batch are roots; the answers to one question are its children.
For an encoder every segment is a root and each token sees all of its segment. Everything but attention works
token by token, so a row of T tokens costs what its tokens cost; attention is that of
:mod:`tasks.lm.attention.blocks`, or on CUDA the fused kernel of :mod:`tasks.lm.attention.flex` where that
passes its self-test.

Registered with transformers as attention function `forest`; a model that cannot be served is refused by name.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, replace
from weakref import WeakSet

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.integrations.sdpa_attention import repeat_kv, sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from tasks.lm.attention import flex
from tasks.lm.attention.blocks import Sight, attend, look
from tasks.lm.attention.kv_cache import RowCache
from tasks.lm.model.kinds import first_position, unwrapped

OF_OTHERS = ("s_aux", "sinks", "indices", "block_indices")  # what other attentions take
RELATIVE = ("mt5", "t5")  # encoder-decoders that tasks.lm.attention.seq2seq_forest serves
NO_MASK = torch.empty(1, 1, 0, 0)  # any 4-D mask is handed on as it is
SERVED_LAYERS = {"full_attention", "sliding_attention"}

_windows: ContextVar[list[int | None] | None] = ContextVar("windows", default=None)  # of a forward's calls
_layers: ContextVar[slice] = ContextVar("layers", default=slice(None))  # those that a forward runs
_refused: WeakSet[torch.nn.Module] = WeakSet()


@dataclass(frozen=True, slots=True)
class Segment:
    """Tokens of one segment and the index of its parent in the list (−1: a root).

    Example: a question of two tokens with two answers, `[Segment((5, 6)), Segment((7, 1), 0), Segment((8, 9,
    1), 0)]`.
    """

    tokens: Sequence[int]
    parent: int = -1


@dataclass(frozen=True, slots=True)
class Forest:
    """One row of segments.

    Miniature: for the example of :class:`Segment`, tokens 5 6 7 1 8 9 1, positions 0 1 2 3 2 3 4,
    starts (0, 2, 4), lengths (2, 2, 3), parents (-1, 0, 0).
    """

    tokens: Tensor  # [T] int64
    positions: Tensor  # [T] int64, counted from the root's first token
    starts: tuple[int, ...]  # first place of each segment
    lengths: tuple[int, ...]  # tokens of each segment
    parents: tuple[int, ...]  # segment that each one continues, −1 for a root
    is_causal: bool  # False: each token sees its whole segment (encoders)
    sight: Sight
    mask: BlockMask | None = None  # the same for the fused kernel, where that runs

    def to(self, device, **_) -> Forest:
        """The same forest on another device (accelerate calls it)."""
        moved = {k: getattr(self, k).to(device) for k in ("tokens", "positions", "sight")}
        return replace(self, **moved)

    def sight_of(self, module, is_causal: bool) -> Sight:
        """What the queries of an attention layer see.

        Raises:
            ValueError: the layer is causal and the forest is not, or the reverse.
        """
        if is_causal != self.is_causal:
            ways = {True: "causal", False: "bidirectional"}
            found, wanted = ways[self.is_causal], ways[is_causal]
            raise ValueError(f"{type(module).__name__} is {wanted}, but the forest was planted {found}")
        return self.sight


def plant(segments: Sequence[Segment], is_causal: bool = True) -> Forest:
    """Lay segments in one row, in their order; a parent stands before its children.

    Args:
        segments: at least one, none empty; a document without a question is a root.
        is_causal: False for an encoder: each token sees all of its segment. All segments are roots then: a
            question would have to see each of the answers that share it.

    Raises:
        ValueError: no segment, an empty one, a parent that does not stand before its child, or any parent
            where the forest is not causal.
    """
    if not segments:
        raise ValueError("a forest needs at least one segment")
    starts, depths, paths, place = [], [], [], 0
    for i, segment in enumerate(segments):
        up = segment.parent
        if not segment.tokens:
            raise ValueError(f"segment {i} of a forest is empty")
        if up >= i:
            raise ValueError(f"segment {i} of a forest stands before its parent {up}")
        if up >= 0 and not is_causal:
            raise ValueError(f"segment {i} has a parent, but in a bidirectional forest all are roots")
        own = torch.arange(place, place + len(segment.tokens))
        starts.append(place)
        depths.append(0 if up < 0 else len(paths[up]))
        paths.append(own if up < 0 else torch.cat([paths[up], own]))  # ancestors first, itself last
        place += len(segment.tokens)
    return Forest(
        tokens=torch.tensor([t for s in segments for t in s.tokens]),
        positions=torch.cat([torch.arange(d, len(p)) for d, p in zip(depths, paths, strict=True)]),
        starts=tuple(starts),
        lengths=tuple(len(s.tokens) for s in segments),
        parents=tuple(max(s.parent, -1) for s in segments),
        is_causal=is_causal,
        sight=look([p[d:] for d, p in zip(depths, paths, strict=True)], paths, is_causal),
    )


def forest_attention(
    module, query, key, value, attention_mask, scaling=None, dropout=0.0, is_causal=None, forest=None, **keys
):
    """Attention over a forest; without one, plain SDPA. query [1, heads, T, D] -> [1, T, heads, D].

    Where a batch decodes, `forest` is its :class:`tasks.lm.attention.kv_cache.RowCache`.

    Raises:
        ValueError: the layer is causal and the forest is not, or the reverse; the layer needs what a forest
            does not serve; several rows at once.
    """
    softcap = keys.get("softcap")
    if forest is None and softcap is not None:
        return _capped_attention(module, query, key, value, attention_mask, scaling, dropout, softcap)
    if forest is None:
        return sdpa_attention_forward(
            module, query, key, value, attention_mask,
            dropout=dropout, scaling=scaling, is_causal=is_causal, **keys,
        )  # fmt: skip
    if isinstance(forest, RowCache):
        capped = {"softcap": keys.get("softcap")}
        return forest.attend(query, key, value, scaling, keys.get("sliding_window"), **capped), None
    if query.shape[0] != 1:
        raise ValueError(f"a forest is one row; {query.shape[0]} rows came")
    is_causal = getattr(module, "is_causal", True) if is_causal is None else is_causal
    sight, window = forest.sight_of(module, is_causal), keys.get("sliding_window")
    unknown = (*OF_OTHERS, "position_bias") if isinstance(forest, Forest) else OF_OTHERS
    others = [name for name in unknown if keys.get(name) is not None]
    if others or (window is not None and not is_causal):
        what = others[0] if others else "a window that looks ahead"
        raise ValueError(f"{type(module).__name__} uses {what}, which a forest does not serve")
    if forest.mask is not None and softcap is None and flex.can_fuse(query, dropout, window):
        out = flex.fused(query, key, value, forest.mask, scaling).transpose(1, 2)
    else:
        groups = getattr(module, "num_key_value_groups", 1)
        heads = (x[0].transpose(0, 1) for x in (query, repeat_kv(key, groups), repeat_kv(value, groups)))
        keys = {"scaling": scaling, "window": window, "bias": keys.get("position_bias"), "softcap": softcap}
        out = attend(sight, *heads, dropout=dropout, **keys)[None]
    if (seen := _windows.get()) is not None:
        seen.append(window)
    return out, None


def _capped_attention(module, query, key, value, mask, scaling, dropout: float, softcap: float):
    """Plain attention whose products are capped, as transformers' eager one does it; SDPA cannot."""
    groups = getattr(module, "num_key_value_groups", 1)
    key, value = repeat_kv(key, groups), repeat_kv(value, groups)
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    odds = softcap * (query @ key.transpose(2, 3) * scale / softcap).tanh()
    if mask is None:
        seen = torch.ones(odds.shape[-2:], dtype=torch.bool, device=odds.device)
        mask = seen.tril(odds.shape[-1] - odds.shape[-2])
    mask = mask[..., : odds.shape[-1]]
    least = torch.finfo(odds.dtype).min  # finite: padding sees nothing, and must stay a number
    odds = odds.masked_fill(~mask, least) if mask.dtype == torch.bool else odds + mask
    weights = odds.softmax(-1, dtype=torch.float32).to(query.dtype)
    weights = torch.nn.functional.dropout(weights, dropout) if dropout else weights
    return (weights @ value).transpose(1, 2).contiguous(), None


AttentionInterface.register("forest", forest_attention)
AttentionMaskInterface.register("forest", sdpa_mask)  # padding masks stay right outside the forest


def enable_forest(model) -> None:
    """Route the model's attention through :func:`forest_attention`.

    Raises:
        ValueError: the model cannot be served, and is unchanged: its class looks its attention up elsewhere
            (GPT-J, Bloom), or some layers are no attention, or an attention of another kind.
    """
    bare = unwrapped(model)
    config = bare.config.get_text_config()
    attentions = sum(hasattr(module, "is_causal") for module in bare.modules())
    reasons = [f"has {kind} layers" for kind in getattr(config, "layer_types", None) or ()
               if kind not in SERVED_LAYERS]  # fmt: skip
    if config.is_encoder_decoder and config.model_type not in RELATIVE:
        reasons.append("is an encoder-decoder of another kind than T5")
    elif attentions != _attentions(config):
        reasons.append(f"has {attentions} attentions in {config.num_hidden_layers} layers")
    if any(name.endswith("sinks") for name, _ in bare.named_parameters()):
        reasons.append("has attention sinks")
    if not reasons:
        for part in bare.modules():  # T5's halves have a config each
            if isinstance(part, PreTrainedModel) and not has_forest(part):
                part.set_attn_implementation("forest")
        if has_forest(bare):
            return
        reasons.append("has an attention of its own")
    raise ValueError(f"{type(bare).__name__} cannot be served by the forest attention: it {reasons[0]}")


def has_forest(model) -> bool:
    """Whether the model's attention goes through :func:`forest_attention`."""
    return model.config._attn_implementation == "forest"


def serve_forest(model) -> bool:
    """Enable the forest where the model can be served; False, with nothing changed, where it cannot.

    Padded rows serve the others. A model that was refused is not tried again: transformers warns each time.
    """
    bare = unwrapped(model)
    if bare in _refused:
        return False
    try:
        enable_forest(bare)
    except ValueError:
        _refused.add(bare)
        return False
    return True


def run_forest(model, forest: Forest, **keys):
    """One forward over a forest; `keys` go to the model (for example `logits_to_keep`).

    Raises:
        ValueError: a layer did not call the forest attention (recurrent and convolutional layers see across
            segments; the numbers would be wrong in silence), or did not name its sliding window.
    """
    device = forest.tokens.device
    if device.type == "cuda" and flex.works(device):
        rule = forest.lengths, forest.parents, forest.is_causal
        forest = replace(forest, mask=flex.mask_of(*rule, device))
    with proven(model):
        return model(
            input_ids=forest.tokens[None],
            position_ids=forest.positions[None] + first_position(model),
            attention_mask=NO_MASK.to(device),
            forest=forest,
            **{"use_cache": False, **keys},
        )


@contextmanager
def proven(model) -> Iterator[None]:
    """Proof, after a forward, that every layer went through the forest attention, windows named."""
    bare = unwrapped(model)
    config, layers = bare.config.get_text_config(), _layers.get()
    kinds = (getattr(config, "layer_types", None) or ["sliding_attention"] * _attentions(config))[layers]
    wanted = _attentions(config, layers) if config.is_encoder_decoder else len(kinds)
    windows = 0 if getattr(config, "sliding_window", None) is None else kinds.count("sliding_attention")
    seen: list[int | None] = []
    outer = _windows.set(seen)
    try:
        yield
    finally:
        _windows.reset(outer)
    if len(seen) != wanted:
        raise ValueError(f"{type(bare).__name__} calls the forest attention {len(seen)} times, not {wanted}")
    named = sum(window is not None for window in seen)
    if named != windows:
        raise ValueError(f"{type(bare).__name__} names its sliding window in {named} of {windows} layers")


@contextmanager
def running_only(layers: slice) -> Iterator[None]:
    """Inside, :func:`proven` looks for the attention of these layers; the others compute nothing."""
    outer = _layers.set(layers)
    try:
        yield
    finally:
        _layers.reset(outer)


def _attentions(config, layers: slice = slice(None)) -> int:
    """Calls of one forward: one a layer; in a decoder that has an encoder two, and one a layer of that.

    Where but some of such a decoder's layers run, the encoder runs with the first.
    """
    if not config.is_encoder_decoder:
        return config.num_hidden_layers
    return 2 * len(range(config.num_decoder_layers)[layers]) + config.num_hidden_layers * (not layers.start)

"""The forest: token segments in one row without padding, each with its ancestors in sight and nothing else.

A segment may have a parent whose tokens it sees first (a question), then itself, causally; position ids
continue from the parent. Documents of an SFT batch are roots; the answers to one question are its children.
For an encoder every segment is a root and each token sees all of its segment.
Everything but attention works token by token, so a row of T tokens costs what its tokens cost; attention
gathers segments of like length into a few dense blocks (a :class:`Block`), computed once per batch and shared
by every layer.

Registered with transformers as attention function `forest`; a model that cannot be served is refused by name.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.nn import functional
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import repeat_kv, sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

SMALL_BLOCK = 128  # keys


@dataclass(frozen=True, slots=True)
class Segment:
    """Tokens of one segment and the index of its parent in the list (−1: a root).

    Example: a question of two tokens with two answers, `[Segment((5, 6)), Segment((7, 1), 0), Segment((8, 9,
    1), 0)]`.
    """

    tokens: Sequence[int]
    parent: int = -1


@dataclass(frozen=True, slots=True)
class Block:
    """Segments of like length, side by side.

    N segments, Q their longest, K their longest with all ancestors.
    """

    queries: Tensor  # [n·Q] int64, place in the row; padding repeats a place
    keys: Tensor  # [n·K] int64
    shape: tuple[int, int, int]  # n, Q, K
    sees: Tensor  # bool; causal [n, 1, Q, K]: no key after the query's own; else [n, 1, 1, K]: every real key
    real: Tensor  # [tokens of these segments] int64, place in the flattened [n·Q]

    def to(self, device, **_) -> Block:
        """The same block on another device."""
        return replace(self, **{k: getattr(self, k).to(device) for k in ("queries", "keys", "sees", "real")})


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
    blocks: tuple[Block, ...]
    order: Tensor  # [T] int64: where each token's output stands in the blocks' concatenated outputs

    def to(self, device, **_) -> Forest:
        """The same forest on another device (accelerate calls it)."""
        moved = {k: getattr(self, k).to(device) for k in ("tokens", "positions", "order")}
        return replace(self, **moved, blocks=tuple(block.to(device) for block in self.blocks))


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
    starts, depths, chains, place = [], [], [], 0
    for i, segment in enumerate(segments):
        if not segment.tokens:
            raise ValueError(f"segment {i} of a forest is empty")
        if segment.parent >= i:
            raise ValueError(f"segment {i} of a forest stands before its parent {segment.parent}")
        if segment.parent >= 0 and not is_causal:
            raise ValueError(f"segment {i} has a parent, but in a bidirectional forest all are roots")
        up = segment.parent
        starts.append(place)
        depths.append(0 if up < 0 else depths[up] + len(segments[up].tokens))
        chains.append([i] if up < 0 else [*chains[up], i])  # ancestors first, itself last
        place += len(segment.tokens)
    lengths = [len(s.tokens) for s in segments]
    blocks, outputs = [], torch.empty(place, dtype=torch.long)
    base = 0
    for members in _alike(lengths, depths):
        block, places = _block(members, chains, starts, lengths, is_causal)
        outputs[places] = torch.arange(base, base + len(places))
        base += len(places)
        blocks.append(block)
    return Forest(
        tokens=torch.tensor([t for s in segments for t in s.tokens]),
        positions=torch.cat([torch.arange(d, d + n) for d, n in zip(depths, lengths, strict=True)]),
        starts=tuple(starts),
        lengths=tuple(lengths),
        parents=tuple(max(s.parent, -1) for s in segments),
        is_causal=is_causal,
        blocks=tuple(blocks),
        order=outputs,
    )


def _alike(lengths: Sequence[int], depths: Sequence[int]) -> list[list[int]]:
    """Segments whose own and whole lengths lie in the same steps of √2 to 2: bounded waste, few blocks."""
    groups: dict[tuple[int, int], list[int]] = {}
    for i, (n, depth) in enumerate(zip(lengths, depths, strict=True)):
        groups.setdefault((_step(n), _step(n + depth)), []).append(i)
    return [groups[key] for key in sorted(groups)]


def _step(n: int) -> int:
    return 5 if n <= 32 else n.bit_length() * 2 + (n >> (n.bit_length() - 2) & 1)


def _block(members, chains, starts, lengths, is_causal) -> tuple[Block, Tensor]:
    keys = [torch.cat([torch.arange(starts[c], starts[c] + lengths[c]) for c in chains[i]]) for i in members]
    own = torch.tensor([lengths[i] for i in members])
    whole = torch.tensor([len(k) for k in keys])
    n, q, k = len(members), int(own.max()), int(whole.max())
    column = torch.arange(q)
    is_real = column < own[:, None]  # [n, Q]
    first = torch.tensor([starts[i] for i in members])[:, None]
    queries = torch.where(is_real, first + column, first)
    # query j of a segment stands at place (whole − own + j) of its own keys; padding keys come after them all
    last = (whole - own)[:, None, None] + column[:, None] if is_causal else whole[:, None, None] - 1
    sees = torch.arange(k) <= last
    padded = torch.nn.utils.rnn.pad_sequence(keys, batch_first=True, padding_value=0)
    real = is_real.flatten().nonzero()[:, 0]
    return Block(queries.flatten(), padded.flatten(), (n, q, k), sees[:, None], real), queries.flatten()[real]


NOT_SERVED = ("softcap", "s_aux", "sinks", "position_bias", "indices", "block_indices")  # of other attentions


def forest_attention(
    module, query, key, value, attention_mask, scaling=None, dropout=0.0, is_causal=None, forest=None, **keys
):
    """Attention over a forest; without one, plain SDPA. query [1, heads, T, D] -> [1, T, heads, D].

    Raises:
        ValueError: the layer is causal and the forest is not, or the reverse; the layer uses a sliding window
            or another thing that a forest does not serve; several rows at once.
    """
    if forest is None:
        return sdpa_attention_forward(
            module, query, key, value, attention_mask,
            dropout=dropout, scaling=scaling, is_causal=is_causal, **keys,
        )  # fmt: skip
    _refuse_other_attention(module, forest, is_causal, keys)
    if query.shape[0] != 1:
        raise ValueError(f"a forest is one row; {query.shape[0]} rows came")
    groups = getattr(module, "num_key_value_groups", 1)
    q, k, v = (
        x[0].transpose(0, 1) for x in (query, repeat_kv(key, groups), repeat_kv(value, groups))
    )  # [T, heads, D]
    outputs = []
    for block in forest.blocks:
        n, rows, columns = block.shape
        qb = q.index_select(0, block.queries).view(n, rows, *q.shape[1:]).transpose(1, 2)
        kb, vb = (
            x.index_select(0, block.keys).view(n, columns, *x.shape[1:]).transpose(1, 2) for x in (k, v)
        )
        out = _attend(qb, kb, vb, block.sees, dropout, scaling)
        outputs.append(out.transpose(1, 2).reshape(n * rows, *v.shape[1:]).index_select(0, block.real))
    module.forest_calls = getattr(module, "forest_calls", 0) + 1
    return torch.cat(outputs).index_select(0, forest.order)[None], None


def _refuse_other_attention(module, forest: Forest, is_causal: bool | None, keys: dict) -> None:
    name = type(module).__name__
    is_causal = getattr(module, "is_causal", True) if is_causal is None else is_causal
    if is_causal != forest.is_causal:
        ways = {True: "causal", False: "bidirectional"}
        raise ValueError(f"{name} is {ways[is_causal]}, but the forest was planted {ways[forest.is_causal]}")
    window = keys.get("sliding_window")
    if window is not None and window < max(block.shape[2] for block in forest.blocks):
        raise ValueError(f"{name} uses a sliding window, which a forest does not serve")
    for key in NOT_SERVED:
        if keys.get(key) is not None:
            raise ValueError(f"{name} uses {key}, which a forest does not serve")


def _attend(query, key, value, sees, dropout, scaling) -> Tensor:
    """Attention of one block; the CPU's flash kernel is slow on few keys, where two plain products do it."""
    if query.device.type != "cpu" or key.shape[2] > SMALL_BLOCK or dropout:
        return functional.scaled_dot_product_attention(
            query, key, value, sees, dropout_p=dropout, scale=scaling
        )
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    odds = (query * scale @ key.transpose(-1, -2)).masked_fill(~sees, float("-inf"))
    return odds.softmax(-1, dtype=torch.float32).to(value.dtype) @ value


AttentionInterface.register("forest", forest_attention)
AttentionMaskInterface.register("forest", sdpa_mask)  # padding masks stay right outside the forest


def enable_forest(model) -> None:
    """Route the model's attention through :func:`forest_attention`.

    Raises:
        ValueError: the model's class looks its attention up elsewhere (GPT-J, Bloom): refused by name.
    """
    model.set_attn_implementation("forest")
    if model.config._attn_implementation != "forest":
        raise ValueError(f"{type(model).__name__} cannot be served by the forest attention")


def has_forest(model) -> bool:
    """Whether the model's attention goes through :func:`forest_attention`."""
    return model.config._attn_implementation == "forest"


def serve_forest(model) -> bool:
    """Enable the forest where the model can be served; False, with nothing changed, where it cannot.

    Padded rows serve the others: own attention classes (GPT-J, Bloom), a sliding window, whole or in some
    layers, and layers that are no attention.
    """
    config, before = model.config.get_text_config(), model.config._attn_implementation
    attentions = sum(hasattr(module, "is_causal") for module in model.modules())
    if getattr(config, "sliding_window", None) is not None or attentions != config.num_hidden_layers:
        return False
    try:
        enable_forest(model)
    except ValueError:
        model.set_attn_implementation(before)
        return False
    return True


def run_forest(model, forest: Forest, **keys):
    """One forward over a forest; `keys` go to the model (for example `logits_to_keep`).

    Raises:
        ValueError: a layer did not call the forest attention (recurrent and convolutional layers see across
        segments; the numbers would be wrong in silence).
    """
    before = _calls(model)
    out = model(
        input_ids=forest.tokens[None],
        position_ids=forest.positions[None] + _first_position(model),
        attention_mask=torch.empty(
            1, 1, 0, 0, device=forest.tokens.device
        ),  # any 4-D mask is handed on as it is
        forest=forest,
        use_cache=False,
        **keys,
    )
    bare = unwrapped(model)
    called, layers = _calls(model) - before, bare.config.get_text_config().num_hidden_layers
    if called != layers:
        name = type(bare).__name__
        raise ValueError(f"{name} calls the forest attention in {called} of its {layers} layers")
    return out


def unwrapped(model):
    """The transformers model inside distributed wrappers and adapters."""
    model = getattr(model, "module", model)
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def _first_position(model) -> int:
    """RoBERTa and its kin count positions from behind their padding index, which stands for no position."""
    tables = (m for n, m in model.named_modules() if n.endswith("position_embeddings"))
    padding = next((getattr(table, "padding_idx", None) for table in tables), None)
    return 0 if padding is None else padding + 1


def _calls(model) -> int:
    return sum(getattr(m, "forest_calls", 0) for m in model.modules())

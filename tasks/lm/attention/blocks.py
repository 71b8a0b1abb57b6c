"""Dense blocks: attention in which each query sees the keys of its own segment's path, and nothing else.

Segments of like length stand side by side in a :class:`Block`; made once per batch, shared by every layer.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.nn import functional
from torch.nn.utils.rnn import pad_sequence

SMALL_BLOCK = 128  # keys
LONG_RUNS = 96  # tokens of a segment, on average, from which one call each is faster than a few for all


@dataclass(frozen=True, slots=True)
class Block:
    """Segments of like length, side by side.

    n segments, Q the queries of their longest, K its keys. The keys of a segment stand in the order of their
    positions, padding behind them; its queries are the last of them where it attends to itself.
    """

    queries: Tensor  # [n·Q] int64, place in the row; padding repeats a place
    keys: Tensor  # [n·K] int64
    shape: tuple[int, int, int]  # n, Q, K
    sees: Tensor  # bool; causal [n, 1, Q, K]: no key after the query's own; else [n, 1, 1, K]: every real key
    real: Tensor  # [tokens of these segments] int64, place in the flattened [n·Q]

    def to(self, device) -> Block:
        """The same block on another device."""
        return replace(self, **{k: getattr(self, k).to(device) for k in ("queries", "keys", "sees", "real")})


@dataclass(frozen=True, slots=True)
class Sight:
    """What each of T queries sees.

    Miniature: a question of two tokens and an answer of one: one block of shape (2, 2, 3) with queries 0 1 |
    2 (2) and keys 0 1 (0) | 0 1 2, padding in brackets; order 0 1 2.
    """

    blocks: tuple[Block, ...]
    order: Tensor  # [T] int64: where each query's output stands in the blocks' concatenated outputs
    runs: tuple[int, ...] = ()  # lengths, where long causal segments see themselves alone, one after another

    def to(self, device) -> Sight:
        """The same on another device."""
        return replace(self, blocks=tuple(b.to(device) for b in self.blocks), order=self.order.to(device))


def look(queries: Sequence[Tensor], keys: Sequence[Tensor], is_causal: bool) -> Sight:
    """Segment i asks with the tokens at `queries[i]` and sees those at `keys[i]`.

    Args:
        queries: places in the row, each place once in all.
        keys: places, in the order of their positions; where `is_causal`, a segment's queries are the last.
        is_causal: whether a query sees no key behind its own.
    """
    sizes = [(len(q), len(k)) for q, k in zip(queries, keys, strict=True)]
    blocks, order, base = [], torch.empty(sum(q for q, _ in sizes), dtype=torch.long), 0
    for members in _alike(sizes):
        block = _block([queries[i] for i in members], [keys[i] for i in members], is_causal)
        order[block.queries[block.real]] = torch.arange(base, base + len(block.real))
        base += len(block.real)
        blocks.append(block)
    return Sight(tuple(blocks), order, _runs(queries, sizes) if is_causal else ())


def _runs(queries: Sequence[Tensor], sizes: Sequence[tuple[int, int]]) -> tuple[int, ...]:
    """Lengths of long segments that have no ancestors and stand in the order of the row; else nothing."""
    lengths = tuple(length for length, _ in sizes)
    are_alone = all(own == whole for own, whole in sizes) and sum(lengths) >= LONG_RUNS * len(lengths)
    return lengths if are_alone and torch.cat(list(queries)).diff().eq(1).all() else ()


def _alike(sizes: Sequence[tuple[int, int]]) -> list[list[int]]:
    """Segments whose queries and keys lie in the same steps of √2 to 2: bounded waste, few blocks."""
    groups: dict[tuple[int, int], list[int]] = {}
    for i, (queries, keys) in enumerate(sizes):
        groups.setdefault((_step(queries), _step(keys)), []).append(i)
    return [groups[key] for key in sorted(groups)]


def _step(n: int) -> int:
    return 5 if n <= 32 else n.bit_length() * 2 + (n >> (n.bit_length() - 2) & 1)


def _block(queries: Sequence[Tensor], keys: Sequence[Tensor], is_causal: bool) -> Block:
    own, whole = (torch.tensor([len(x) for x in places]) for places in (queries, keys))
    shape = len(queries), int(own.max()), int(whole.max())
    column = torch.arange(shape[1])
    # query j of a segment stands at place (whole − own + j) of its own keys
    last = (whole - own)[:, None, None] + column[:, None] if is_causal else whole[:, None, None] - 1
    return Block(
        queries=torch.cat([functional.pad(q, (0, shape[1] - len(q)), value=int(q[0])) for q in queries]),
        keys=pad_sequence(list(keys), batch_first=True).flatten(),
        shape=shape,
        sees=(torch.arange(shape[2]) <= last)[:, None],
        real=(column < own[:, None]).flatten().nonzero()[:, 0],
    )


def attend(
    sight: Sight, query: Tensor, key: Tensor, value: Tensor, dropout: float = 0.0,
    scaling: float | None = None, window: int | None = None, bias: Tensor | None = None,
    softcap: float | None = None,
) -> Tensor:  # fmt: skip
    """Attention block by block. query [T, heads, D], key [U, heads, D], value [U, heads, E] -> [T, heads, E].

    Args:
        sight: what sees what; causal where a window is given.
        query: T tokens that ask.
        key: U tokens that are seen; with `value`, repeated to as many heads as the queries have.
        value: what is handed on.
        dropout: of the attention weights.
        scaling: of the products; 1/√D where None.
        window: a token sees itself and this many − 1 before it.
        bias: [1, heads, ≥ Q, ≥ K] added to the products, by a query's and a key's place in their segments.
        softcap: the products z become softcap · tanh(z / softcap) (Gemma 2).
    """
    if sight.runs and bias is None and softcap is None and (window is None or window >= max(sight.runs)):
        return _attend_alone(sight.runs, query, key, value, dropout, scaling)
    outputs = []
    for block in sight.blocks:
        n, rows, columns = block.shape
        q = _side_by_side(query, block.queries, n)
        k, v = (_side_by_side(x, block.keys, n) for x in (key, value))
        sees = block.sees if window is None or window >= columns else _near(block.sees, window)
        near = None if bias is None else bias[:, :, :rows, :columns]
        out = _attend(q, k, v, sees, near, dropout, scaling, softcap)
        outputs.append(out.transpose(1, 2).flatten(0, 1).index_select(0, block.real))
    return torch.cat(outputs).index_select(0, sight.order)


def _attend_alone(runs: Sequence[int], query, key, value, dropout: float, scaling: float | None) -> Tensor:
    """Each segment by itself: no token is moved, and the half that nobody sees is not computed."""
    parts = zip(*(x.transpose(0, 1)[None].split(list(runs), 2) for x in (query, key, value)), strict=True)
    keys = {"is_causal": True, "dropout_p": dropout, "scale": scaling}
    found = [functional.scaled_dot_product_attention(*part, **keys) for part in parts]
    return torch.cat(found, 2)[0].transpose(0, 1)


def _side_by_side(x: Tensor, places: Tensor, n: int) -> Tensor:
    """[T, heads, D] -> [n, heads, places / n, D]."""
    return x.index_select(0, places).unflatten(0, (n, -1)).transpose(1, 2)


def _near(sees: Tensor, window: int) -> Tensor:
    """Of the keys that a query sees, which are a prefix, the last so many."""
    return sees & (torch.arange(sees.shape[-1], device=sees.device) >= sees.sum(-1, keepdim=True) - window)


def _attend(query, key, value, sees, bias, dropout, scaling, softcap=None) -> Tensor:
    """Attention of one block; the CPU's flash kernel is slow on few keys, where two plain products do it.

    No kernel caps the products; then two plain ones do it too.
    """
    if softcap is None and (query.device.type != "cpu" or key.shape[2] > SMALL_BLOCK or dropout):
        mask = sees if bias is None else bias.masked_fill(~sees, float("-inf"))
        return functional.scaled_dot_product_attention(
            query, key, value, mask, dropout_p=dropout, scale=scaling
        )
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    odds = query * scale @ key.transpose(-1, -2)
    if softcap is not None:
        odds = softcap * (odds / softcap).tanh()
    odds = (odds if bias is None else odds + bias).masked_fill(~sees, float("-inf"))
    return functional.dropout(odds.softmax(-1), dropout) @ value if dropout else odds.softmax(-1) @ value

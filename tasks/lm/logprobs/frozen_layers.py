"""Hydra with a memory: what a frozen trunk makes of a rollout is computed once, and read by all that follow.

The first `depth` blocks of a policy that only its last blocks train give the same states in every pass, and
in the reference that shares them. They are kept, one for each distinct token; a forward that gets them runs
the blocks above alone. trlX shares a trunk's weights and runs it in each pass again.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor, nn

from tasks.lm.attention.forest import RELATIVE, Segment, has_forest, plant, run_forest, running_only
from tasks.lm.attention.seq2seq_forest import handed_on
from tasks.lm.logprobs.lm_head import predict
from tasks.lm.logprobs.roads import (
    attention_kept,
    is_close_in,
    remembered,
    trial_tokens,
    trying,
    without_router,
)
from tasks.lm.model.freezing import blocks_of, trunk_of
from tasks.lm.model.kinds import unwrapped

WITH_ENCODER = (*RELATIVE, "bart", "blenderbot", "m2m_100", "marian", "mbart", "pegasus")  # tried


@dataclass(frozen=True, slots=True)
class TrunkStates:
    """What enters block `depth` at every real token of B rows; equal prompts may have one state for all.

    With an encoder these are its states at the prompts' tokens, and the decoder's at the places that predict
    the responses'.

    Miniature: rows `5 6 8` and `_ 7 9` (one padded) with H = 2 -> states [5, 2], places [[0, 1, 2], [0, 3,
    4]].
    """

    depth: int
    states: Tensor  # [N, H], without a gradient, in the dtype of the model's own stream
    places: Tensor  # [B, S] int64: the row of `states` of each token; 0 at padding

    def rows(self, index: Tensor) -> TrunkStates:
        """Some rows."""
        return replace(self, places=self.places[index])

    def laid(self, where: Tensor, is_real: Tensor, count: int) -> Tensor:
        """The states of a row of `count` tokens, [count, H].

        Args:
            where: [B, S] int64: the place in the row of each token.
            is_real: [B, S] bool.
            count: T.
        """
        found = torch.zeros(count, dtype=torch.long, device=where.device)
        found[where[is_real]] = self.places[is_real]
        return self.states.index_select(0, found)

    @property
    def nbytes(self) -> int:
        """Memory of the states."""
        return self.states.nbytes


def joined(parts: Sequence[TrunkStates]) -> TrunkStates:
    """The rows of all parts, in their order."""
    firsts = torch.tensor([0, *(len(part.states) for part in parts)]).cumsum(0).tolist()
    places = torch.cat([part.places + first for part, first in zip(parts, firsts, strict=False)])
    return TrunkStates(parts[0].depth, torch.cat([part.states for part in parts]), places)


def frozen_depth(model: nn.Module) -> int:
    """How many of the first blocks, with all that runs before them, no optimizer moves.

    Args:
        model: a causal language model, bare or under PEFT.
    """
    config = unwrapped(model).config
    if config.is_encoder_decoder and config.model_type not in WITH_ENCODER:
        return 0
    try:
        blocks = blocks_of(model)
    except ValueError:  # no one stack of blocks
        return 0
    is_free = [any(p.requires_grad for p in block.parameters()) for block in blocks]
    depth = is_free.index(True) if any(is_free) else len(blocks)
    while depth and any(p.requires_grad for part in trunk_of(model, depth) for p in part.parameters()):
        depth -= 1  # something else runs there and learns: the embeddings, mostly
    if depth and not config.is_encoder_decoder:
        what = "trunk", depth, has_forest(model)
        return depth if remembered(model, what, lambda: _hands_on(model, depth)) else 0
    return depth


@torch.no_grad()
def _hands_on(model: nn.Module, depth: int) -> bool:
    """Whether the blocks above a trunk say of its states what the whole model says, of a few tokens."""
    rows = torch.tensor(trial_tokens(model, (6, 6)), device=next(model.parameters()).device)
    places, dtype = torch.arange(rows.numel(), device=rows.device), next(model.parameters()).dtype

    forest = plant([Segment(row) for row in rows.tolist()]).to(rows.device) if has_forest(model) else None

    def run(model):
        return model(rows, use_cache=False) if forest is None else run_forest(model, forest)

    def read() -> Tensor:
        return predict(model, run, places).logits()

    with trying(model), without_router(model), attention_kept(model):
        try:
            wanted = read()
            with trunk_alone(model, depth) as seen:
                read()
            if seen[0].ndim != 3:  # several streams of states
                return False
            with given_trunk(model, depth, seen[0]):
                return is_close_in(dtype, read(), wanted)
        except Exception:  # blocks may read more than states
            return False


def shares_trunk(model: nn.Module, other: nn.Module, depth: int) -> bool:
    """Whether the first `depth` blocks of both, and all that runs before them, are one memory.

    Args:
        model: a causal language model, bare or under PEFT.
        other: another one; the same, where it is to run without its adapter.
        depth: blocks.
    """
    trunk = trunk_of(model, depth)
    if model is other:
        return not any(hasattr(m, "base_layer") for part in trunk for m in part.modules())
    if len(blocks_of(other)) < depth:
        return False
    own, others = (
        [(p.data_ptr(), p.shape) for part in each for p in part.parameters()]
        for each in (trunk, trunk_of(other, depth))
    )
    return own == others


@dataclass(frozen=True, slots=True)
class Hydra:
    """What of a policy is computed once per rollout."""

    depth: int = 0  # first blocks that nothing trains; 0: all of the policy learns
    is_shared: bool = False  # by the reference
    most_bytes: int = 0  # of the states that are kept; of a larger rollout they are computed in each pass

    @classmethod
    def of(
        cls, policy: nn.Module, reference: nn.Module | None, value_layers: int = 0, most_bytes: int = 0
    ) -> Hydra:
        """Of a policy as it will be trained.

        Args:
            policy: a causal language model, bare or under PEFT.
            reference: another one; None: the policy without its adapter.
            value_layers: last blocks of which the value head has copies; these read what enters the first.
            most_bytes: bound of the memory.
        """
        depth = frozen_depth(policy)
        if value_layers:
            depth = min(depth, len(blocks_of(policy)) - value_layers)
        is_shared = depth > 0 and shares_trunk(policy, policy if reference is None else reference, depth)
        return cls(depth, is_shared, most_bytes)


@contextmanager
def trunk_alone(model: nn.Module, depth: int) -> Iterator[list[Tensor]]:
    """Inside, a forward runs the first `depth` blocks, and notes what comes out of them, [..., H]."""
    blocks, seen = blocks_of(model), []
    hand_on = _hand_on(model)  # which may run the model, unseen by the hooks

    def note(_, inputs, keys):
        seen.append(_states_in(inputs, keys))

    def note_last(_, inputs, out):
        seen.append(out[0] if isinstance(out, tuple) else out)

    if depth < len(blocks):
        hook = blocks[depth].register_forward_pre_hook(note, with_kwargs=True)
    else:
        hook = blocks[-1].register_forward_hook(note_last)
    try:
        with _replaced(dict.fromkeys(blocks[depth:], hand_on)), running_only(slice(depth)):
            yield seen
    finally:
        hook.remove()


@contextmanager
def encoder_states(model: nn.Module) -> Iterator[list[Tensor]]:
    """What a model's encoder gives in the forwards inside, [..., H]; nothing where there is none."""
    bare, seen = unwrapped(model), []
    if not bare.config.is_encoder_decoder:
        yield seen
        return
    hook = bare.get_encoder().register_forward_hook(lambda _, inputs, out: seen.append(out[0]))
    try:
        yield seen
    finally:
        hook.remove()


@contextmanager
def given_trunk(model: nn.Module, depth: int, states: Tensor) -> Iterator[None]:
    """Inside, the first `depth` ≥ 1 blocks compute nothing: the last of them hands on `states`, [..., H]."""
    *below, last = blocks_of(model)[:depth]
    hand_on = _hand_on(model)
    forwards = dict.fromkeys(below, hand_on) | {last: lambda _, *args, **keys: hand_on(states, *args, **keys)}
    with _replaced(forwards), running_only(slice(depth, None)):
        yield


def _hand_on(model: nn.Module) -> Callable:
    """The forward of a block that computes nothing, in the form in which the model's blocks give theirs."""
    kind = unwrapped(model).config.model_type
    if kind in RELATIVE:
        return partial(handed_on, blocks_of(model)[0])
    more = remembered(model, ("block",), lambda: _given_beside(model))
    if more is None:
        return lambda *args, **keys: _states_in(args, keys)
    return lambda *args, **keys: (_states_in(args, keys), *([None] * more))


def _states_in(args: tuple, keys: dict) -> Tensor:
    """What a block reads."""
    return args[0] if args else keys["hidden_states"]


@torch.no_grad()
def _given_beside(model: nn.Module) -> int | None:
    """How many things a block gives beside its states; None where it gives these alone."""
    seen: list = []
    rows = torch.tensor(trial_tokens(model, (2,)), device=next(model.parameters()).device)
    hook = blocks_of(model)[0].register_forward_hook(lambda _, inputs, out: seen.append(out))
    try:
        with trying(model), without_router(model):
            bare = unwrapped(model)
            spoken = {"decoder_input_ids": rows} if bare.config.is_encoder_decoder else {}
            bare(input_ids=rows, use_cache=False, **spoken)
    finally:
        hook.remove()
    return len(seen[0]) - 1 if isinstance(seen[0], tuple) else None


@contextmanager
def _replaced(forwards: dict[nn.Module, Callable]) -> Iterator[None]:
    """Inside, modules have other forwards."""
    before = {module: vars(module).get("forward") for module in forwards}
    for module, forward in forwards.items():
        module.forward = forward
    try:
        yield
    finally:
        for module, forward in before.items():
            del module.forward
            if forward is not None:
                module.forward = forward

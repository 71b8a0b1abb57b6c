"""Prompts and responses in padded tensors, and what a language model says of each response token.

The tensors are padded on both sides, what is read is not: a model that serves the forest sees the real tokens
only, any other model rows padded on the right, where nothing looks; the numbers are the same.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor

from tasks.lm.adapters.active import at_work
from tasks.lm.attention.forest import has_forest, run_forest
from tasks.lm.attention.padding import Sequences, flush_left, plant_sequences
from tasks.lm.logprobs.frozen_layers import (
    TrunkStates,
    encoder_states,
    given_trunk,
    shares_trunk,
    trunk_alone,
)
from tasks.lm.logprobs.lm_head import Predictions, predict
from tasks.lm.logprobs.roads import check_road, without_router
from tasks.lm.logprobs.seq2seq import predict_targets
from tasks.lm.model.context import speaking_room
from tasks.lm.model.hooks import calls_of
from tasks.lm.model.kinds import is_seq2seq
from tasks.lm.model.modes import evaluating


def read_responses(
    model,
    sequences: Sequences,
    temperature: float,
    entropy: bool = True,
    *,
    freeze_trunk: bool = False,
    trunk: TrunkStates | None = None,
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Log-probability and entropy (nats) of each response token, and its value where the model has them.

    Args:
        model: a language model, causal or with an encoder; or one with a value head.
        sequences: B rows.
        temperature: the logits are divided by it.
        entropy: whether it is wanted.
        freeze_trunk: only the value head learns (and blocks of its own): nothing else gets a gradient.
        trunk: of these rows, what the first blocks make of them; those are not run then.

    Where no gradient is wanted, there is no dropout, whatever mode the model is in.

    Returns:
        [B, R] each, zero where there is no token. The value of a token is that of the state before it.

    Raises:
        ValueError: a row that the model has no places for, or a model that no road serves.
    """
    mask, causal = sequences.is_response, getattr(model, "pretrained_model", model)
    head = getattr(model, "v_head", None)
    branch = None if head is None else head.branch
    blocks = [] if branch is None else branch.originals(causal)
    learns = torch.is_grad_enabled()
    _check_road(causal)
    with evaluating(None if learns else model):
        with torch.set_grad_enabled(learns and not freeze_trunk), calls_of(blocks) as calls:
            found, places, _ = _predict(causal, sequences, trunk)
            said = found.read(sequences.responses[mask], temperature, entropy=entropy)
        read = found.hidden if branch is None else branch(calls[-len(blocks) :]).flatten(0, -2)
        values = None if head is None else head(_at(read, places))
    each = (None if x is None else _spread(x, mask) for x in (said.logprobs, said.entropy, values))
    return tuple(each)


@torch.no_grad()
def read_trunk(causal, sequences: Sequences, depth: int) -> TrunkStates:
    """What the first blocks of a model make of B rows; nothing else of it runs, but for its encoder.

    Args:
        causal: a language model, bare or under PEFT; with an encoder, the blocks are the decoder's.
        sequences: B rows.
        depth: blocks.
    """
    _check_road(causal)
    with evaluating(causal), trunk_alone(causal, depth) as seen, encoder_states(causal) as read:
        _, _, where = _predict(causal, sequences)
    states = [each[0].flatten(0, -2) for each in (read, seen) if each]
    return TrunkStates(depth, torch.cat(states), where)


@torch.no_grad()
def response_kl(
    model,
    ref_model,
    sequences: Sequences,
    temperature: float,
    *,
    trunk: TrunkStates | None = None,
    reference: Callable[[], AbstractContextManager] | None = None,
) -> Tensor:
    """Exact KL(policy || reference), nats, of the distribution that each response token is drawn from.

    Both are read without dropout.

    Args:
        model: the policy: a causal language model, with or without a value head.
        ref_model: another one of the same vocabulary; None: the policy without its adapter.
        sequences: B rows.
        temperature: the logits of both are divided by it.
        trunk: of these rows, as in :func:`read_responses`, for the policy; and for the reference where it
            shares it.
        reference: opens a context in which the policy is the reference; None: without its adapter.

    Returns:
        [B, R], without a gradient, zero where there is no token.

    Raises:
        ValueError: the two predict over vocabularies of different sizes.
    """
    other = model if ref_model is None else ref_model
    policy, frozen = (getattr(each, "pretrained_model", each) for each in (model, other))
    for each in (policy, frozen):
        _check_road(each)
    with evaluating(policy, frozen):
        own, _, _ = _predict(policy, sequences, trunk)
        if trunk is not None and not shares_trunk(policy, frozen, trunk.depth):
            trunk = None
        enter = reference or (lambda: at_work(frozen, []))
        with nullcontext() if ref_model is not None else enter():
            other, _, _ = _predict(frozen, sequences, trunk)
    return _spread(own.kl_nats(other, temperature), sequences.is_response)


def response_logprobs(
    model, sequences: Sequences, temperature: float, *, trunk: TrunkStates | None = None
) -> Tensor:
    """Log-probability of each response token under a causal model, nats, without dropout. -> [B, R]."""
    with evaluating(model):
        return read_responses(model, sequences, temperature, entropy=False, trunk=trunk)[0]


def _predict(
    causal, sequences: Sequences, trunk: TrunkStates | None = None
) -> tuple[Predictions, Tensor, Tensor]:
    """A model's predictions of the N response tokens, and where in its hidden states they stand.

    And where each token stands there, [B, S].

    Raises:
        ValueError: a row that the model has no places for.
    """
    _check_room(causal, sequences)
    with without_router(causal):
        return _predicted(causal, sequences, trunk)


def _predicted(causal, sequences: Sequences, trunk: TrunkStates | None):
    if is_seq2seq(causal):
        return predict_targets(causal, sequences, trunk)
    if has_forest(causal):
        forest, places, where = plant_sequences(sequences)
        with _from(causal, trunk, where, sequences.is_real, (len(forest.tokens),)):
            return predict(causal, lambda model: run_forest(model, forest), places), places, where
    tokens, where = flush_left(sequences.tokens, sequences.is_real)
    columns = where[:, -sequences.is_response.shape[1] :]
    places = columns[sequences.is_response] - 1  # a place predicts the next token
    with _from(causal, trunk, where, sequences.is_real, tokens.shape):
        found = predict(causal, lambda model: model(tokens, use_cache=False), places)
    return found, places, where


def _check_road(causal) -> None:
    """Refuse what no road serves; what the forest serves was tried before, and what has an encoder is not."""
    if not has_forest(causal) and not is_seq2seq(causal):
        check_road(causal)


def _check_room(causal, sequences: Sequences) -> None:
    """Refuse a row that the model has no places for; a batch that is narrow enough needs no look at rows."""
    room = speaking_room(causal)
    if room.tokens is None or sequences.tokens.shape[1] <= room.tokens:
        return
    whole, answered = sequences.is_real.sum(1).tolist(), sequences.is_response.sum(1).tolist()
    for row, (tokens, response) in enumerate(zip(whole, answered, strict=True)):
        if not room.holds(tokens - response, response):
            raise ValueError(
                f"row {row} has a prompt of {tokens - response} tokens and a response of {response}; the "
                f"model has room for {room}"
            )


def _from(
    causal, trunk: TrunkStates | None, where: Tensor, is_real: Tensor, shape: Sequence[int]
) -> AbstractContextManager:
    """Where a trunk's states are given, the blocks above them run alone; the batch has this shape."""
    if trunk is None:
        return nullcontext()
    states = trunk.laid(where, is_real, math.prod(shape))
    return given_trunk(causal, trunk.depth, states.view(*([1] * (2 - len(shape))), *shape, -1))


def _at(hidden: Tensor, places: Tensor) -> Tensor:
    """Rows of the states, repeated or not; their gradients are summed in the same order every time."""
    return hidden[places] if hidden.is_cuda else hidden.index_select(0, places)


def _spread(values: Tensor, mask: Tensor) -> Tensor:
    """[N] values of the N true places of a mask -> the mask's shape, zero elsewhere."""
    return values.new_zeros(mask.shape).masked_scatter(mask, values)

"""Encoder-decoders: prompts are the encoder's sources, responses the decoder's targets, from the first token.

The decoder reads a start token and all of the response but its last, so that R places predict R tokens, the
first of them too (TRL 0.11 never trains it). T5 reads packed rows (:mod:`tasks.lm.attention.seq2seq_forest`),
any other encoder-decoder padded ones; either way a source that several rows share is read once.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence
from transformers.modeling_outputs import BaseModelOutput

from tasks.lm.adapters.kinds import check_adapters
from tasks.lm.attention.forest import has_forest
from tasks.lm.attention.seq2seq_forest import plant_pairs, run_pairs
from tasks.lm.logprobs.frozen_layers import TrunkStates, given_trunk
from tasks.lm.logprobs.lm_head import Predictions, check_causal, predict
from tasks.lm.model.hooks import states_of
from tasks.lm.model.kinds import is_seq2seq, start_of, unwrapped

if TYPE_CHECKING:
    from tasks.lm.attention.padding import Sequences

_log = logging.getLogger(__name__)


def check_seq2seq(model: nn.Module) -> None:
    """Refuse what is no encoder-decoder that predicts tokens.

    Raises:
        ValueError: no encoder, no output embeddings, no token to start a response with, or experts, which
            these models choose for a batch as a whole; an adapter that is not served.
    """
    check_adapters(model)
    bare = unwrapped(model)
    if not is_seq2seq(model) or bare.get_output_embeddings() is None:
        raise ValueError(f"{type(bare).__name__} is no encoder-decoder with a language model's head")
    if getattr(bare.config, "num_experts", 0):
        raise ValueError(f"{type(bare).__name__} has experts: what it says of a row depends on its batch")
    start_of(model)


def check_speaker(model: nn.Module) -> None:
    """Refuse what is no language model, causal or with an encoder.

    Raises:
        ValueError: as :func:`check_seq2seq` or :func:`tasks.lm.logprobs.lm_head.check_causal`.
    """
    (check_seq2seq if is_seq2seq(model) else check_causal)(model)


def split(sequences: Sequences) -> tuple[list[list[int]], list[list[int]]]:
    """The real tokens: B prompts, and B responses, of which some may be empty."""
    tokens, width = sequences.tokens.cpu(), sequences.is_response.shape[1]
    masks = sequences.is_real[:, :-width].cpu(), sequences.is_response.cpu()
    return tuple(
        [row[keep].tolist() for row, keep in zip(part, mask, strict=True)]
        for part, mask in zip((tokens[:, :-width], tokens[:, -width:]), masks, strict=True)
    )


def distinct_of(rows: Sequence[Sequence[int]]) -> tuple[list[tuple[int, ...]], list[int]]:
    """Each row once, in the order in which they come first, and of each row which one it is."""
    known: dict[tuple[int, ...], int] = {}
    of = [known.setdefault(tuple(row), len(known)) for row in rows]
    return list(known), of


@dataclass(frozen=True, slots=True)
class _Batch:
    """B rows as the model reads them: source tokens in one tensor, what the decoder reads in another."""

    run: Callable[[nn.Module, Tensor | None], Any]  # one forward, of these states of the sources where given
    places: Tensor  # [N] int64, of the decoder's
    where: Tensor  # [B, S] int64: place of each token, first all of the encoder's, then the decoder's
    is_read: Tensor  # [B, S] bool
    shapes: tuple[tuple[int, int], tuple[int, int]]  # rows and columns of both


def predict_targets(
    model: nn.Module, sequences: Sequences, trunk: TrunkStates | None = None
) -> tuple[Predictions, Tensor, Tensor]:
    """An encoder-decoder's predictions of the N response tokens.

    Args:
        model: bare or under PEFT.
        sequences: B rows.
        trunk: of these rows, what the encoder and the decoder's first blocks make of them.

    Returns:
        The predictions, whose hidden states are what the decoder gives; the places [N] of these; and where
        each token's state stands, [B, S], the encoder's before the decoder's.
    """
    batch = (_packed if has_forest(model) else _padded)(model, sequences)
    sources, context = None, nullcontext()
    if trunk is not None:
        sizes = [rows * columns for rows, columns in batch.shapes]
        parts = trunk.laid(batch.where, batch.is_read, sum(sizes)).split(sizes)
        sources, states = (part.view(*s, -1) for part, s in zip(parts, batch.shapes, strict=True))
        context = given_trunk(model, trunk.depth, states)
    with context, states_of(model) as found:
        said = predict(model, lambda model: batch.run(model, sources), batch.places)
    return replace(said, hidden=found[-1].flatten(0, -2)), batch.places, batch.where


def _packed(model: nn.Module, sequences: Sequences) -> _Batch:
    """Rows with nothing to predict are left out; of such rows alone, the first is read for nothing."""
    prompts, responses = split(sequences)
    answered = [i for i, response in enumerate(responses) if response]
    sources, of = distinct_of([prompts[i] for i in answered or [0]])
    targets = [responses[i] for i in answered] or [(0,)]
    device = sequences.tokens.device
    pairs = plant_pairs(sources, targets, start_of(model), of).to(device)
    asked, read = len(pairs.labels), len(pairs.sources.tokens)
    is_read = sequences.is_real & sequences.is_response.any(1, keepdim=True)
    starts = zip((pairs.sources.starts[source] for source in of), pairs.targets.starts, strict=True)
    where = [
        place
        for i, (source, target) in zip(answered, starts, strict=False)
        for first, row in ((source, prompts[i]), (read + target, responses[i]))
        for place in range(first, first + len(row))
    ]

    def run(model: nn.Module, states: Tensor | None):
        given = {} if states is None else {"encoder_outputs": BaseModelOutput(states)}
        return run_pairs(model, pairs, **given)

    return _Batch(
        run=run,
        places=torch.arange(asked if answered else 0, device=device),
        where=_laid(is_read, where),
        is_read=is_read,
        shapes=((1, read), (1, asked)),
    )


def _padded(model: nn.Module, sequences: Sequences) -> _Batch:
    prompts, _ = split(sequences)
    sources, of = distinct_of(prompts)
    device, width = sequences.tokens.device, max(map(len, sources))
    start = torch.full_like(sequences.tokens[:, :1], start_of(model))
    asking = torch.cat([start, sequences.responses[:, :-1]], 1)
    read, each = len(sources) * width, asking.shape[1]
    counts = sequences.is_response.sum(1).tolist()
    where = [
        place
        for row, (source, count) in enumerate(zip(of, counts, strict=True))
        for first, n in ((source * width, len(prompts[row])), (read + row * each, count))
        for place in range(first, first + n)
    ]

    def run(model: nn.Module, states: Tensor | None):
        is_real, which = _is_real(sources, device), torch.tensor(of, device=device)
        if states is None:
            states, _ = encode(model, sources)
        return model(
            encoder_outputs=BaseModelOutput(_rows_of(states, which)), attention_mask=is_real[which].long(),
            decoder_input_ids=asking, use_cache=False,
        )  # fmt: skip

    rows, columns = sequences.is_response.nonzero(as_tuple=True)
    return _Batch(
        run=run,
        places=rows * each + columns,
        where=_laid(sequences.is_real, where),
        is_read=sequences.is_real,
        shapes=((len(sources), width), tuple(asking.shape)),
    )


def _laid(mask: Tensor, places: list[int]) -> Tensor:
    """Places of the true ones of a mask [B, S], row by row -> [B, S]; 0 elsewhere."""
    found = torch.zeros(mask.shape, dtype=torch.long, device=mask.device)
    return found.masked_scatter(mask, torch.tensor(places, dtype=torch.long, device=mask.device))


def _is_real(sources: Sequence[Sequence[int]], device) -> Tensor:
    lengths = torch.tensor([len(source) for source in sources], device=device)
    return torch.arange(int(lengths.max()), device=device) < lengths[:, None]


def encode(model: nn.Module, sources: Sequence[Sequence[int]]) -> tuple[Tensor, Tensor]:
    """What the encoder makes of d sources: states [d, U, H], padded on the right, and is_real [d, U]."""
    device = next(model.parameters()).device
    is_real = _is_real(sources, device)
    if has_forest(model):  # the decoder reads one token of each, for the proof that all layers were served
        pairs = plant_pairs(sources, [(0,)] * len(sources), start_of(model)).to(device)
        states = run_pairs(model, pairs).encoder_last_hidden_state[0]
        return pad_sequence(states.split([len(source) for source in sources]), batch_first=True), is_real
    tokens = torch.zeros(is_real.shape, dtype=torch.long, device=device)  # any token will do behind a source
    tokens[is_real] = torch.tensor([token for source in sources for token in source], device=device)
    found = unwrapped(model).get_encoder()(input_ids=tokens, attention_mask=is_real.long())
    return found[0], is_real


def logits_alone(model: nn.Module, prompt: Sequence[int], response: Sequence[int]) -> Tensor:
    """Logits [R, V] that predict each token of a response, by a plain forward of its row alone."""
    device = next(model.parameters()).device
    rows = prompt, [start_of(model), *response[:-1]]
    source, asking = (torch.tensor([row], device=device) for row in rows)
    seen = torch.ones_like(source)
    return model(input_ids=source, attention_mask=seen, decoder_input_ids=asking, use_cache=False).logits[0]


def _rows_of(states: Tensor, which: Tensor) -> Tensor:
    """Rows, repeated or not; their gradients are summed in the same order every time."""
    return states[which] if states.is_cuda else states.index_select(0, which)

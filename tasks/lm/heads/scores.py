"""Scores of a reward model, one per document, as plain transformers gives them.

A decoder is read at a document's last token; an encoder by its own head, mostly over the first.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from tasks.lm.adapters.kinds import check_adapters
from tasks.lm.attention.forest import Forest, Segment, has_forest, plant, run_forest, serve_forest
from tasks.lm.logprobs.last_mlp import last_mlp_at
from tasks.lm.logprobs.roads import (
    Road,
    attention_kept,
    check_losses,
    is_close_in,
    remembered,
    said,
    slopes_of,
    trial_tokens,
    trying,
)
from tasks.lm.model.context import check_room, room_of
from tasks.lm.model.kinds import is_encoder, unwrapped
from tasks.lm.model.modes import evaluating

# Encoders whose heads read the first token of what this stack gives: packed. All others take padded rows.
STACKS = {
    "bert": "encoder", "roberta": "encoder", "xlm-roberta": "encoder", "camembert": "encoder",
    "electra": "encoder", "distilbert": "transformer",
}  # fmt: skip


def check_scorer(model) -> None:
    """Refuse what gives no score.

    Raises:
        ValueError: no sequence-classification model, more labels than one, or an adapter that is not served.
    """
    check_adapters(model)
    bare = unwrapped(model)
    name, labels = type(bare).__name__, getattr(bare.config, "num_labels", None)
    if "ForSequenceClassification" not in name or labels != 1:
        raise ValueError(f"{name} with {labels} labels is no sequence classification with one label")


def forest_scores(
    model, forest: Forest, segments: Sequence[int], but_last: Sequence[int] = ()
) -> Tensor:
    """Scores of the documents that end with the named segments. A segments, C segments -> [A + C], float32.

    The model runs as a whole, inside its distributed wrapper and adapters; one that serves no forest sees the
    same documents in padded rows.

    Args:
        model: the reward model.
        forest: what it reads.
        segments: whose last tokens end documents.
        but_last: places in `segments` of documents that are read without their last token as well: a causal
            model's state before it is all there is of the shorter document, so it costs no token more.

    Raises:
        ValueError: an encoder and a causal forest, or the reverse; more labels than one; an encoder's
            document without its last token, or one of which nothing would be left.
    """
    check_scorer(model)
    bare = unwrapped(model)
    if is_encoder(model) == forest.is_causal:
        raise ValueError(f"{type(bare).__name__}: a forest of is_causal={not forest.is_causal} is wanted")
    if but_last and is_encoder(model):
        raise ValueError(f"{type(bare).__name__} sees a document as a whole, and none without its last token")
    if short := [i for i in but_last if forest.lengths[segments[i]] < 2]:
        raise ValueError(f"segment {segments[short[0]]} of a forest is nothing without its last token")
    if not has_forest(bare) or (is_encoder(model) and bare.config.model_type not in STACKS):
        return _padded_scores(model, [_document(forest, i) for i in segments], but_last)
    if is_encoder(model):
        return _first_token_scores(model, forest, segments)
    ends = [forest.starts[i] + forest.lengths[i] - 1 for i in segments]
    ends += [ends[i] - 1 for i in but_last]
    with last_mlp_at(model, torch.tensor(ends, device=forest.tokens.device)):
        return _last_token_scores(model, lambda: run_forest(model, forest), [0] * len(ends), ends)


@torch.no_grad()
def score_documents(
    model, documents: Sequence[Sequence[int]], rows: int, prompts: Sequence[int] | None = None
) -> Tensor:
    """Scores of whole documents (prompt + response), at most `rows` in one forward, without dropout.

    B lists -> [B] on the CPU.

    Args:
        model: a reward model.
        documents: token ids.
        rows: most documents in one forward.
        prompts: tokens of each document that are its prompt: a decoder reads the prompt of neighbours that
            share it once. None: every document is read by itself.

    Raises:
        ValueError: a document that the model has no places for; the message names its row.
    """
    check_room(documents, room_of(model))
    take_scoring_road(model)
    scores = []
    with evaluating(model):
        for first in range(0, len(documents), rows):
            some = documents[first : first + rows]
            sizes = [0] * len(some) if prompts is None or is_encoder(model) else prompts[first : first + rows]
            segments, ends = _under_prompts(some, sizes)
            forest = plant(segments, is_causal=not is_encoder(model)).to(model.device)
            scores.append(forest_scores(model, forest, ends))
    return torch.cat(scores).cpu()


def _under_prompts(
    documents: Sequence[Sequence[int]], sizes: Sequence[int]
) -> tuple[list[Segment], list[int]]:
    """Documents as segments, and the one that each ends with: neighbours of one prompt are its children."""
    segments, ends, root = [], [], None
    for document, size in zip(documents, sizes, strict=True):
        if not 0 < size < len(document):
            segments.append(Segment(document))
        else:
            prompt = document[:size]
            if root is None or list(segments[root].tokens) != list(prompt):
                root = len(segments)
                segments.append(Segment(prompt))
            segments.append(Segment(document[size:], root))
        ends.append(len(segments) - 1)
    return segments, ends


def take_scoring_road(model, learns: bool = False) -> None:
    """The forest where it serves a reward model, tried against its documents one by one; else padded rows.

    Args:
        model: a reward model, bare or under PEFT. An encoder-decoder is not tried.
        learns: a gradient is tried as well, and what a loss would have to add is looked for.

    Raises:
        ValueError: neither gives the scores of the documents alone.
    """
    if learns:
        check_losses(model)
    bare = unwrapped(model)
    if bare.config.is_encoder_decoder:
        serve_forest(model)
        return
    road = remembered(model, ("scores", learns), lambda: _try_scores(model, learns))
    if road.refusal:
        raise ValueError(f"{type(bare).__name__} {road.refusal}")
    if road.is_forest:
        serve_forest(model)


@torch.no_grad()
def _try_scores(model, learns: bool) -> Road:
    dtype, device = (getattr(next(model.parameters()), name) for name in ("dtype", "device"))
    question, *rest = trial_tokens(model, (6, 5, 4, 3))
    documents = [question + rest[0], question + rest[1], rest[2]]
    with trying(model), attention_kept(model):
        try:
            rows = [torch.tensor([d], device=device) for d in documents]
            keys = [{"input_ids": row, "attention_mask": torch.ones_like(row)} for row in rows]
            wanted = torch.stack([model(**each).logits[0, 0].float() for each in keys])
            found = _padded_scores(model, documents)
        except Exception as error:  # models refuse in many ways
            return Road(refusal=f"cannot be read as a reward model: {said(error)}")
        if not is_close_in(dtype, found, wanted):
            return Road(refusal="scores a document otherwise when it stands beside longer ones")
        return Road(_forest_serves(model, documents, wanted, learns))


def _forest_serves(model, documents: list[list[int]], wanted: Tensor, learns: bool) -> bool:
    """Whether a forest gives these scores, and the gradient of their sum that padded rows give."""
    if not serve_forest(model):
        return False
    if is_encoder(model):
        segments, ends = [Segment(document) for document in documents], (0, 1, 2)
    else:
        first, second, third = documents
        segments = [Segment(first[:6]), Segment(first[6:], 0), Segment(second[6:], 0), Segment(third)]
        ends = (1, 2, 3)
    forest = plant(segments, is_causal=not is_encoder(model)).to(wanted.device)
    dtype = next(model.parameters()).dtype
    try:
        if not is_close_in(dtype, forest_scores(model, forest, ends), wanted):
            return False
        if not learns:
            return True
        runs = (lambda: forest_scores(model, forest, ends)), (lambda: _padded_scores(model, documents))
        packed, padded = (slopes_of(model, forest.tokens, lambda run=run: run().sum()) for run in runs)
        return is_close_in(dtype, packed, padded)
    except Exception:  # whatever a model makes of a forest, padded rows serve it
        return False


def _first_token_scores(model, forest: Forest, segments: Sequence[int]) -> Tensor:
    """The stack hands on each document's first state alone, [A, 1, H], and the model's own head reads it."""
    firsts = torch.tensor([forest.starts[i] for i in segments], device=forest.tokens.device)

    def narrow(module, inputs, out):
        out.last_hidden_state = out.last_hidden_state[0, firsts, None]
        return out

    bare = unwrapped(model)
    hook = getattr(bare.base_model, STACKS[bare.config.model_type]).register_forward_hook(narrow)
    try:
        return run_forest(model, forest).logits[:, 0].float()
    finally:
        hook.remove()


def _last_token_scores(model, forward, rows: Sequence[int], places: Sequence[int]) -> Tensor:
    """What the score head said at these places of the rows during one forward."""
    said = []
    hook = unwrapped(model).score.register_forward_hook(lambda module, inputs, out: said.append(out))
    try:
        forward()
    finally:
        hook.remove()
    return said[0][rows, places, 0].float()


def _padded_scores(model, documents: Sequence[Sequence[int]], but_last: Sequence[int] = ()) -> Tensor:
    """Right-padded rows; one row at a time where the model knows no pad id. As :func:`forest_scores`."""
    bare = unwrapped(model)
    pad = bare.config.get_text_config().pad_token_id
    if pad is None and len(documents) > 1:
        each = [_padded_scores(model, [d], (0,) * (i in but_last)) for i, d in enumerate(documents)]
        return torch.stack([found[0] for found in each] + [each[i][1] for i in but_last])
    device = next(model.parameters()).device
    ids = [torch.tensor(d, device=device) for d in documents]
    keys = {
        "input_ids": pad_sequence(ids, batch_first=True, padding_value=pad or 0),
        "attention_mask": pad_sequence([torch.ones_like(row) for row in ids], batch_first=True),
    }
    if is_encoder(model):
        return model(**keys).logits[:, 0].float()
    ends = [len(d) - 1 for d in documents]
    rows, places = [*range(len(ends)), *but_last], ends + [ends[i] - 1 for i in but_last]
    return _last_token_scores(model, lambda: model(**keys), rows, places)


def _document(forest: Forest, segment: int) -> list[int]:
    """The tokens of a segment after those of its ancestors."""
    up = [] if forest.parents[segment] < 0 else _document(forest, forest.parents[segment])
    first = forest.starts[segment]
    return [*up, *forest.tokens[first : first + forest.lengths[segment]].tolist()]

"""Which road serves a model: tried on the model itself, with a few tokens, and not believed.

Every sequence alone, in a plain forward, is the truth. Rows padded on the right must say the same; else what
the model says of a token changes with what stands behind it or beside it, and it is refused by name. Where
the forest says the same too (:mod:`tasks.lm.attention.forest`), and its gradient is the plain one, it serves;
else padded rows do. Found once for a class, its configuration, dtype and device, and remembered.

Neither random state, nor modes, nor gradients are touched. A trial takes some ten forwards of at most 11
tokens. On one CPU thread: 26 ms for a tiny model, 39 with a gradient, 19 more for decoding; for a Llama of
0.9 GB in float32 1.6, 4.1 and 1.2 seconds.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from inspect import signature
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from tasks.lm.attention.forest import Forest, Segment, plant, run_forest, serve_forest
from tasks.lm.attention.padding import left_pad, pad_forest, positions_of
from tasks.lm.logprobs.last_mlp import leave_whole
from tasks.lm.logprobs.lm_head import Predictions, check_causal, predict
from tasks.lm.model.kinds import first_position, unwrapped
from tasks.lm.model.modes import evaluating

LENGTHS, PARENTS = (6, 5, 4, 3), (-1, 0, 0, -1)  # a question, its two answers, a document
CLOSE = {"cpu": 1e-4, "cuda": 5e-3}  # of the largest magnitude, in float32 (CUDA may take TensorFloat-32)
LOOSE = 5e-2  # in half precision; half of the tokens may be further off, where experts change their minds
AHEAD = (
    "is no causal language model as it is configured: what it says of a token changes with what stands "
    "behind it or in other rows"
)
VOLATILE = ("_name_or_path", "transformers_version", "_attn_implementation", "dtype", "torch_dtype")

_found: dict[tuple, Any] = {}
_of_model: WeakKeyDictionary[nn.Module, dict[tuple, Any]] = WeakKeyDictionary()


@dataclass(frozen=True, slots=True)
class Road:
    """What a trial found of a model."""

    is_forest: bool = False
    is_whole: bool = False  # its last MLP is computed at every token (tasks.lm.logprobs.last_mlp)
    refusal: str = ""  # why no road serves it


def take_road(model: nn.Module, learns: bool = False) -> None:
    """The forest where it serves a causal language model; its attention as it is where padded rows do.

    Args:
        model: bare or under PEFT. An encoder-decoder or a model without a language model's head is not tried.
        learns: a gradient is tried as well, and what a loss would have to add is looked for.

    Raises:
        ValueError: no road serves it, with the reason; or it asks for a loss that no trainer here adds.
    """
    if learns:
        check_losses(model)
    bare = unwrapped(model)
    if bare.config.is_encoder_decoder or check_road(model, learns).is_forest:
        serve_forest(model)


def check_road(model: nn.Module, learns: bool = False) -> Road:
    """What serves a causal language model, by a trial where none of its kind was tried yet.

    Raises:
        ValueError: nothing does, with the reason.
    """
    road = remembered(model, ("causal", learns), lambda: try_causal(model, learns))
    if road.refusal:
        _of_model.pop(unwrapped(model), None)  # its configuration may be put right
        raise ValueError(f"{type(unwrapped(model)).__name__} {road.refusal}")
    leave_whole(model, road.is_whole)
    return road


def check_losses(model: nn.Module) -> None:
    """Refuse a mixture of experts whose configuration asks for a load-balancing loss.

    transformers would add it to its own loss, over all tokens of a batch, padding among them.

    Raises:
        ValueError: `output_router_logits` is set.
    """
    bare = unwrapped(model)
    if getattr(bare.config.get_text_config(), "output_router_logits", False):
        raise ValueError(
            f"{type(bare).__name__}: output_router_logits asks for a load-balancing loss, which no trainer "
            "here adds; set model.config.output_router_logits = False"
        )


def remembered(model: nn.Module, what: tuple, trial: Callable[[], Any]) -> Any:
    """What a trial found of this model or of one like it; the trial itself, the first time."""
    bare = unwrapped(model)
    own = _of_model.setdefault(bare, {})
    weight = next(bare.parameters())
    key = (*what, weight.dtype, weight.device.type, tuple(getattr(model, "peft_config", ())))
    if key not in own:
        like = (*key, type(bare), _words(bare.config))
        if like not in _found:
            _found[like] = trial()
        own[key] = _found[like]
    return own[key]


def _words(config: Any) -> str:
    """A configuration without what changes nothing."""
    return json.dumps(_without(config.to_dict()), sort_keys=True, default=str)


def _without(value: Any) -> Any:
    if isinstance(value, dict):
        return {str(k): _without(v) for k, v in value.items() if k not in VOLATILE}
    return value


@contextmanager
def trying(model: nn.Module) -> Iterator[None]:
    """Inside: evaluation mode, no autocast, no global random number; afterwards all is as it was."""
    device = next(model.parameters()).device
    devices = [device] if device.type == "cuda" else []
    with torch.random.fork_rng(devices), torch.autocast(device.type, enabled=False), evaluating(model):
        yield


def trial_tokens(model: nn.Module, lengths: Sequence[int]) -> list[list[int]]:
    """Rows of tokens that a configuration gives no name to, the same ones every time."""
    bare = unwrapped(model)
    size = len(bare.get_input_embeddings().weight)
    named = set()
    for key, value in bare.config.get_text_config().to_dict().items():
        if key.endswith(("_id", "_ids", "_index")):
            named |= {x for x in (value if isinstance(value, list) else [value]) if isinstance(x, int)}
    free = [token for token in range(min(size, 997)) if token not in named] or [0]
    places = iter(range(sum(lengths)))
    return [[free[(next(places) * 7 + 3) % len(free)] for _ in range(n)] for n in lengths]


def is_close(found: Tensor, wanted: Tensor) -> bool:
    """Whether two readings of the same N places are the same but for rounding. [N, ...] each."""
    if found.shape != wanted.shape or not bool(wanted.isfinite().any()):
        return False
    where = wanted.isfinite()  # some give no token but those of an alphabet a chance
    if not torch.equal(where, found.isfinite()):
        return False
    found, wanted = (x.detach().masked_fill(~where, 0).float() for x in (found, wanted))
    far = (found - wanted).abs().flatten() / wanted.abs().max().clamp(min=1e-12)
    return bool(far.max() <= CLOSE.get(found.device.type, 5e-3))


def is_close_in(dtype: torch.dtype, found: Tensor, wanted: Tensor) -> bool:
    """The same of a model of this dtype: in half precision one place in two may be off."""
    if dtype in (torch.float32, torch.float64):
        return is_close(found, wanted)
    far = (found.detach().float() - wanted.detach().float()).abs().reshape(len(wanted), -1).amax(1)
    return found.shape == wanted.shape and bool(far.median() <= LOOSE * wanted.float().abs().max())


def alone(model: nn.Module, row: Sequence[int]) -> Tensor:
    """Logits [n, V] of one sequence in a plain forward, in float32."""
    device = next(model.parameters()).device
    out = model(input_ids=torch.tensor([row], device=device), use_cache=False)
    logits = getattr(out, "logits", None)
    if logits is None or logits.ndim != 3 or logits.shape[:2] != (1, len(row)):
        raise TypeError("it gives no logits for each token")
    return logits[0].float()


def try_causal(model: nn.Module, learns: bool) -> Road:
    """The trial of a causal language model; with a gradient where it `learns`."""
    dtype = next(model.parameters()).dtype
    try:
        check_causal(model)
        with trying(model), torch.no_grad(), without_router(model):
            forest, paths = _planted(model)
            try:
                wanted = [alone(model, row) for row, _ in paths]
                again = alone(model, paths[0][0])
            except Exception as error:  # models refuse in many ways
                return Road(refusal=f"cannot be read as a causal language model: {said(error)}")
            if not is_close_in(dtype, again, wanted[0]):
                return Road(refusal="says something else each time it reads the same row; no road serves it")
            if not is_close_in(dtype, *(logits[: LENGTHS[0]] for logits in wanted[:2])):
                return Road(refusal=AHEAD)  # two answers to one question
            wanted, refusal = _laid(forest, paths, wanted), ""
            for is_whole in (False, True):
                leave_whole(model, is_whole)
                refusal = _refusal(model, forest, wanted, learns)
                if not refusal:
                    return Road(_serves_forest(model, forest, wanted, learns), is_whole)
            return Road(refusal=refusal)
    except ValueError as error:
        return Road(refusal=str(error).removeprefix(f"{type(unwrapped(model)).__name__} "))


def _refusal(model: nn.Module, forest: Forest, wanted: Tensor, learns: bool) -> str:
    """Why padded rows do not serve; nothing where they do."""
    try:
        found = _padded(model, forest, 1).logits()
    except Exception as error:  # as above
        return f"cannot be read in rows of unlike length: {said(error)}"
    if not is_close_in(next(model.parameters()).dtype, found, wanted):
        return AHEAD
    try:
        is_fine = not learns or bool(_slopes(model, forest, _padded).isfinite().all())
        return "" if is_fine else "has no finite gradient"
    except Exception as error:
        return f"cannot be trained: {said(error)}"


def said(error: BaseException) -> str:
    """An error in one line."""
    return f"{type(error).__name__}: {' '.join(str(error).split())[:160]}"


def _serves_forest(model, forest: Forest, wanted: Tensor, learns: bool) -> bool:
    dtype = next(model.parameters()).dtype
    with attention_kept(model):
        if not serve_forest(model):
            return False
        try:
            serves = is_close_in(dtype, _packed(model, forest).logits(), wanted[::2])
            if serves and learns:
                serves = is_close_in(dtype, *(_slopes(model, forest, run) for run in (_packed, _padded)))
        except Exception:  # whatever a model makes of a forest, padded rows serve it
            return False
    return serves


@contextmanager
def attention_kept(model: nn.Module) -> Iterator[None]:
    """Afterwards each part of a model has the attention that it had."""
    parts = [part for part in unwrapped(model).modules() if isinstance(part, PreTrainedModel)]
    before = [part.config._attn_implementation for part in parts]
    try:
        yield
    finally:
        for part, attention in zip(parts, before, strict=True):
            if part.config._attn_implementation != attention:
                part.set_attn_implementation(attention)


def _planted(model: nn.Module) -> tuple[Forest, list[tuple[list[int], list[int]]]]:
    """The trial's forest, and of each leaf its whole row and the places of this in the forest."""
    rows = trial_tokens(model, LENGTHS)
    segments = [Segment(row, parent) for row, parent in zip(rows, PARENTS, strict=True)]
    forest, paths = plant(segments).to(next(model.parameters()).device), []
    for i, (start, length, parent) in enumerate(zip(forest.starts, forest.lengths, PARENTS, strict=True)):
        if i in PARENTS:
            continue
        own, places = rows[i], list(range(start, start + length))
        if parent >= 0:
            first = forest.starts[parent]
            own, places = rows[parent] + own, [*range(first, first + forest.lengths[parent]), *places]
        paths.append((own, places))
    return forest, paths


def _laid(forest: Forest, paths, each: Sequence[Tensor]) -> Tensor:
    """Logits of each path at their places in the forest, [T, V]."""
    laid = each[0].new_zeros(len(forest.tokens), each[0].shape[1])
    for (_, places), logits in reversed(list(zip(paths, each, strict=True))):
        laid[places] = logits
    return laid


def _padded(model: nn.Module, forest: Forest, every: int = 2) -> Predictions:
    tokens, where = pad_forest(forest)
    return predict(model, lambda model: model(tokens, use_cache=False), where[::every])


def _packed(model: nn.Module, forest: Forest) -> Predictions:
    places = torch.arange(0, len(forest.tokens), 2, device=forest.tokens.device)  # some, as in training
    return predict(model, lambda model: run_forest(model, forest), places)


def _slopes(model: nn.Module, forest: Forest, run: Callable[[nn.Module, Forest], Predictions]) -> Tensor:
    """Of the loss of half of the forest's places; any tokens will do."""
    wanted = forest.tokens.roll(1)[::2]
    return slopes_of(model, forest.tokens, lambda: run(model, forest).summed_nll(wanted))


def slopes_of(model: nn.Module, tokens: Tensor, loss: Callable[[], Tensor]) -> Tensor:
    """What a loss means for the embedding of each of some distinct tokens, [tokens, H].

    No parameter gets a gradient.
    """
    seen: list[Tensor] = []

    def leaf(_, inputs, out):
        seen[:] = inputs[0], out.detach().requires_grad_()
        return seen[1].clone()  # some scale their embeddings in place

    hook = unwrapped(model).get_input_embeddings().register_forward_hook(leaf)
    try:
        with torch.enable_grad():
            slopes = torch.autograd.grad(loss(), seen[1])[0].flatten(0, -2).float()
    finally:
        hook.remove()
    read, distinct = seen[0].flatten(), tokens.unique()
    is_known = torch.isin(read, distinct)
    total = slopes.new_zeros(len(distinct), slopes.shape[1])
    return total.index_add_(0, torch.searchsorted(distinct, read[is_known]), slopes[is_known])


def mask_keys(model: nn.Module, mask: Tensor) -> dict[str, Tensor]:
    """`position_ids` that skip padding, for a mask [B, S] of either side, where the model takes some.

    Raises:
        ValueError: a row is padded on the left, and the model does not read such rows as it reads them alone.
    """
    if not bool(mask[:, 0].all()):
        if not remembered(model, ("left",), lambda: _reads_left(model)):
            raise ValueError(
                f"{type(unwrapped(model)).__name__} does not read rows that are padded on the left as it "
                "reads them alone (its positions do not skip padding); pad on the right"
            )
    return {"position_ids": positions_of(mask) + first_position(model)} if _takes_positions(model) else {}


def _takes_positions(model: nn.Module) -> bool:
    return "position_ids" in signature(unwrapped(model).forward).parameters


@torch.no_grad()
def _reads_left(model: nn.Module) -> bool:
    rows = trial_tokens(model, (6, 3))
    tokens, is_real = (x.to(next(model.parameters()).device) for x in left_pad(rows, 0))
    keys = {"position_ids": positions_of(is_real) + first_position(model)} if _takes_positions(model) else {}
    with trying(model), without_router(model):
        try:
            found = model(input_ids=tokens, attention_mask=is_real.long(), use_cache=False, **keys).logits
            wanted = torch.cat([alone(model, row) for row in rows])
        except Exception:
            return False
    return is_close_in(next(model.parameters()).dtype, found[is_real], wanted)


@contextmanager
def without_router(model: nn.Module) -> Iterator[None]:
    """Inside, a mixture of experts gives no router's logits: no loss is wanted of what is read."""
    config = unwrapped(model).config
    asking = [c for c in (config, config.get_text_config()) if getattr(c, "output_router_logits", False)]
    try:
        for config in asking:
            config.output_router_logits = False
        yield
    finally:
        for config in asking:
            config.output_router_logits = True


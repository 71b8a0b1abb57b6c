"""Several adapters on one base: which are at work, and the one that a policy's reference is.

The reference is what the policy says when its training begins. A fresh adapter says nothing yet, so the
reference is the base under what stays frozen (an adapter from SFT, or none). Of an adapter that has learnt
already and learns on, a frozen copy is kept, under the name `reference`: it is small, the base is not.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from copy import deepcopy

import torch
from torch import Tensor, nn

from tasks.lm.adapters.kinds import uninitialised
from tasks.lm.model.kinds import unwrapped
from tasks.lm.model.modes import evaluating

REFERENCE = "reference"
POLICY = "policy"  # the adapter that learns on top of a frozen one
SILENT = ("lora_B", "lora_embedding_B")  # a LoRA adapter whose B are zero adds nothing
LOW_RANK = (*SILENT, "lora_A", "lora_embedding_A")
SAME = 1e-5  # of a copy against its original, relative to the largest logit; products of equal weights agree


def at_work_on(model) -> list[str]:
    """Names of the adapters that a peft model runs with."""
    return list(model.active_adapters)


@contextmanager
def at_work(model, names: Sequence[str]) -> Iterator[nn.Module]:
    """Inside, these adapters of a peft model are at work and no other; none of them: the base alone.

    What learns stays what it was: peft itself would make trainable what it switches on.
    """
    before, flags = at_work_on(model), [(p, p.requires_grad) for p in model.parameters()]
    try:
        if names:
            model.base_model.set_adapter(list(names))
        else:
            model.base_model.disable_adapter_layers()
        _restore(flags)
        yield model
    finally:
        if names:
            model.base_model.set_adapter(before)
        else:
            model.base_model.enable_adapter_layers()
        _restore(flags)


def reference_adapters(model) -> list[str]:
    """The adapters of a peft model that together are the reference of a training that begins now.

    A copy is added to the model where the adapter that learns says something already.

    Raises:
        ValueError: a weight of the base itself learns, and with it would the reference; several adapters
            learn that say something already; or a copy does not say what the adapter says. The model is as
            it was.
    """
    names = at_work_on(model)
    learning = {name: _adapter_of(model, name) for name, p in model.named_parameters() if p.requires_grad}
    if loose := [name for name, adapter in learning.items() if adapter is None]:
        raise ValueError(
            f"ref_model: {loose[0]} is the base's own and learns, so that the base without its adapter is no "
            "reference; freeze it (a LoraConfig of bias='none'), or give a ref_model"
        )
    if REFERENCE in model.peft_config:
        return [REFERENCE]
    kept = [name for name in names if name not in learning.values()]
    spoken = [name for name in names if name not in kept and not _is_silent(model, name)]
    if not spoken:
        return kept
    if len(spoken) > 1:
        raise ValueError(f"ref_model: the adapters {', '.join(spoken)} all learn; merge, or give a ref_model")
    _copy(model, spoken[0], REFERENCE)
    _check_copy(model, names, [*kept, REFERENCE])
    return [*kept, REFERENCE]


def learnt(model) -> dict[str, Tensor]:
    """What a checkpoint of a model must hold: its state; under an adapter, what of it learns.

    The base, a reward adapter and a reference are what they were when the training began.

    Args:
        model: with a value head.
    """
    state = model.state_dict()
    if not model.is_peft_model:
        return state
    learns = {n for n, p in model.named_parameters(remove_duplicate=False) if p.requires_grad}
    return {name: value for name, value in state.items() if name in learns}


def load_learnt(model, saved: Mapping[str, Tensor]) -> None:
    """The inverse of :func:`learnt`.

    Raises:
        ValueError: it is of another model, or of other shapes; nothing has moved.
    """
    wanted = learnt(model)
    if strange := sorted(wanted.keys() ^ saved.keys()):
        raise ValueError(f"the checkpoint is of another model: {strange[0]} is on one side only")
    for name, value in saved.items():
        if value.shape != wanted[name].shape:
            shapes = f"{tuple(value.shape)}, the model's {tuple(wanted[name].shape)}"
            raise ValueError(f"the checkpoint is of another model: its {name} is {shapes}")
    model.load_state_dict(saved, strict=False)


def add_named(model, name: str, config, draws: bool = False) -> None:
    """One more adapter for a peft model, not at work yet and frozen; no weight of the base moves.

    Args:
        model: changed in place.
        name: of the adapter.
        config: peft's, unchanged.
        draws: whether its first weights matter: else the global random numbers stay where they are, and no
            initialisation runs that would move the base.
    """
    flags = [(p, p.requires_grad) for p in model.parameters()]
    modes = [(module, module.training) for module in model.modules()]
    with nullcontext() if draws else torch.random.fork_rng(devices=[]):
        model.add_adapter(name, deepcopy(config) if draws else uninitialised(config))
    if hasattr(config, "init_lora_weights"):  # a saved copy names it: its base is what that one has left
        model.peft_config[name].init_lora_weights = config.init_lora_weights
    for parameter in weights_of(model, name).values():
        parameter.requires_grad_(False)
    _restore(flags)
    model.train(model.training)  # the new parts; all others as they were
    for module, mode in modes:
        module.training = mode


def take_off(model, name: str) -> None:
    """The inverse of :func:`add_named`; of a model's only adapter nothing is taken off."""
    if len(model.peft_config) > 1:
        flags, names = [(p, p.requires_grad) for p in model.parameters()], at_work_on(model)
        model.delete_adapter(name)
        model.base_model.set_adapter(names)
        _restore(flags)


def weights_of(model, name: str) -> dict[str, nn.Parameter]:
    """The parameters of one adapter, by their names in the model."""
    found = {n: p for n, p in model.named_parameters(remove_duplicate=False)}
    return {n: p for n, p in found.items() if _adapter_of(model, n) == name}


@torch.no_grad()
def _copy(model, name: str, to: str) -> None:
    try:
        add_named(model, to, model.peft_config[name])
    except (ValueError, TypeError, RuntimeError, NotImplementedError) as error:  # peft's own refusals
        raise ValueError(
            f"ref_model: the adapter {name} cannot be copied ({' '.join(str(error).split())}); give "
            "ref_model=create_reference_model(model)"
        ) from error
    originals = _tensors_of(model, name)
    for place, copied in _tensors_of(model, to).items():
        copied.copy_(originals[".".join(name if part == to else part for part in place.split("."))])


def _tensors_of(model, name: str) -> dict[str, Tensor]:
    """Parameters of one adapter, and its buffers, of which some methods draw a part of what they say."""
    buffers = {n: b for n, b in model.named_buffers() if _adapter_of(model, n) == name}
    return {**weights_of(model, name), **buffers}


@torch.no_grad()
def _check_copy(model, names: Sequence[str], copies: Sequence[str]) -> None:
    """Refuse a copy that does not say what its original says of four tokens, and take it off again."""
    table = unwrapped(model).get_input_embeddings().weight
    ids = torch.arange(4, device=table.device)[None] % len(table)
    keys = {"decoder_input_ids": ids} if model.config.is_encoder_decoder else {}
    said = []
    with evaluating(model):
        for each in (names, copies):
            with at_work(model, each):
                said.append(model(input_ids=ids, use_cache=False, **keys).logits.float())
    far = float((said[1] - said[0]).abs().max() / said[0].abs().max().clamp(min=1e-12))
    if not far <= (SAME if table.dtype == torch.float32 else 1e-2):
        take_off(model, REFERENCE)
        raise ValueError(
            f"ref_model: a copy of the adapter {', '.join(names)} differs from it by {far:.2e} of the "
            "largest logit; give ref_model=create_reference_model(model)"
        )


def _adapter_of(model, parameter: str) -> str | None:
    """The adapter that a parameter belongs to; None: the base."""
    parts = parameter.split(".")
    return next((name for name in model.peft_config if name in parts), None)


def _is_silent(model, name: str) -> bool:
    """Whether an adapter adds nothing to what its base says."""
    for place, weight in weights_of(model, name).items():
        kind = next((part for part in place.split(".") if part in LOW_RANK), None)
        if kind is None or (kind in SILENT and weight.any()):
            return False
    return True


def _restore(flags: Sequence[tuple[nn.Parameter, bool]]) -> None:
    for parameter, flag in flags:
        parameter.requires_grad_(flag)

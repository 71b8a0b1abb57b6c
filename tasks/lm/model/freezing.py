"""Layer freezing: all that runs before the last k blocks of a model keeps its weights."""

from __future__ import annotations

from weakref import WeakKeyDictionary

import torch
from torch import nn

from tasks.lm.model.kinds import unwrapped
from tasks.lm.model.modes import evaluating

_stacks: WeakKeyDictionary[nn.Module, list[str]] = WeakKeyDictionary()


def freeze_layers(model: nn.Module, num_layers_unfrozen: int | None) -> None:
    """Leave trainable only what runs after the frozen trunk: the last k blocks, the last norm, the head.

    The trunk's outputs then stay what they were. Embeddings belong to it, and with them a head that is tied
    to them; the last blocks of an encoder-decoder are the decoder's, and its trunk the whole encoder and the
    rest of the decoder. What is frozen already stays so (the base weights under an adapter).

    Args:
        model: a language model, a reward model or an encoder, bare or under PEFT.
        num_layers_unfrozen: k; 0: the head and the last norm alone; None: nothing is frozen.

    Raises:
        ValueError: k is negative or larger than the model, the model has no stack of blocks, or nothing
            would be left to train.
    """
    if num_layers_unfrozen is None:
        return
    blocks = len(blocks_of(model))
    if not 0 <= num_layers_unfrozen <= blocks:
        raise ValueError(f"num_layers_unfrozen is {num_layers_unfrozen}; the model has {blocks} blocks")
    for module in trunk_of(model, blocks - num_layers_unfrozen):
        module.requires_grad_(False)
    if not any(parameter.requires_grad for parameter in model.parameters()):
        raise ValueError(f"num_layers_unfrozen is {num_layers_unfrozen}: nothing is left to train")


def trunk_of(model: nn.Module, layers: int) -> list[nn.Module]:
    """The first blocks, so many of them, and all else with parameters that runs before they have run."""
    blocks = blocks_of(model)
    return [*blocks[:layers], *_run_before(model, blocks, layers)]  # experts may not all have run


def blocks_of(model: nn.Module) -> nn.ModuleList:
    """The stack of a model's blocks, first to last; the decoder's where there is an encoder.

    Raises:
        ValueError: there is no one stack.
    """
    bare = unwrapped(model)
    if bare.config.is_encoder_decoder:
        stacks = [m for m in bare.get_decoder().children() if isinstance(m, nn.ModuleList)]
        what = "one stack of blocks in a decoder"
    else:
        layers = getattr(bare.config.get_text_config(), "num_hidden_layers", None)
        stacks = [m for m in bare.modules() if isinstance(m, nn.ModuleList) and len(m) == layers]
        what = "one stack of blocks that run one after the other"
        if len(stacks) != 1:
            if bare not in _stacks:
                _stacks[bare] = _run_in_order(bare)
            stacks = [bare.get_submodule(name) for name in _stacks[bare]]
    if len(stacks) != 1:
        raise ValueError(f"{type(bare).__name__} has no {what} to freeze")
    return stacks[0]


def _run_in_order(bare: nn.Module) -> list[str]:
    """Names of the lists of modules that one forward runs from first to last, each once.

    Of lists in lists the outer ones, and of these the longest.
    """
    lists = {name: m for name, m in bare.named_modules() if isinstance(m, nn.ModuleList) and len(m)}
    of = {module: (name, i) for name, stack in lists.items() for i, module in enumerate(stack)}
    ran: dict[str, list[int]] = {name: [] for name in lists}

    def note(module: nn.Module, _) -> None:
        name, i = of[module]
        ran[name].append(i)

    hooks = [module.register_forward_pre_hook(note) for module in of]
    try:
        _run_one_token(bare)
    finally:
        for hook in hooks:
            hook.remove()
    whole = [name for name in lists if ran[name] == list(range(len(lists[name])))]
    outer = [name for name in whole if not any(name.startswith(f"{other}.") for other in lists)]
    most = max((len(lists[name]) for name in outer), default=0)
    return [name for name in outer if len(lists[name]) == most]


@torch.no_grad()
def _run_before(model: nn.Module, blocks: nn.ModuleList, trunk: int) -> list[nn.Module]:
    """Modules with parameters of their own that run before block `trunk` does, found by one forward."""
    bare, found, is_over = unwrapped(model), [], []
    owners = [m for m in bare.modules() if _owns_parameters(m)]

    def note(module: nn.Module, _) -> None:
        if not is_over:
            found.append(module)

    hooks = [module.register_forward_pre_hook(note) for module in owners]
    if trunk < len(blocks):
        hooks.append(blocks[trunk].register_forward_pre_hook(lambda *_: is_over.append(True), prepend=True))
    else:
        hooks.append(blocks[-1].register_forward_hook(lambda *_: is_over.append(True)))
    try:
        _run_one_token(bare)
    finally:
        for hook in hooks:
            hook.remove()
    return found


@torch.no_grad()
def _run_one_token(bare: nn.Module) -> None:
    """A forward for those who watch it; no mode and no random state is another one afterwards."""
    device = next(bare.parameters()).device
    token = torch.zeros(1, 1, dtype=torch.long, device=device)
    with evaluating(bare), torch.random.fork_rng([device] if device.type == "cuda" else []):
        try:
            if bare.config.is_encoder_decoder:  # without a head of classes, which looks for eos
                bare.base_model(input_ids=token, decoder_input_ids=token)
            else:
                bare(input_ids=token, use_cache=False)
        except (ValueError, TypeError, RuntimeError, AttributeError, KeyError, IndexError) as error:
            raise ValueError(
                f"{type(bare).__name__} cannot be run on one token, to find what its blocks read: {error}"
            ) from error


def _owns_parameters(module: nn.Module) -> bool:
    """Whether parameters stand in a module itself, or in dictionaries of it, as those of adapters do."""
    held = [m for m in module.children() if isinstance(m, nn.ParameterDict | nn.ParameterList)]
    return any(next(m.parameters(recurse=False), None) is not None for m in (module, *held))

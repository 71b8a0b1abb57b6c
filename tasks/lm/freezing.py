"""Layer freezing: all that runs before the last k blocks of a model keeps its weights."""

from __future__ import annotations

import torch
from torch import nn

from tasks.lm.forest import unwrapped


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
        layers = bare.config.get_text_config().num_hidden_layers
        stacks = [m for m in bare.modules() if isinstance(m, nn.ModuleList) and len(m) == layers]
        what = f"one stack of {layers} blocks"
    if len(stacks) != 1:
        raise ValueError(f"{type(bare).__name__} has no {what} to freeze")
    return stacks[0]


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
    token = torch.zeros(1, 1, dtype=torch.long, device=next(bare.parameters()).device)
    try:
        if bare.config.is_encoder_decoder:  # without a head of classes, which looks for eos
            bare.base_model(input_ids=token, decoder_input_ids=token)
        else:
            bare(input_ids=token)
    finally:
        for hook in hooks:
            hook.remove()
    return found


def _owns_parameters(module: nn.Module) -> bool:
    """Whether parameters stand in a module itself, or in dictionaries of it, as those of adapters do."""
    held = [m for m in module.children() if isinstance(m, nn.ParameterDict | nn.ParameterList)]
    return any(next(m.parameters(recurse=False), None) is not None for m in (module, *held))

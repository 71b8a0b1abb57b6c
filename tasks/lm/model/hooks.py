"""What modules are called with and what they give, read beside a forward that goes on as it would."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from torch import Tensor, nn

from tasks.lm.model.kinds import unwrapped

Call = tuple[tuple, dict]  # arguments by place and by name


@contextmanager
def calls_of(modules: Sequence[nn.Module]) -> Iterator[list[Call]]:
    """What these modules are called with while the context is open, in the order of the calls."""
    calls: list[Call] = []
    hooks = [
        module.register_forward_pre_hook(lambda _, args, keys: calls.append((args, keys)), with_kwargs=True)
        for module in modules
    ]
    try:
        yield calls
    finally:
        for hook in hooks:
            hook.remove()


@contextmanager
def states_of(model: nn.Module) -> Iterator[list[Tensor]]:
    """What a value head reads in each forward while the context is open, [..., H].

    Those are the states that reach the output embeddings; with an encoder, those that the decoder gives,
    which T5 scales on their way.
    """
    bare, found = unwrapped(model), []
    decoder = bare.get_decoder() if bare.config.is_encoder_decoder else None
    if decoder is None or decoder.get_output_embeddings() is not None:  # two models coupled: it has the head
        head = bare.get_output_embeddings()
        hook = head.register_forward_pre_hook(lambda _, inputs: found.append(inputs[0]))
    else:
        hook = decoder.register_forward_hook(lambda _, inputs, out: found.append(out[0]))
    try:
        yield found
    finally:
        hook.remove()

"""The last block's MLP, only where its result is read: what it would add elsewhere reaches no prediction.

Attention needs every token's key and value, the MLP behind it only the tokens that predict. In PPO these are
the responses', a quarter of a batch.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from weakref import WeakSet

from torch import Tensor, nn

from tasks.lm.model.kinds import unwrapped

WORTH = 0.9  # of the tokens; when more are read, all are computed

_whole: WeakSet[nn.Module] = WeakSet()  # models whose last MLP reads more than the token it is asked about


@contextmanager
def last_mlp_at(model: nn.Module, places: Tensor) -> Iterator[None]:
    """Inside, the last hidden states are right at some places, and elsewhere lack what the last MLP adds.

    A model whose last block has no module `mlp` that takes and gives one tensor computes all of them, and so
    does one under gradient checkpointing.

    Args:
        model: a causal language model, bare or under PEFT.
        places: [N] int64, of the B·S places of a batch.
    """
    block = _last_block(model)
    mlp = getattr(block, "mlp", None)
    runs_again = getattr(block, "gradient_checkpointing", False) and block.training  # when the hooks are gone
    runs_again = runs_again or "forward" in getattr(block, "__dict__", ())  # by tasks.lm.model.recompute
    is_whole = unwrapped(model) in _whole
    if not isinstance(mlp, nn.Module) or runs_again or is_whole or not len(places):
        yield
        return
    distinct, shape = places.unique(), []

    def give(_, inputs, keys):
        shape.clear()
        if len(inputs) != 1 or keys or len(distinct) > WORTH * inputs[0][..., 0].numel():
            return None
        shape.append(inputs[0].shape)
        return (inputs[0].flatten(0, -2).index_select(0, distinct)[None],), keys

    def take(_, inputs, out):
        if not shape:
            return None
        added, *beside = out if isinstance(out, tuple) else (out,)  # experts give their choice as well
        whole = added.new_zeros(*shape[0][:-1], added.shape[-1])
        whole = whole.flatten(0, -2).index_copy(0, distinct, added[0]).view_as(whole)
        return (whole, *beside) if isinstance(out, tuple) else whole

    hooks = [mlp.register_forward_pre_hook(give, with_kwargs=True), mlp.register_forward_hook(take)]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def leave_whole(model: nn.Module, is_wanted: bool = True) -> None:
    """From now on the last MLP of this model is computed everywhere; or else only where it is read."""
    (_whole.add if is_wanted else _whole.discard)(unwrapped(model))


def _last_block(model: nn.Module) -> nn.Module | None:
    bare = unwrapped(model)
    parts = bare.get_decoder() if bare.config.is_encoder_decoder else bare  # the places are the decoder's
    layers = getattr(bare.config.get_text_config(), "num_hidden_layers", 0)
    stacks = [m for m in parts.modules() if isinstance(m, nn.ModuleList) and len(m) == layers]
    return stacks[0][-1] if len(stacks) == 1 and layers else None

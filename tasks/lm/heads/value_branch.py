"""The critic: one linear layer over the policy's states, or over those of blocks of its own.

Blocks of its own are copies of the policy's last ones, which learn from the value loss alone. They read what
enters the first block that was copied, so the trunk below runs once for both; and they are called with what
the policy's are called with (masks, positions, the forest), whatever that is.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from tasks.lm.model.freezing import blocks_of
from tasks.lm.model.hooks import Call, calls_of, states_of
from tasks.lm.model.kinds import unwrapped

ROUNDING = {torch.float32: 1e-4, torch.float64: 1e-4}  # of the largest state; 5e-2 in half precision


class ValueBranch(nn.Module):
    """Trainable copies of the last k blocks, and of what stands between them and the model's last states.

    Copies of layers under an adapter are plain: what it adds is merged into them.

    Args:
        model: a language model, bare or under PEFT; unchanged. With an encoder, the blocks are the decoder's.
        layers: k.

    Raises:
        ValueError: k is less than 1 or more than the model has, the model is quantised, or its states are
            more than its blocks and what follows them, one after the other, make of their input.
    """

    def __init__(self, model: nn.Module, layers: int) -> None:
        super().__init__()
        blocks, name = blocks_of(model), type(unwrapped(model)).__name__
        if not 1 <= layers <= len(blocks):
            raise ValueError(f"num_value_layers_unfrozen is {layers}; the model has {len(blocks)} blocks")
        calls, between, wanted = _trial(model, blocks[-layers:])
        self.blocks, self.between = (_plain_copies(parts) for parts in (blocks[-layers:], between))
        if not all(parameter.is_floating_point() for parameter in self.parameters()):
            raise ValueError(f"num_value_layers_unfrozen is {layers}; {name} is quantised")
        with torch.no_grad():
            found = self.eval()(calls)
        far = (found - wanted).abs().max() / wanted.abs().max()
        if not far <= ROUNDING.get(wanted.dtype, 5e-2):
            raise ValueError(f"num_value_layers_unfrozen is {layers}; copies do not say what {name} says")
        self.requires_grad_(True)

    def originals(self, model: nn.Module) -> nn.ModuleList:
        """The policy's blocks that were copied; the copies checkpoint their activations where these do."""
        originals = blocks_of(model)[-len(self.blocks) :]
        for block, original in zip(self.blocks, originals, strict=True):
            for name in ("gradient_checkpointing", "_gradient_checkpointing_func"):
                if hasattr(original, name):
                    setattr(block, name, getattr(original, name))
        return originals

    def forward(self, calls: Sequence[Call]) -> Tensor:
        """Calls of the k originals in one forward of the policy -> states [..., H] for the value head."""
        (state, *_), _ = calls[0]
        for block, (args, keys) in zip(self.blocks, calls, strict=True):
            out = block(state, *args[1:], **keys)
            state = out[0] if isinstance(out, tuple) else out
        for module in self.between:
            state = module(state)
        return state


class ValueHead(nn.Module):
    """One linear layer over the model's last states, or over blocks of its own; float32.

    Args:
        hidden_size: H.
        init_strategy: `zeros`: the first advantages are the rewards themselves; `normal`: weights of this
            deviation, no bias; None or `random`: as torch starts a linear layer, TRL's default.
        initializer_range: standard deviation of `normal`.
        dropout_prob: of the states.
        branch: the blocks of its own.

    Raises:
        ValueError: another `init_strategy`.
    """

    def __init__(
        self,
        hidden_size: int,
        init_strategy: str | None = "zeros",
        initializer_range: float = 0.2,
        dropout_prob: float = 0.0,
        branch: ValueBranch | None = None,
    ) -> None:
        super().__init__()
        self.dropout = nn.Dropout(dropout_prob) if dropout_prob else nn.Identity()
        self.summary = nn.Linear(hidden_size, 1)
        self.branch = branch
        if init_strategy not in ("zeros", "normal", "random", None):
            raise ValueError(f"v_head_init_strategy is {init_strategy!r}; zeros, normal or random is wanted")
        if init_strategy == "zeros":
            nn.init.zeros_(self.summary.weight)
        if init_strategy == "normal":
            nn.init.normal_(self.summary.weight, std=initializer_range)
        if init_strategy in ("zeros", "normal"):
            nn.init.zeros_(self.summary.bias)

    def forward(self, hidden: Tensor) -> Tensor:
        """Hidden [..., H] -> values [...], float32, under autocast too."""
        weight = self.summary.weight
        with torch.autocast(weight.device.type, enabled=False):
            return self.summary(self.dropout(hidden).to(weight)).squeeze(-1).float()

    def load_saved(self, saved: dict[str, Tensor]) -> None:
        """Take over saved tensors; blocks of its own stay as they are where none were saved.

        Raises:
            ValueError: they are of another head.
        """
        kept = {} if branch_layers(saved) else {k: v for k, v in self.state_dict().items() if "branch." in k}
        try:
            self.load_state_dict(kept | saved)
        except RuntimeError as error:
            raise ValueError(f"the saved value head does not fit: {error}") from error


def branch_layers(saved: dict[str, Tensor]) -> int:
    """How many blocks of its own a saved value head has."""
    return len({name.split(".")[2] for name in saved if name.startswith("branch.blocks.")})


@torch.no_grad()
def _trial(model: nn.Module, originals: Sequence[nn.Module]) -> tuple[list[Call], list[nn.Module], Tensor]:
    """One forward without dropout: the calls of these blocks, what runs behind the last, and the states."""
    bare, between, running, is_behind = unwrapped(model), [], [], []
    head, modes = bare.get_output_embeddings(), [(m, m.training) for m in bare.modules()]

    def enter(module: nn.Module, _) -> None:
        if is_behind and not running:
            between.append(module)
        if is_behind:
            running.append(module)

    def leave(module: nn.Module, *_) -> None:
        if running and running[-1] is module:
            running.pop()

    hooks = [originals[-1].register_forward_hook(lambda *_: is_behind.append(True))]
    for module in bare.modules():
        hooks += [module.register_forward_pre_hook(enter), module.register_forward_hook(leave)]
    tokens = torch.arange(4, device=head.weight.device)[None] % len(head.weight)
    asked = {"decoder_input_ids": tokens} if bare.config.is_encoder_decoder else {}
    try:
        with calls_of(originals) as calls, states_of(bare) as states:
            bare.eval()(input_ids=tokens, use_cache=False, **asked)
    finally:
        for hook in hooks:
            hook.remove()
        for module, mode in modes:
            module.training = mode
    return calls, between[: between.index(head)], states[0]


def _plain_copies(modules: Sequence[nn.Module]) -> nn.ModuleList:
    """Copies that share their configuration with the originals, so that both attend in the same way."""
    configs = [c for part in modules for m in part.modules() if (c := getattr(m, "config", None)) is not None]
    copies = nn.ModuleList(copy.deepcopy(list(modules), {id(config): config for config in configs}))
    for name, module in list(copies.named_modules()):
        if hasattr(module, "unload_and_optionally_merge_module"):  # as peft itself unloads
            asked = {"merge": True, "safe_merge": False, "adapter_names": None}
            copies.set_submodule(name, module.unload_and_optionally_merge_module(**asked))
        elif hasattr(module, "base_layer"):
            module.merge()
            copies.set_submodule(name, module.get_base_layer())
    return copies

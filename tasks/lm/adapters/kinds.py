"""Which adapters of peft are served, and what the initialisation of one does to the base below it.

Some initialisations move a part of the base's weights into the adapter (PiSSA, OLoRA, …): the base is another
one afterwards. That may happen once, where the adapter is made for training. It must not happen again: a
second one would be cut out of what the first has left, and the policy would be destroyed in silence.
"""

from __future__ import annotations

from copy import deepcopy
from typing import Any

from torch import nn

REFUSED = {  # types of peft, and what keeps them from being what they say
    "ADAPTION_PROMPT": "it stands in the attention itself, where no second adapter and no merge is",
    "LILY": "its routers average over a batch, so that a row says something else beside others",
    "POLY": "its forward wants task_ids, which no trainer here gives",
    "SHADOW": "its forward is that of another model beside this one",
    "XLORA": "it runs every batch twice to choose among adapters",
}
ADAPTIVE = {  # types that need a call after each step
    "ADALORA": "its ranks follow a schedule (update_and_allocate) and its loss has a further term; no "
    "trainer here gives these, so that it would be a plain LoRA of too high a rank",
}
OPTIONS = {  # of a LoraConfig
    "alora_invocation_tokens": "is looked for in a row of one document, and rows here hold several",
    "arrow_config": "chooses among adapters for each token",
    "kasa_config": "cuts the base's weights down before training begins",
    "layer_replication": "makes blocks of one memory, which neither a merge nor the forest can tell apart",
    "monteclora_config": "needs a further term of the loss, which no trainer here adds",
}
HARMLESS = ("true", "false", "none", "gaussian", "eva", "orthogonal", "mica")  # leave the base as it is
REPEATABLE = ("pissa", "olora")  # cut out of the base what the same base gives again
INSTEAD = "take LoRA (or any other type that adds to layers)"


def check_kind(config: Any, learns: bool = True, key: str = "peft_config") -> None:
    """Refuse an adapter that would not be what its configuration says.

    Args:
        config: peft's.
        learns: whether it is to be trained.
        key: names it in messages.

    Raises:
        ValueError: its type or an option of it is not served, or it cuts out of the base what neither a
            saved adapter nor a resumed run could cut out again.
    """
    kind = getattr(config.peft_type, "value", config.peft_type)
    name = type(config).__name__
    if config.is_prompt_learning:
        raise ValueError(f"{key}: {name} adds virtual tokens, which no forest serves; {INSTEAD}")
    reason = REFUSED.get(kind) or (ADAPTIVE.get(kind) if learns else None)
    if reason is not None:
        raise ValueError(f"{key}: {name} is not served: {reason}; {INSTEAD}")
    for option, why in OPTIONS.items():
        if getattr(config, option, None):
            raise ValueError(f"{key}: {option} is not served: it {why}; leave it out")
    if getattr(config, "use_asa", False):
        raise ValueError(f"{key}: use_asa is not served: it needs a call after each step; leave it out")
    init = rewrites(config)
    if init is not None and init not in REPEATABLE:
        raise ValueError(
            f"{key}: init_lora_weights={init!r} cuts out of the base what cannot be cut out again when the "
            "adapter is loaded; take 'pissa' or 'olora', or 'eva' or 'orthogonal', which leave the base alone"
        )


def check_adapters(model: nn.Module, key: str = "model") -> None:
    """Refuse a model under adapters of which one is not served; one without adapters passes.

    Raises:
        ValueError: as :func:`check_kind`, or an adapter that transformers itself has put on.
    """
    configs = getattr(model, "peft_config", None)
    if not configs:
        return
    if not hasattr(model, "get_base_model"):
        raise ValueError(
            f"{key}: {type(model).__name__} has an adapter by transformers' own add_adapter; put it on with "
            "peft.get_peft_model, or give peft_config"
        )
    learning = {part for n, p in model.named_parameters() if p.requires_grad for part in n.split(".")}
    for name, config in configs.items():
        check_kind(config, name in learning, key)


def rewrites(config: Any) -> str | None:
    """The initialisation of an adapter that moves weights of the base into it; None: the base stays.

    Of one that this list does not know the worst is believed.
    """
    kind = getattr(config.peft_type, "value", config.peft_type)
    init = str(getattr(config, "init_lora_weights", True)).lower()
    return None if kind != "LORA" or init in HARMLESS else init


def uninitialised(config: Any) -> Any:
    """A copy of a configuration that leaves the base as it is; what it draws is to be replaced."""
    config = deepcopy(config)
    if rewrites(config) is not None:
        config.init_lora_weights = False
    return config

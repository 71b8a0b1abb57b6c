"""Dropout off: what shares a question sees one draw of its noise, so that no two ways of batching agree."""

from __future__ import annotations

from torch import nn
from torch.nn.modules.dropout import _DropoutNd


def disable_dropout(model: nn.Module) -> None:
    """Set every rate to 0: of dropout modules, and those that layers keep as numbers and apply themselves.

    The configuration, which is saved with the model, keeps its rates.
    """
    for module in model.modules():
        if isinstance(module, _DropoutNd):
            module.p = 0.0
        for name, value in vars(module).items():
            if "drop" in name and isinstance(value, float):
                setattr(module, name, 0.0)

"""Evaluation mode while something is sampled, scored or read, and every flag as it was afterwards."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import wraps
from typing import Any

from torch import nn


@contextmanager
def evaluating(*models: nn.Module | None) -> Iterator[None]:
    """Inside, all modules of these models are in evaluation mode; afterwards each is in the mode it had.

    Args:
        models: may overlap; None: nothing is done.
    """
    modules = [module for model in models if isinstance(model, nn.Module) for module in model.modules()]
    training = [module for module in modules if module.training]
    try:
        for module in training:
            module.training = False
        yield
    finally:
        for module in training:
            module.training = True


def in_evaluation(method: Callable) -> Callable:
    """A method of what has a `model` and a `ref_model`, run with both :func:`evaluating`."""

    @wraps(method)
    def evaluated(self: Any, *args: Any, **keys: Any) -> Any:
        with evaluating(self.model, self.ref_model):
            return method(self, *args, **keys)

    return evaluated

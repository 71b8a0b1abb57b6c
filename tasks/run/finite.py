"""What is not finite goes nowhere: no loss is trained on, no metric written, no weight loaded or saved."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor, nn

NOT_FINITE = "holds a number that is not finite"


def check_numbers(what: str, values: Any) -> None:
    """Refuse a nan or an infinity in nested values.

    Args:
        what: they are, for the message.
        values: a mapping, a sequence, or what is in one; only numbers are looked at.

    Raises:
        ValueError: names the first by its dotted place.
    """
    for name, value in _numbers(values):
        if not math.isfinite(value):
            raise ValueError(f"{what}: {name} is {value}" if name else f"{what} is {value}")


def _numbers(values: Any, place: str = "") -> Iterator[tuple[str, float]]:
    if isinstance(values, float):
        yield place, values
    elif isinstance(values, Mapping):
        for name, value in values.items():
            yield from _numbers(value, f"{place}.{name}".lstrip("."))
    elif isinstance(values, Sequence) and not isinstance(values, str | bytes):
        for i, value in enumerate(values):
            yield from _numbers(value, f"{place}[{i}]")


def first_not_finite(tensors: Iterable[tuple[str, Tensor]]) -> str | None:
    """The name of the first tensor with a number that is not finite; integers have none.

    Each is read once, as a sum: a third of a second for a GB on one slow core.
    """
    return next((name for name, tensor in tensors if not _is_finite(tensor)), None)


def check_tensors(what: str, tensors: Mapping[str, Tensor]) -> None:
    """Refuse tensors with a number that is not finite.

    Args:
        what: they are, for the message.
        tensors: by name.

    Raises:
        ValueError: names the first.
    """
    if name := first_not_finite(tensors.items()):
        raise ValueError(f"{what}: {name} {NOT_FINITE}")


def check_weights(what: str, model: nn.Module) -> None:
    """:func:`check_tensors` of a model's parameters; a buffer may hold −∞, as a mask does."""
    if name := first_not_finite(model.named_parameters()):
        raise ValueError(f"{what}: {name} {NOT_FINITE}")


def _is_finite(tensor: Tensor) -> bool:
    import torch

    tensor = tensor.detach()
    if hasattr(tensor, "to_local"):  # of sharded weights this process's own
        tensor = tensor.to_local()
    if tensor.is_meta or not tensor.is_floating_point():
        return True
    if tensor.element_size() == 1:  # eight bits cannot be summed
        tensor = tensor.float()
    wide = torch.float32 if tensor.element_size() < 4 else tensor.dtype
    # a sum needs no second tensor; that of finite numbers may overflow, so it alone condemns nothing
    return bool(tensor.sum(dtype=wide).isfinite()) or bool(tensor.isfinite().all())

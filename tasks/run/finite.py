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


class FiniteTraining:
    """A mixin that stands before Trainer: training ends at the first loss or gradient that is not finite.

    Trainer would leave such a loss out of its log (`logging_nan_inf_filter` shows 0 in its stead) and go on
    with weights that are lost. The norm is not looked at under a gradient scaler, which finds its scale by
    steps that overflow and skips them itself.
    """

    section = ""  # "sft.": of the parameters, for messages

    def training_step(self, *args: Any, **keys: Any) -> Tensor:
        """As Trainer's.

        Raises:
            ValueError: the loss of the batch is not finite.
        """
        loss = super().training_step(*args, **keys)
        if not math.isfinite(value := loss.item()):
            raise self.diverged(f"the loss is {value}")
        return loss

    def _get_grad_norm(self, model: nn.Module, grad_norm: Any = None) -> Any:
        norm = super()._get_grad_norm(model, grad_norm=grad_norm)
        is_scaled = getattr(self.accelerator, "scaler", None) is not None
        if norm is not None and not is_scaled and not math.isfinite(value := float(norm)):
            raise self.diverged(f"the norm of the gradient is {value}")
        return norm

    def diverged(self, finding: str) -> ValueError:
        """What ends the training, in words; the step is the one that was being taken."""
        rate, step = self.args.learning_rate, self.state.global_step + 1
        return ValueError(f"step {step}: {finding}; is {self.section}learning_rate ({rate:g}) too high?")

    def check_measured(self, metrics: Mapping[str, float]) -> None:
        """Refuse what was measured of held-out rows where it is not finite.

        Raises:
            ValueError: names the metric.
        """
        try:
            check_numbers(f"after step {self.state.global_step}", metrics)
        except ValueError as error:
            rate = f"{self.section}learning_rate ({self.args.learning_rate:g})"
            raise ValueError(f"{error}; is {rate} too high?") from None

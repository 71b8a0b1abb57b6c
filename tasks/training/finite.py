"""Training ends at the first number that is not finite."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from tasks.run.finite import check_numbers

if TYPE_CHECKING:
    from torch import Tensor, nn


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

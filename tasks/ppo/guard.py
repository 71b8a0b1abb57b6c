"""Which optimizer steps are taken: none that is not finite, none that explodes."""

from __future__ import annotations

import logging
import math
from collections import deque
from statistics import median
from typing import Any

REMEMBERED, LEAST = 64, 16  # norms of steps that were taken; as many before an outlier is one
_log = logging.getLogger(__name__)


class SpikeGuard:
    """Counts and reports what it refuses; a refused step moves neither weights nor the optimizer's moments.

    Args:
        ratio_threshold: largest mean of probability ratios.
        spike_factor: largest gradient norm, in medians of the recent ones.
        patience: steps refused in a row before the training is lost.
    """

    def __init__(self, ratio_threshold: float, spike_factor: float, patience: int) -> None:
        self.ratio_threshold, self.spike_factor, self.patience = ratio_threshold, spike_factor, patience
        self.norms: deque[float] = deque(maxlen=REMEMBERED)
        self.skipped, self.in_a_row = 0, 0

    @property
    def is_lost(self) -> bool:
        """Whether only a return to earlier weights can help."""
        return self.in_a_row >= self.patience

    def allows(self, loss: float, ratio: float, norm: float) -> bool:
        """Whether to take a step of this loss, mean ratio and gradient norm (before clipping)."""
        finding = self._finding(loss, ratio, norm)
        if finding:
            self.skipped, self.in_a_row = self.skipped + 1, self.in_a_row + 1
            _log.warning("PPO: a step is skipped: %s (%d in a row)", finding, self.in_a_row)
            return False
        self.norms.append(norm)
        self.in_a_row = 0
        return True

    def _finding(self, loss: float, ratio: float, norm: float) -> str | None:
        if not (math.isfinite(loss) and math.isfinite(norm)):
            return f"loss {loss:g}, gradient norm {norm:g}"
        if not ratio <= self.ratio_threshold:
            return f"the mean ratio {ratio:.3g} exceeds ratio_threshold {self.ratio_threshold:g}"
        if len(self.norms) >= LEAST and norm > self.spike_factor * (usual := median(self.norms)) > 0:
            return (
                f"the gradient norm {norm:.3g} is more than {self.spike_factor:g} times the usual {usual:.3g}"
            )
        return None

    def state_dict(self) -> dict[str, Any]:
        """What it remembers."""
        return {"norms": list(self.norms), "skipped": self.skipped, "in_a_row": self.in_a_row}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """The inverse of :meth:`state_dict`."""
        self.norms = deque(state["norms"], maxlen=REMEMBERED)
        self.skipped, self.in_a_row = state["skipped"], state["in_a_row"]

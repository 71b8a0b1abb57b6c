"""How good a second opinion the judge is: on the same held-out pairs, beside the reward model."""

from __future__ import annotations

import numpy as np

from tasks.reward_eval.pairs import HeldOut


def beside(held: HeldOut, judged: np.ndarray) -> dict[str, float | None]:
    """The judge's accuracy, and how often it is right where the reward model is wrong. Scores [A].

    A tie is wrong, of either. None where the reward model makes no mistake.
    """
    own, other = held.differences(held.scores) > 0, held.differences(judged) > 0
    return {
        "accuracy": float(other.mean()),
        "of_mistakes": float(other[~own].mean()) if not own.all() else None,
    }

"""How good a second opinion the judge is: on the same held-out pairs, beside the reward model."""

from __future__ import annotations

import numpy as np

from tasks.reward_eval.measures import interval
from tasks.reward_eval.pairs import HeldOut
from tasks.reward_eval.truth import LEAST_OF_JUDGE, against_style


def beside(
    held: HeldOut, judged: np.ndarray, cut: np.ndarray, truth: dict | None, samples: int, seed: int
) -> dict[str, float | bool | None]:
    """The judge's accuracy, and how often it is right where the reward model is wrong. A tie is wrong.

    Args:
        held: the held-out answers.
        judged: the judge's scores of them, [A].
        cut: the same of answers that are cut of their eos, [A].
        truth: what :func:`tasks.reward_eval.truth.right_beats_wrong` says of a scorer `judge`.
        samples: resamples of clusters behind the interval.
        seed: of the resamples.

    Returns:
        `accuracy`, its `interval`, `accuracy_without_eos`; `of_mistakes`, None where the reward model makes
        none; `style_against_truth`, None where styles or truth are not known; `is_judge`: whether that
        reaches `LEAST_OF_JUDGE`, true where it is not known.
    """
    own, other = held.differences(held.scores) > 0, held.differences(judged) > 0
    against = against_style(truth, "judge")
    return {
        "accuracy": float(other.mean()),
        "interval": interval(held.cluster_of, other.astype(float), samples, seed),
        "accuracy_without_eos": float((held.differences(cut) > 0).mean()),
        "of_mistakes": float(other[~own].mean()) if not own.all() else None,
        "style_against_truth": against,
        "is_judge": against is None or against >= LEAST_OF_JUDGE,
    }

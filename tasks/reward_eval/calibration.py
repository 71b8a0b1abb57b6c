"""Whether margins can be read as log-odds: P(a is better than b) = σ(score of a − score of b).

Every pair counts in both orientations. The better answer first would have the outcome 1 everywhere; an order
chosen at random would add noise. With both, a bin of P and its mirror hold the same pairs, so the upper half
says all: *confidence* max(P, 1 − P), from ½ on, against how often the higher score is the better answer's.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np

from tasks.reward_eval.measures import interval
from tasks.run.files import staged
from tasks.run.text_rule import fit_logistic, sigmoid

BINS = 10  # of confidence, equally wide: 0.05
BLUE = "#1f5a91"


def brier(margins: np.ndarray) -> float:
    """Mean of (1 − P(better))², same in both orientations: 0 is perfect, ¼ knows nothing. Margins [P]."""
    return float((sigmoid(-margins) ** 2).mean())


def log_loss(margins: np.ndarray) -> float:
    """Mean of −ln P(better), nats: 0 is perfect, ln 2 knows nothing. Margins [P]."""
    return float(np.logaddexp(0, -margins).mean())


def ece(margins: np.ndarray) -> float:
    """Expected calibration error (arXiv 1706.04599, eq. 3): Σ over bins of share · |right − confidence|.

    Margins [P].
    """
    confidence, right, place = _confidence(margins)
    return float(np.abs(np.bincount(place, right - confidence, BINS)).sum() / len(margins))


def fit_temperature(margins: np.ndarray) -> float | None:
    """The T whose margins / T have the least log loss; above 1 for an overconfident model. Margins [P].

    None where no positive T does: the margins point the wrong way, or nowhere.
    """
    scale = np.sqrt((margins**2).mean()) or 1.0
    slope = fit_logistic(margins[:, None] / scale, np.ones(len(margins)), ridge=1e-6)[
        0
    ]  # finite where every pair is right
    return float(scale / slope) if slope > 0 else None


def reliability(margins: np.ndarray, cluster_of: np.ndarray, samples: int, seed: int) -> list[dict]:
    """Bins of confidence that hold pairs: bounds, pairs, mean confidence, share right and its interval.

    Margins [P], cluster_of [P].
    """
    confidence, right, place = _confidence(margins)
    found = []
    for number in np.unique(place):
        inside = place == number
        found.append(
            {
                "low": float(BINS + number) / (2 * BINS),
                "high": float(BINS + number + 1) / (2 * BINS),
                "pairs": int(inside.sum()),
                "confidence": float(confidence[inside].mean()),
                "right": float(right[inside].mean()),
                "interval": interval(cluster_of[inside], right[inside], samples, seed),
            }
        )
    return found


def calibrate(margins: np.ndarray, cluster_of: np.ndarray, samples: int, seed: int) -> dict:
    """All of it, at temperature 1 and at the fitted one. Margins [P], cluster_of [P]."""
    temperature = fit_temperature(margins)
    found = {"brier": brier(margins), "log_loss": log_loss(margins), "ece": ece(margins), "temperature": None}
    if temperature:
        cooled = margins / temperature
        found["temperature"] = {"value": temperature, "log_loss": log_loss(cooled), "ece": ece(cooled)}
    return found | {"bins": reliability(margins, cluster_of, samples, seed)}


def _confidence(margins: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Confidence, outcome (1 right, ½ a tie, 0 wrong) and bin of each pair, [P] each."""
    confidence = sigmoid(np.abs(margins))
    right = (margins > 0) + 0.5 * (margins == 0)
    return confidence, right, np.minimum((2 * BINS * (confidence - 0.5)).astype(int), BINS - 1)


def draw_reliability(path: Path, bins: list[dict], title: str) -> Path:
    """Draw the reliability diagram over a histogram of confidence, as a PNG file that holds no date.

    A bin without an interval is a hollow point.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure  # not pyplot: no global state, no display

    figure = Figure(figsize=(5.2, 6.2), dpi=120, layout="constrained")
    FigureCanvasAgg(figure)
    above, below = figure.subplots(2, 1, sharex=True, height_ratios=(3, 1))
    sure = [b for b in bins if b["interval"]]
    above.plot([0.5, 1], [0.5, 1], color="#999999", linewidth=1, linestyle="--", label="perfect")
    for b in bins:
        face = BLUE if b["interval"] else "white"
        above.plot(b["confidence"], b["right"], color=BLUE, marker="o", markersize=4, markerfacecolor=face)
    for b in sure:
        above.vlines(b["confidence"], *b["interval"], color=BLUE, linewidth=1.2, alpha=0.6)
    above.plot([b["confidence"] for b in sure], [b["right"] for b in sure], color=BLUE, label="reward model")
    above.set_ylabel("right: the higher score is the better answer's")
    above.legend(frameon=False, loc="upper left")
    share = np.array([b["pairs"] for b in bins]) / sum(b["pairs"] for b in bins)
    middle = [(b["low"] + b["high"]) / 2 for b in bins]
    below.bar(middle, share, width=0.9 / (2 * BINS), color=BLUE, alpha=0.6)
    below.set_ylabel("share of pairs")
    below.set_xlabel("confidence, σ(|margin|)")
    below.set_xlim(0.49, 1.01)
    for panel in (above, below):
        panel.grid(color="#dddddd", linewidth=0.6)
        panel.set_axisbelow(True)
        panel.spines[["top", "right"]].set_visible(False)
    figure.suptitle(title, fontsize=11)
    with staged(path) as new:
        figure.savefig(new, format="png", metadata={"Software": None})
    return path

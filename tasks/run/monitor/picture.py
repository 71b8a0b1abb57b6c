"""Both scores over √KL, as in arXiv 2210.10760: a proxy that climbs alone is over-optimised."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from pathlib import Path

from tasks.run.files import staged

LINES = {"proxy": ("score, which PPO raises", "#1f5a91"), "judge": ("independent judge", "#b3541e")}


def points(looks: Iterable[Mapping[str, float]]) -> dict[str, list[tuple[float, float]]]:
    """Looks in order -> for each score that they have, points (√KL, gain over the first look).

    An estimated KL below zero counts as zero.
    """
    looks = list(looks)
    root = [math.sqrt(max(look["kl_nats"], 0.0)) for look in looks]
    return {
        name: [(x, look[name] - looks[0][name]) for x, look in zip(root, looks, strict=True)]
        for name in LINES
        if looks and name in looks[0]
    }


def draw(path: Path, looks: Iterable[Mapping[str, float]]) -> Path:
    """Draw `points` as a PNG file that holds no date."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure  # not pyplot: no global state, no display

    figure = Figure(figsize=(6.4, 4.2), dpi=120, layout="constrained")
    FigureCanvasAgg(figure)
    panel = figure.subplots()
    for name, found in points(looks).items():
        label, colour = LINES[name]
        panel.plot(
            *zip(*found, strict=True), color=colour, linewidth=1.6, marker="o", markersize=4, label=label
        )
    panel.axhline(0, color="#999999", linewidth=0.8)
    panel.set_xlabel("√KL to SFT, √nats per response")
    panel.set_ylabel("gain over SFT, standard deviations")
    panel.grid(color="#dddddd", linewidth=0.6)
    panel.set_axisbelow(True)
    panel.spines[["top", "right"]].set_visible(False)
    panel.legend(frameon=False, loc="upper left")
    figure.suptitle("Score and judge on held-out prompts", fontsize=11)
    with staged(path) as new:
        figure.savefig(new, format="png", metadata={"Software": None})
    return path

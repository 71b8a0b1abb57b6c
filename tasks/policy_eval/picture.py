"""What every way to answer reaches over its KL to SFT; a policy worth its training lies above the others."""

from __future__ import annotations

from pathlib import Path

from tasks.policy_eval.frontier import GREEDY
from tasks.policy_eval.parts import NAMES
from tasks.run.files import staged

LINES = {
    "policy": ("policy, by temperature", "#1f5a91", "o"),
    "sft": ("SFT, by temperature", "#b3541e", "s"),
    "best of n": ("SFT, best of n (KL: upper bound)", "#777777", "^"),
}
PANELS = {"score": "reward-model score", "judge": "judge's score", "correct": "correct, checked"}
Point = tuple[float, dict, str]  # KL, {mean, interval}, way


def lines_of(rows: list[dict], measure: str) -> dict[str, list[Point]]:
    """Line -> its points, the nearest to SFT first; rows of one part of the frontier."""
    found: dict[str, list[Point]] = {name: [] for name in LINES}
    for row in rows:
        line = row["model"] if row["n"] is None else "best of n"
        found[line].append((row["kl"], row[measure], row["way"]))
    return {name: sorted(points, key=lambda point: point[0]) for name, points in found.items()}


def draw(path: Path, card: dict) -> Path:
    """Draw the headline's part of the frontier as a PNG file that holds no date."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure  # not pyplot: no global state, no display

    part = card["headline"]["part"]
    rows = [row for row in card["frontier"] if row["part"] == part]
    measures = [name for name in PANELS if rows[0][name]]
    figure = Figure(figsize=(4.6 * len(measures), 4.4), dpi=120, layout="constrained")
    FigureCanvasAgg(figure)
    panels = figure.subplots(1, len(measures), squeeze=False)[0]
    for panel, measure in zip(panels, measures, strict=True):
        for name, points in lines_of(rows, measure).items():
            _draw_line(panel, points, *LINES[name])
        panel.set_title(PANELS[measure], fontsize=10)
        panel.set_xlabel("KL to SFT, nats per response")
        panel.grid(color="#dddddd", linewidth=0.6)
        panel.set_axisbelow(True)
        panel.spines[["top", "right"]].set_visible(False)
    figure.legend(*panels[0].get_legend_handles_labels(), loc="outside lower center", ncols=3, frameon=False)
    title = f"{NAMES[part].capitalize()}, {rows[0]['prompts']} held-out prompts (hollow: greedy)"
    figure.suptitle(title, fontsize=11)
    with staged(path) as new:
        figure.savefig(new, format="png", metadata={"Software": None})
    return path


def _draw_line(panel, points: list[Point], label: str, colour: str, mark: str) -> None:
    x, y = [kl for kl, _, _ in points], [found["mean"] for _, found, _ in points]
    panel.plot(x, y, color=colour, linewidth=1.3, label=label)
    for kl, found, way in points:
        face = "white" if way == GREEDY else colour
        panel.plot(kl, found["mean"], color=colour, marker=mark, markersize=5, markerfacecolor=face)
        if found["interval"]:
            panel.vlines(kl, *found["interval"], color=colour, linewidth=0.9, alpha=0.5)

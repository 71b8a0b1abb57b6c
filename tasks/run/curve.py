"""The curve of a training: a row per logged step, for curve.csv and for pictures. Nothing timed goes in."""

from __future__ import annotations

import csv
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from tasks.run.files import staged
from tasks.run.finite import check_numbers


class Curve:
    """Rows of numbers by step: ``Curve(["loss"])``, ``curve.add(10, loss=2.5)``, ``curve.write(path)``.

    Args:
        columns: names beside `step`, in the order of the file.
        rows: what an earlier curve's `rows` held, as a checkpoint keeps it.
    """

    def __init__(self, columns: Sequence[str], rows: Iterable[Mapping[str, float]] = ()) -> None:
        self.columns = tuple(columns)
        self._rows: dict[int, dict[str, float]] = {}
        for row in rows:
            self.add(int(row["step"]), **{name: value for name, value in row.items() if name != "step"})

    @classmethod
    def of_log(
        cls, log: Iterable[Mapping[str, float]], keys: Sequence[str], columns: Sequence[str] | None = None
    ) -> Curve:
        """The curve of a Trainer's log history: its entries with any of `keys`, which become `columns`."""
        names = dict(zip(keys, columns or keys, strict=True))
        curve = cls(tuple(names.values()))
        for entry in log:
            if found := {name: entry[key] for key, name in names.items() if key in entry}:
                curve.add(int(entry["step"]), **found)
        return curve

    def add(self, step: int, **values: float) -> None:
        """Set values at `step`; a step that is logged again, as after a resume, has one row.

        Raises:
            ValueError: a name that is no column.
        """
        if unknown := values.keys() - set(self.columns):
            raise ValueError(f"curve: {sorted(unknown)[0]} is none of the columns {', '.join(self.columns)}")
        row = self._rows.setdefault(int(step), {})
        row.update({name: float(value) for name, value in values.items()})

    @property
    def rows(self) -> list[dict[str, float]]:
        """Every row, by step, `step` first; columns without a value are left out."""
        return [{"step": step, **self._rows[step]} for step in sorted(self._rows)]

    def __repr__(self) -> str:
        """Each column from its first value to its last, with the step of each."""
        steps = sorted(self._rows)
        if not steps:
            return "Curve without a row"
        lines = [f"Curve of {len(steps)} steps, {steps[0]} to {steps[-1]}"]
        wide = max(map(len, self.columns), default=0)
        for column in self.columns:
            at, values = self.points(column)
            if at:
                change = f"{values[0]:.4g} -> {values[-1]:.4g}" if len(at) > 1 else f"{values[0]:.4g}"
                lines.append(f"  {column:<{wide}}  {change}")
        return "\n".join(lines)

    def points(self, column: str) -> tuple[list[int], list[float]]:
        """Steps and values of one column, where it has any."""
        known = [row for row in self.rows if column in row]
        return [row["step"] for row in known], [row[column] for row in known]

    def check(self, path: Path) -> None:
        """Refuse a value that is not finite, naming step and column; `path` is where it would be written."""
        for step in sorted(self._rows):
            check_numbers(f"{path}, step {step}", self._rows[step])

    def write(self, path: Path) -> Path:
        """Write a CSV file with a header; floats in full, an empty cell where there is no value.

        Raises:
            ValueError: a value is not finite (:meth:`check`).
        """
        self.check(path)
        with staged(path) as new, new.open("w", encoding="utf-8", newline="") as file:
            writer = csv.writer(file, lineterminator="\n")
            writer.writerow(("step", *self.columns))
            for row in self.rows:
                writer.writerow((row["step"], *(repr(row[c]) if c in row else "" for c in self.columns)))
        return path


def plot(path: Path, curve: Curve, columns: Sequence[str], title: str) -> Path:
    """Draw `columns` over the steps, one panel below the other, as a PNG file that holds no date."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure  # not pyplot: no global state, no display

    figure = Figure(figsize=(7, 1.2 + 2.4 * len(columns)), dpi=120, layout="constrained")
    FigureCanvasAgg(figure)
    panels = figure.subplots(len(columns), 1, sharex=True, squeeze=False)[:, 0]
    for panel, column in zip(panels, columns, strict=True):
        steps, values = curve.points(column)
        panel.plot(steps, values, color="#1f5a91", linewidth=1.6, marker="." if len(steps) < 30 else None)
        panel.set_ylabel(column.replace("_", " "))
        panel.grid(color="#dddddd", linewidth=0.6)
        panel.spines[["top", "right"]].set_visible(False)
    panels[-1].set_xlabel("step")
    figure.suptitle(title, fontsize=11)
    with staged(path) as new:
        figure.savefig(new, format="png", metadata={"Software": None})
    return path

"""The last lines of two runs of the main job against README.md: `closing_lines.py FIRST AGAIN`."""

import re
import sys
from pathlib import Path


def stated(readme: str) -> tuple[list[str], str]:
    """What README says that the first run ends with, and the second."""
    first = re.search(r"one ends with\n\n```\n(.*?)\n```", readme, re.DOTALL)[1].splitlines()
    return first, re.search(r"a second `dvc repro` with `([^`]+)`", readme)[1]


def said(log: str) -> list[str]:
    """The stages' own closing lines."""
    return re.findall(r"^stackrl: [a-z_]+: .*$", log, re.MULTILINE)


def agrees(line: str, wanted: str) -> bool:
    """Whether a line is the wanted one; what `…` stands for is free."""
    return re.fullmatch(".*".join(map(re.escape, wanted.split("…"))), line) is not None


if __name__ == "__main__":
    first, again = (said(Path(log).read_text()) for log in sys.argv[1:3])
    wanted, second = stated(Path("README.md").read_text())
    for line, want in [*zip(first[-len(wanted) :], wanted, strict=True), (again[-1], second)]:
        if not agrees(line, want):
            sys.exit(f"README.md says {want!r}, the run {line!r}")

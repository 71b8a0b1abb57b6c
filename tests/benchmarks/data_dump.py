"""A generated dump through the data stage: CPU seconds, megabytes per second and core, and resident memory.

    python tests/benchmarks/data_dump.py <megabytes> [<folder>]

The dump is made of real posts (STACKRL_SHARED_DATA), repeated with new ids and titles. CPU seconds, not wall
time, so that a busy machine matters less. Beside it the obvious path on the same posts: ElementTree, one
dictionary of answers, markdownify.
"""

from __future__ import annotations

import json
import os
import resource
import sys
import tempfile
import threading
import time
import xml.etree.ElementTree as ElementTree
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from xml.sax.saxutils import escape

from params.schema import Params
from tasks.data import run
from tasks.data.dump import read_rows
from tasks.data.html import convert_slowly, has_words
from tasks.data.sources import Source, site_of
from tasks.run.layout import Layout

REPOSITORY = Path(__file__).parents[2]
SHARED = Path(os.environ.get("STACKRL_SHARED_DATA", REPOSITORY.parent / "shared" / "data"))
SITES = ("devops.stackexchange.com.Posts.xml.xz", "quantumcomputing.stackexchange.com.Posts.xml.xz")
STEP = 1_000_000  # ids of two repetitions are this far apart


def generate(path: Path, megabytes: int) -> None:
    """A Posts.xml of about that size."""
    rows: list[dict[str, str]] = []
    for place, name in enumerate(SITES):
        source = Source(SHARED / "stackexchange" / "main" / name, name)
        found: list[dict[str, str]] = []
        read_rows(source, "posts", found.append)
        for row in found:
            for key in ("Id", "ParentId", "AcceptedAnswerId"):
                if row.get(key):
                    row[key] = str(int(row[key]) + place * STEP // 2)
        rows += found
    size = repetition = 0
    with path.open("w", encoding="utf-8") as file:
        file.write('<?xml version="1.0" encoding="utf-8"?>\n<posts>\n')
        while size < megabytes * 1_000_000:
            for row in rows:
                new = dict(row)
                for key in ("Id", "ParentId", "AcceptedAnswerId"):
                    if new.get(key):
                        new[key] = str(int(new[key]) + repetition * STEP)
                if "Title" in new:
                    new["Title"] += f" ({repetition})"
                    new["Body"] += f"<p>This is number {repetition}, {new['Id']}.</p>"
                values = " ".join(f'{key}="{escape(value, ESCAPES)}"' for key, value in new.items())
                size += file.write(f"  <row {values} />\n")
            repetition += 1
        file.write("</posts>\n")


ESCAPES = {'"': "&quot;", "\n": "&#xA;", "\r": "&#xD;", "\t": "&#x9;"}


class Memory(threading.Thread):
    """The highest sum of memory over this process and its children, in megabytes.

    `peak` is resident memory, where a page that three processes share counts three times; `proportional`
    counts it once (Pss); `disk`: what the files of `folder` took.
    """

    def __init__(self, folder: Path | None = None) -> None:
        super().__init__(daemon=True)
        self.peak = self.proportional = self.disk = 0.0
        self._folder = folder

    def run(self) -> None:
        """Look twice a second, which takes the processor a few milliseconds."""
        while True:
            tree = [os.getpid(), *_children(os.getpid())]
            self.peak = max(self.peak, sum(map(_resident, tree)))
            self.proportional = max(self.proportional, sum(map(_proportional, tree)))
            if self._folder:
                self.disk = max(self.disk, _size(self._folder))
            time.sleep(0.5)


def _size(folder: Path) -> float:
    """Megabytes of the files below."""
    total = 0
    for base, _, names in os.walk(folder):
        for name in names:
            try:
                total += os.stat(os.path.join(base, name), follow_symlinks=False).st_size
            except OSError:  # gone by now
                continue
    return total / 1e6


def _children(process: int) -> list[int]:
    found: list[int] = []
    for task in Path(f"/proc/{process}/task").glob("*/children"):
        try:
            found += [int(number) for number in task.read_text().split()]
        except OSError:
            continue
    return found


def _resident(process: int) -> float:
    """Megabytes; pages that processes share are counted once for each."""
    try:
        return int(Path(f"/proc/{process}/statm").read_text().split()[1]) * 4096 / 1e6
    except OSError:
        return 0.0


def _proportional(process: int) -> float:
    try:
        lines = Path(f"/proc/{process}/smaps_rollup").read_text().splitlines()
    except OSError:
        return 0.0
    return sum(int(line.split()[1]) for line in lines if line.startswith("Pss:")) * 1024 / 1e6


def cpu_seconds() -> float:
    """User and system time of this process and of its children that ended."""
    both = (resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    return sum(used.ru_utime + used.ru_stime for used in both)


def obvious(path: Path) -> int:
    """ElementTree, a dictionary of answers, markdownify: questions with two answers or more."""
    questions, answers = {}, defaultdict(list)
    for _, row in ElementTree.iterparse(path):
        if row.get("PostTypeId") == "1":
            questions[row.get("Id")] = row.get("Body")
        elif row.get("PostTypeId") == "2":
            answers[row.get("ParentId")].append((int(row.get("Score")), row.get("Body")))
        row.clear()
    groups = 0
    for number, body in questions.items():
        if len(answers[number]) > 1:
            texts = [convert_slowly(text) for text in (body, *(text for _, text in answers[number]))]
            groups += all(map(has_words, texts))
    return groups


def main(megabytes: int, folder: Path) -> None:
    """Print one JSON object."""
    raw = folder / "data" / "raw"
    raw.mkdir(parents=True)
    dump = raw / "big.example.Posts.xml"
    generate(dump, megabytes)
    (folder / "dvc.yaml").write_text("stages:\n  data: {cmd: none, deps: [data/raw], params: [seed]}\n")
    (folder / "params.yaml").write_text("seed: 0\n")
    size = dump.stat().st_size / 1e6
    memory, started, wall = Memory(folder / "scratch"), cpu_seconds(), time.monotonic()
    memory.start()
    params = Params.model_validate({"data": {"source": [dump.name]}})
    metrics = run(params, Layout(folder, folder)).metrics
    cpu, wall = cpu_seconds() - started, time.monotonic() - wall
    written = sum(path.stat().st_size for path in folder.glob("artifacts/data/*")) / 1e6
    found = {
        "site": site_of(dump), "megabytes": size, "rows": metrics["rows"], "questions": metrics["questions"],
        "cpu_seconds": cpu, "wall_seconds": wall, "mb_per_cpu_second": size / cpu,
        "resident_mb": memory.peak, "proportional_mb": memory.proportional, "written_mb": written,
        "work_mb": memory.disk,
    }  # fmt: skip
    found["mb_per_second"] = size / wall
    if megabytes <= 300:
        started, wall = cpu_seconds(), time.monotonic()
        found["obvious_questions"] = obvious(dump)
        found["obvious_mb_per_cpu_second"] = size / (cpu_seconds() - started)
        found["obvious_mb_per_second"] = size / (time.monotonic() - wall)
        found["times_as_fast"] = found["mb_per_second"] / found["obvious_mb_per_second"]
    print(json.dumps({key: value if key == "site" else round(value, 2) for key, value in found.items()}))


def from_command_line(main: Callable[[int, Path], None]) -> None:
    """`<megabytes> [<folder>]`; without a folder in one of its own, which goes afterwards."""
    if len(sys.argv) > 2:
        main(int(sys.argv[1]), Path(sys.argv[2]))
    else:
        with tempfile.TemporaryDirectory() as name:
            main(int(sys.argv[1]), Path(name))


if __name__ == "__main__":
    from_command_line(main)

"""A function over a Parquet file by Hugging Face datasets: batch by batch, on all cores, results on disk."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import pyarrow as pa
import pyarrow.compute as pc
from pyarrow import parquet

from tasks.run.lifetime import as_worker

BATCH = 256
INLINE_BYTES = 4_000_000  # below, other processes would take longer to start than to help


@dataclass(frozen=True, slots=True)
class Mapped:
    """What came of each question, in order; rows with a reason in `left_out` are counted and left out.

    Attributes:
        count: reasons, and under "touched" what was cut and the like.
    """

    table: pa.Table
    count: Counter[str]

    @property
    def kept(self) -> int:
        """Rows that stay."""
        return self.table["left_out"].null_count

    def batches(self, rows: int) -> Iterator[pa.Table]:
        """Those that stay, from so many questions at a time, without the columns that tell."""
        for start in range(0, len(self.table), rows):
            part = self.table.slice(start, rows)
            yield part.filter(part["left_out"].is_null()).drop_columns(["left_out", "touched"])


def mapped(path: Path, function: Callable[[pa.Table], pa.Table], processes: int, folder: Path) -> Mapped:
    """Apply `function` to every batch of a file.

    Args:
        path: Parquet file.
        function: columns in, columns out, `left_out` and `touched` among them.
        processes: 1: this one.
        folder: takes the results.

    Raises:
        ValueError: the function's.
    """
    from datasets import Dataset, Features, disable_progress_bars

    disable_progress_bars()
    schema = function(parquet.read_schema(path).empty_table()).schema
    if path.stat().st_size < INLINE_BYTES:
        processes = 1
    os.environ["TOKENIZERS_PARALLELISM"] = "true" if processes == 1 else "false"  # the cores are taken
    questions = Dataset.from_parquet(str(path), cache_dir=str(folder)).with_format("arrow")
    found = questions.map(
        _Worker(function),
        batched=True,
        batch_size=BATCH,
        remove_columns=questions.column_names,
        features=Features.from_arrow_schema(schema),
        num_proc=processes if processes > 1 else None,
        load_from_cache_file=False,
        new_fingerprint=path.stem,
        cache_file_name=str(folder / f"{path.stem}.arrow"),
    )
    table = found.data.table.cast(schema)
    reasons = pc.value_counts(table["left_out"]).to_pylist()
    count = Counter({one["values"]: one["counts"] for one in reasons if one["values"]})
    count["touched"] = pc.sum(table["touched"]).as_py() or 0
    return Mapped(table, count)


@dataclass(frozen=True, slots=True)
class _Worker:
    """`function`, in whatever process; a process that datasets forked ends with its parent."""

    function: Callable[[pa.Table], pa.Table]

    def __call__(self, batch: pa.Table) -> pa.Table:
        _begin(os.getpid())
        return self.function(batch)


MAIN = os.getpid()  # datasets forks: its processes keep this


@cache
def _begin(process: int) -> None:
    if process != MAIN:
        as_worker()

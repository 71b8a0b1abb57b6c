"""Rows of JSON, Parquet files and Hub data sets, as dictionaries, one at a time, each with its number."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from tasks.data.damage import LONGEST_ROW, MALFORMED, TOO_LONG, Damage, long_row
from tasks.data.json_rows import read_json
from tasks.data.sources import HUB, DumpError, Source

Row = dict[str, Any]
ROWS_PER_BATCH = 512


def read_table(source: Source, damage: Damage) -> Iterator[tuple[int, Row]]:
    """The rows of a source that can be decoded, in order; `damage` gets the others.

    Raises:
        DumpError: one line with file and row: damaged, in another encoding, or not to be had.
    """
    if source.hub:
        return enumerate(_hub(source.hub), start=1)
    if source.path.suffix == ".parquet":
        return _parquet(source.path, damage)
    return read_json(source.path, damage)


def _parquet(path: Path, damage: Damage) -> Iterator[tuple[int, Row]]:
    number = 0
    try:
        with pq.ParquetFile(path) as file:
            for batch in file.iter_batches(ROWS_PER_BATCH):
                for row in _rows_of(batch):
                    number += 1
                    if isinstance(row, tuple):
                        damage.drop(row[0], number, row[1])
                    else:
                        yield number, row
    except (pa.ArrowException, OSError) as error:
        words = " ".join(str(error).split())
        raise DumpError(f"{path}: row {number + 1}: damaged or no Parquet file ({words})") from None


def _rows_of(batch: pa.RecordBatch) -> Iterator[Row | tuple[str, str]]:
    """Rows, or a reason and words in place of one."""
    if batch.nbytes <= LONGEST_ROW:
        try:
            yield from batch.to_pylist()
            return
        except UnicodeDecodeError:
            pass
    for place in range(len(batch)):
        row = batch.slice(place, 1)
        if row.nbytes > LONGEST_ROW:
            yield TOO_LONG, long_row()
            continue
        try:
            yield row.to_pylist()[0]
        except UnicodeDecodeError as error:
            yield MALFORMED, f"not UTF-8 ({error})"


def _hub(name: str) -> Iterator[Row]:
    """Streams `hf://datasets/owner/name[@revision]`, the split "train"; also a local folder of such files."""
    from datasets import load_dataset

    where, _, revision = name.removeprefix(HUB).partition("@")
    try:
        yield from load_dataset(where, split="train", streaming=True, revision=revision or None)
    except Exception as error:  # whatever the Hub's client raises on the way
        words = " ".join(f"{type(error).__name__} {error}".split())[:300]
        raise DumpError(f"data.source: {name}: {words}") from None

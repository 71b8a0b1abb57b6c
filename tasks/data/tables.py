"""Rows of JSON lines, Parquet files and Hub data sets, as dictionaries, one at a time."""

from __future__ import annotations

import io
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from tasks.data.sources import HUB, OPENERS, DumpError, Source, unpacked

Row = dict[str, Any]


def read_table(source: Source) -> Iterator[Row]:
    """The rows of a source, in order.

    Raises:
        DumpError: one line with file and row: damaged, no JSON object, not UTF-8, or not to be had.
    """
    if source.hub:
        return _hub(source.hub)
    return _parquet(source.path) if source.path.suffix == ".parquet" else _json_lines(source.path)


def _json_lines(path: Path) -> Iterator[Row]:
    opener = OPENERS.get(path.suffix, OPENERS[".xml"])
    with opener(path) as file:
        for number, line in enumerate(io.BufferedReader(unpacked(file, path)), start=1):
            if not line.strip():
                continue
            try:
                row = json.loads(line.decode("utf-8"))
            except (ValueError, RecursionError) as error:
                words = " ".join(str(error).split())
                raise DumpError(f"{path}: row {number}: not a JSON object in UTF-8 ({words})") from None
            if not isinstance(row, dict):
                raise DumpError(f"{path}: row {number}: not a JSON object but {type(row).__name__}")
            yield row


def _parquet(path: Path) -> Iterator[Row]:
    number = 0
    try:
        with pq.ParquetFile(path) as file:
            for batch in file.iter_batches(512):
                for row in batch.to_pylist():
                    number += 1
                    yield row
    except (pa.ArrowException, OSError, UnicodeDecodeError) as error:
        words = " ".join(str(error).split())
        raise DumpError(f"{path}: row {number + 1}: damaged or no Parquet file ({words})") from None


def _hub(name: str) -> Iterator[Row]:
    """Streams `hf://datasets/owner/name[@revision]`, the split "train"; also a local folder of such files."""
    from datasets import load_dataset

    where, _, revision = name.removeprefix(HUB).partition("@")
    try:
        yield from load_dataset(where, split="train", streaming=True, revision=revision or None)
    except Exception as error:  # whatever the Hub's client raises on the way
        words = " ".join(f"{type(error).__name__} {error}".split())[:300]
        raise DumpError(f"data.source: {name}: {words}") from None

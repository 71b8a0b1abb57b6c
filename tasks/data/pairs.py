"""Pairs scattered over a whole data set -> all pairs of a question together, and scores from them."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import groupby
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from tasks.data.engine import connect

ROWS_PER_GROUP = 4096
PAIR = pa.schema(
    [
        ("number", pa.int64()),
        ("qid", pa.int64()),
        ("site", pa.string()),
        ("question", pa.string()),
        ("date", pa.string()),
        ("response_j", pa.string()),
        ("response_k", pa.string()),
    ]
)


def sorted_by_question(rows: Iterable[Mapping[str, Any]], folder: Path) -> Iterator[dict[str, Any]]:
    """Rows of one pair each -> rows of one question each, its pairs under `pairs`; sorted on disk.

    A pair that cannot be read is handed on as it is, for the shape to refuse.
    """
    path = folder / "pairs.parquet"
    odd: list[Mapping[str, Any]] = []
    with pq.ParquetWriter(path, PAIR, compression="lz4") as writer:
        batch: list[dict[str, Any]] = []
        for number, row in enumerate(rows):
            if not _is_pair(row):
                odd.append(row)
                continue
            metadata = row.get("metadata") or ""
            site = metadata if isinstance(metadata, str) else next(iter(metadata), "")
            batch.append({**{name: row.get(name) for name in PAIR.names}, "number": number, "site": site})
            if len(batch) == ROWS_PER_GROUP:
                writer.write_table(pa.Table.from_pylist(batch, schema=PAIR))
                batch = []
        writer.write_table(pa.Table.from_pylist(batch, schema=PAIR))
    yield from map(dict, odd)
    inner = folder / "pairs"
    inner.mkdir(exist_ok=True)
    with connect(inner, threads=1) as base:
        query = "SELECT * FROM read_parquet($path) ORDER BY site, qid, number"
        reader = base.sql(query, params={"path": str(path)}).to_arrow_reader(ROWS_PER_GROUP)
        flat = (row for batch in reader for row in batch.to_pylist())
        for _, group in groupby(flat, lambda row: (row["site"], row["qid"])):
            pairs = list(group)
            first = pairs[0]
            yield {
                "qid": first["qid"],
                "question": first["question"],
                "date": first["date"],
                "metadata": first["site"],
                "pairs": [(pair["response_j"], pair["response_k"]) for pair in pairs],
            }
    path.unlink()


def _is_pair(row: Mapping[str, Any]) -> bool:
    texts = all(isinstance(row.get(name), str) for name in ("question", "date", "response_j", "response_k"))
    return texts and isinstance(row.get("qid"), int) and abs(row["qid"]) < 2**63


def levels(pairs: Sequence[tuple[str, str]]) -> dict[str, int]:
    """Text -> the length of the longest chain of worse ones below it: every pair keeps its order.

    Args:
        pairs: (better, worse).

    Raises:
        ValueError: the pairs contradict one another.
    """
    found: dict[str, int] = dict.fromkeys(text for pair in pairs for text in pair)
    for text in found:
        found[text] = 0
    for _ in range(len(found) + 1):
        changed = False
        for better, worse in pairs:
            if found[better] <= found[worse]:
                found[better], changed = found[worse] + 1, True
        if not changed:
            return found
    raise ValueError("the pairs of a question go round in a circle")

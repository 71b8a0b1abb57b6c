"""Pairs scattered over a whole data set -> all pairs of a question together, and scores from them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from itertools import groupby
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pyarrow as pa
import pyarrow.parquet as pq

from tasks.data.dialogue import Unreadable, string
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


class Pairs:
    """Takes rows of one pair each, gives rows of one question each; sorted on disk."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._path = folder / "pairs.parquet"
        self._writer = pq.ParquetWriter(self._path, PAIR, compression="lz4")
        self._batch: list[dict[str, Any]] = []

    def add(self, number: int, row: Mapping[str, Any]) -> None:
        """Row `number` of the file.

        Raises:
            Unreadable: it is no pair.
        """
        for name in ("question", "date", "response_j", "response_k"):
            string(row.get(name), name).encode()  # JSON can spell half a surrogate pair
        if not isinstance(row.get("qid"), int) or abs(row["qid"]) >= 2**63:
            raise Unreadable("unreadable_row", f"'qid' is no whole number: {row.get('qid')!r}")
        of_pair = {name: row.get(name) for name in PAIR.names}
        self._batch.append({**of_pair, "number": number, "site": site_of_row(row)})
        if len(self._batch) == ROWS_PER_GROUP:
            self._write()

    def questions(self) -> Iterator[tuple[int, dict[str, Any]]]:
        """The questions, each with the number of its first pair; its pairs are under `pairs`."""
        self._write()
        self._writer.close()
        inner = self._folder / "pairs"
        inner.mkdir(exist_ok=True)
        with connect(inner, threads=1) as base:
            query = "SELECT * FROM read_parquet($path) ORDER BY site, qid, number"
            reader = base.sql(query, params={"path": str(self._path)}).to_arrow_reader(ROWS_PER_GROUP)
            flat = (row for batch in reader for row in batch.to_pylist())
            for _, group in groupby(flat, lambda row: (row["site"], row["qid"])):
                pairs = list(group)
                first = pairs[0]
                yield (
                    first["number"],
                    {
                        "qid": first["qid"],
                        "question": first["question"],
                        "date": first["date"],
                        "site": first["site"],
                        "pairs": [(pair["response_j"], pair["response_k"]) for pair in pairs],
                    },
                )
        self._path.unlink()

    def _write(self) -> None:
        self._writer.write_table(pa.Table.from_pylist(self._batch, schema=PAIR))
        self._batch = []


def site_of_row(row: Mapping[str, Any]) -> str:
    """The host of the first address in the metadata, else what the column `site` states, else ""."""
    addresses: Sequence[str] | str = row.get("metadata") or ""
    first = addresses if isinstance(addresses, str) else next(iter(addresses), "")
    return urlsplit(first).hostname or str(row.get("site") or "")


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

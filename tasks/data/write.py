"""Questions -> Parquet: one row per question, answers nested; the same questions give the same bytes."""

from __future__ import annotations

from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

ROWS_PER_GROUP = 1024
ANSWER = pa.struct(
    [
        pa.field("id", pa.int64(), nullable=False),
        pa.field("text", pa.string(), nullable=False),
        pa.field("score", pa.int32(), nullable=False),
        pa.field("votes", pa.int32(), nullable=False),
        pa.field("accepted", pa.bool_(), nullable=False),
        pa.field("created", pa.string(), nullable=False),
        pa.field("owner_id", pa.int64()),
        pa.field("licence", pa.string(), nullable=False),
    ]
)
SCHEMA = pa.schema(
    [
        pa.field("site", pa.string(), nullable=False),
        pa.field("id", pa.int64(), nullable=False),
        pa.field("title", pa.string(), nullable=False),
        pa.field("text", pa.string(), nullable=False),
        pa.field("created", pa.string(), nullable=False),
        pa.field("owner_id", pa.int64()),
        pa.field("licence", pa.string(), nullable=False),
        pa.field("tags", pa.list_(pa.string()), nullable=False),
        pa.field("kind", pa.string()),
        pa.field("expected", pa.string()),
        pa.field("answers", pa.list_(ANSWER), nullable=False),
    ]
)


# While the splits are unknown: with what decides them.
UNSPLIT = SCHEMA.append(pa.field("pairs", pa.int32())).append(pa.field("marks", pa.list_(pa.int64())))
KEYS = pa.schema([UNSPLIT.field(name) for name in ("site", "id", "marks")])


class SplitWriter:
    """Writes one split, in the order given; the same questions give the same bytes. A context."""

    def __init__(self, path: Path) -> None:
        self._writer = pq.ParquetWriter(path, SCHEMA, compression="zstd")
        self._waiting: list[pa.Table] = []

    def __enter__(self) -> SplitWriter:
        return self

    def __exit__(self, error: type[BaseException] | None, *_: object) -> None:
        if error is None:
            self._flush(1)
        self._writer.close()

    def write(self, questions: pa.Table) -> None:
        """More questions; the columns are `SCHEMA`'s."""
        self._waiting.append(questions)
        self._flush(ROWS_PER_GROUP)

    def _flush(self, least: int) -> None:
        while sum(map(len, self._waiting)) >= least:
            # one chunk per column: where pages end must not depend on how the questions came
            table = pa.concat_tables(self._waiting)
            self._writer.write_table(table.slice(0, ROWS_PER_GROUP).combine_chunks())
            self._waiting = [table.slice(ROWS_PER_GROUP)]

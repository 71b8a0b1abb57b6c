"""Tables written as Parquet, little by little: the same rows give the same bytes, however they came."""

from __future__ import annotations

from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

ROWS_PER_GROUP = 1024


class TableWriter:
    """Writes one file, rows in the order given. A context.

    Attributes:
        rows: written or waiting.
    """

    def __init__(self, path: Path, schema: pa.Schema) -> None:
        self.rows = 0
        self._writer = pq.ParquetWriter(path, schema, compression="zstd")
        self._waiting: list[pa.Table] = []

    def __enter__(self) -> TableWriter:
        return self

    def __exit__(self, error: type[BaseException] | None, *_: object) -> None:
        if error is None:
            self._flush(1)
        self._writer.close()

    def write(self, table: pa.Table) -> None:
        """More rows; the columns are the schema's."""
        self.rows += len(table)
        self._waiting.append(table)
        self._flush(ROWS_PER_GROUP)

    def _flush(self, least: int) -> None:
        while sum(map(len, self._waiting)) >= least:
            # one chunk per column: where pages end must not depend on how the rows came
            table = pa.concat_tables(self._waiting)
            self._writer.write_table(table.slice(0, ROWS_PER_GROUP).combine_chunks())
            self._waiting = [table.slice(ROWS_PER_GROUP)]

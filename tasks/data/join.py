"""Answers to their questions: only ids meet in the join; their texts follow on disk."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import duckdb
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from tasks.data.shelf import POSTS, Shelf

ROWS_PER_TABLE = 2048
CHARACTERS_PER_BUCKET = 128_000_000  # of the dump; the whole of Stack Overflow has 550 buckets, open at once
# The first row of an id counts, whatever it is.
FIRST = """
CREATE TABLE first AS
SELECT site, id, min(row) AS row, arg_min(what, row) AS what, arg_min(parent_id, row) AS parent_id,
       count(*) - 1 AS again
FROM read_parquet($posts) GROUP BY site, id
"""
ASKED = """
CREATE TABLE asked AS
SELECT q.site, q.id, q.row, count(a.id) AS answers
FROM first q LEFT JOIN first a ON a.site = q.site AND a.parent_id = q.id AND a.what = 'answer'
WHERE q.what = 'question' GROUP BY q.site, q.id, q.row
"""
# `place`: of the question among those that stay, sorted by (site, id).
PLACED = """
CREATE TABLE placed AS
SELECT row, site, id, row_number() OVER () - 1 AS place
FROM (SELECT row, site, id FROM asked WHERE answers >= $least ORDER BY site, id)
"""
KEPT = """
CREATE TABLE kept AS
SELECT row, place FROM placed UNION ALL
SELECT a.row, q.place FROM first a JOIN placed q ON a.site = q.site AND a.parent_id = q.id
WHERE a.what = 'answer'
"""
DROPS = """
SELECT 'duplicate_id', sum(again) FROM first UNION ALL
SELECT what, count(*) FROM first WHERE what NOT IN ('question', 'answer') GROUP BY what UNION ALL
SELECT 'question_with_few_answers', count(*) FROM asked WHERE answers < $least UNION ALL
SELECT 'answer_of_dropped_question', sum(answers) FROM asked WHERE answers < $least UNION ALL
SELECT 'orphan_answer', (SELECT count(*) FROM first WHERE what = 'answer') - (SELECT sum(answers) FROM asked)
"""


def join(base: duckdb.DuckDBPyConnection, shelf: Shelf, min_answers: int) -> Counter[str]:
    """Find each question's answers; questions with fewer than `min_answers` go, and their answers with them.

    Returns:
        Drops by reason: all rows that `grouped` will not give.
    """
    base.execute(FIRST, {"posts": str(shelf.posts)})
    base.execute(ASKED)
    base.execute(PLACED, {"least": min_answers})
    base.execute(KEPT)
    counts = base.execute(DROPS, {"least": min_answers}).fetchall()
    return shelf.drops + Counter({reason: int(count or 0) for reason, count in counts})


def asked_by_site(base: duckdb.DuckDBPyConnection) -> dict[str, int]:
    """Site -> how many questions it has, whether answered or not."""
    return dict(base.execute("SELECT site, count(*) FROM asked GROUP BY site").fetchall())


def grouped(base: duckdb.DuckDBPyConnection, shelf: Shelf) -> Iterator[pa.Table]:
    """Tables of whole groups, a question and then its answers by id; groups are sorted by (site, id).

    The texts are dealt into buckets, each of which takes the questions of a range of places with their
    answers and fits into memory.
    """
    ((questions,),) = base.execute("SELECT count(*) FROM placed").fetchall()
    buckets = max(1, shelf.characters // CHARACTERS_PER_BUCKET)
    folder = shelf.folder / "buckets"
    folder.mkdir()
    _deal(base, shelf, folder, per_bucket=max(1, -(-questions // buckets)))
    for path in sorted(folder.iterdir()):
        with pa.ipc.open_stream(path) as file:
            table = file.read_all()
        path.unlink()
        table = table.append_column("is_answer", table["parent_id"].is_valid())
        table = table.sort_by([(name, "ascending") for name in ("place", "is_answer", "id")])
        places = table["place"].to_numpy()
        start = 0
        while start < len(table):
            last = places[min(start + ROWS_PER_TABLE, len(table)) - 1]
            stop = int(np.searchsorted(places, last, side="right"))
            yield table.take(np.arange(start, stop))  # a slice would be sent with its whole bucket
            start = stop


def _deal(base: duckdb.DuckDBPyConnection, shelf: Shelf, folder: Path, per_bucket: int) -> None:
    """Write each post that stays into the bucket of its question, with the column `place`."""
    kept = _Kept(base)
    schema = POSTS.append(pa.field("place", pa.int64()))
    options = pa.ipc.IpcWriteOptions(compression="lz4")
    with ExitStack() as stack, pq.ParquetFile(shelf.posts) as file:
        writers: dict[int, pa.RecordBatchStreamWriter] = {}
        for group in range(file.num_row_groups):
            table = file.read_row_group(group)
            rows = table["row"].to_numpy()
            found, places = kept.until(rows[-1])
            table = table.take(np.searchsorted(rows, found)).append_column("place", pa.array(places))
            of_row = places // per_bucket
            for bucket in np.unique(of_row).tolist():
                if bucket not in writers:
                    path = str(folder / f"{bucket:06}.arrows")
                    writer = pa.ipc.new_stream(path, schema, options=options)
                    writers[bucket] = stack.enter_context(writer)
                writers[bucket].write_table(table.filter(pa.array(of_row == bucket)))


class _Kept:
    """Row numbers that stay and the places of their questions, in the order of rows, a stretch at a time."""

    def __init__(self, base: duckdb.DuckDBPyConnection) -> None:
        self._batches = iter(base.sql("SELECT row, place FROM kept ORDER BY row").to_arrow_reader(100_000))
        self._rows = self._places = np.empty(0, np.int64)

    def until(self, last: int) -> tuple[np.ndarray, np.ndarray]:
        """The next ones, up to row `last`."""
        while not len(self._rows) or self._rows[-1] <= last:
            batch = next(self._batches, None)
            if batch is None:
                break
            self._rows = np.concatenate([self._rows, batch.column(0).to_numpy()])
            self._places = np.concatenate([self._places, batch.column(1).to_numpy()])
        stop = int(np.searchsorted(self._rows, last, side="right"))
        found = self._rows[:stop], self._places[:stop]
        self._rows, self._places = self._rows[stop:], self._places[stop:]
        return found

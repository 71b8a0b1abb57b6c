"""Answers to their questions: only ids meet in the join; their texts stay on disk."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import duckdb
import numpy as np

from tasks.data.shelf import Shelf

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
        Drops by reason: all rows that `kept` will not give.
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


def questions(base: duckdb.DuckDBPyConnection) -> int:
    """How many questions stay; their places are 0 to one less."""
    ((count,),) = base.execute("SELECT count(*) FROM placed").fetchall()
    return count


def kept(base: duckdb.DuckDBPyConnection, shelf: Shelf) -> Iterator[tuple[Path, np.ndarray, np.ndarray]]:
    """Of each book: its path, which of its posts stay, and the places of their questions."""
    batches = iter(base.sql("SELECT row, place FROM kept ORDER BY row").to_arrow_reader(100_000))
    rows = places = np.empty(0, np.int64)
    for path, numbers in shelf.books:
        while not len(rows) or rows[-1] < numbers.stop:
            batch = next(batches, None)
            if batch is None:
                break
            rows = np.concatenate([rows, batch.column(0).to_numpy()])
            places = np.concatenate([places, batch.column(1).to_numpy()])
        stop = int(np.searchsorted(rows, numbers.stop))
        yield path, rows[:stop] - numbers.start, places[:stop]
        rows, places = rows[stop:], places[stop:]

"""Answers to their questions: only ids meet in the join; their texts stay on disk."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import duckdb
import numpy as np
import pyarrow as pa

from tasks.data.engine import OF_PART, parts_of
from tasks.data.shelf import ANSWER, QUESTION, WHAT, Shelf

# Ids by the thousand, for a hash table of numbers with one remainder would be full of collisions.
ID, PARENT = OF_PART.format("(id // 4096)"), OF_PART.format("(parent_id // 4096)")
# The first row of an id counts, whatever it is.
FIRST = f"""
INSERT INTO first
SELECT site, id, min(row), arg_min(what, row), arg_min(parent_id, row), count(*) - 1
FROM read_parquet($posts) WHERE {ID} GROUP BY site, id
"""
ASKED = f"""
INSERT INTO asked
SELECT q.site, q.id, q.row, count(a.id)
FROM (SELECT * FROM first WHERE what = {WHAT.index(QUESTION)} AND {ID}) q
LEFT JOIN (SELECT * FROM first WHERE what = {WHAT.index(ANSWER)} AND {PARENT}) a
ON a.site = q.site AND a.parent_id = q.id
GROUP BY q.site, q.id, q.row
"""
# `place`: of the question among those that stay, sorted by (site, id).
PLACED = """
CREATE TABLE placed AS
SELECT row, site, id, row_number() OVER () - 1 AS place
FROM (SELECT row, site, id FROM asked JOIN sites USING (site) WHERE answers >= $least ORDER BY name, id)
"""
KEPT = f"""
INSERT INTO kept
SELECT a.row, q.place
FROM (SELECT * FROM first WHERE what = {WHAT.index(ANSWER)} AND {PARENT}) a
JOIN (SELECT * FROM placed WHERE {ID}) q
ON a.site = q.site AND a.parent_id = q.id
"""
TABLES = """
CREATE TABLE first (site INTEGER, id BIGINT, row BIGINT, what TINYINT, parent_id BIGINT, again BIGINT);
CREATE TABLE asked (site INTEGER, id BIGINT, row BIGINT, answers BIGINT);
"""
COUNTS = "SELECT what, count(*), sum(again) FROM first GROUP BY what"
ASKED_COUNTS = "SELECT answers >= $least, count(*), sum(answers) FROM asked GROUP BY ALL"


def join(base: duckdb.DuckDBPyConnection, shelf: Shelf, min_answers: int) -> Counter[str]:
    """Find each question's answers; questions with fewer than `min_answers` go, and their answers with them.

    Returns:
        Drops by reason: all rows that `kept` will not give.
    """
    base.register("names", pa.table({"site": range(len(shelf.sites)), "name": shelf.sites}))
    base.execute("CREATE TABLE sites AS SELECT site::INTEGER AS site, name FROM names")
    base.execute(TABLES)
    parts = parts_of(shelf.rows)
    for part in parts:
        base.execute(FIRST, {"posts": str(shelf.posts), **part})
    for part in parts:
        base.execute(ASKED, part)
    base.execute(PLACED, {"least": min_answers})
    base.execute("CREATE TABLE kept AS SELECT row, place FROM placed")
    for part in parts:
        base.execute(KEPT, part)
    drops, answers = Counter(shelf.drops), 0
    for what, count, again in base.execute(COUNTS).fetchall():
        drops["duplicate_id"] += int(again)
        if WHAT[what] == ANSWER:
            answers = count
        elif WHAT[what] != QUESTION:
            drops[WHAT[what]] += count
    drops["orphan_answer"] = answers
    for stays, count, of_these in base.execute(ASKED_COUNTS, {"least": min_answers}).fetchall():
        drops["orphan_answer"] -= int(of_these)
        if not stays:
            drops["question_with_few_answers"] += count
            drops["answer_of_dropped_question"] += int(of_these)
    return +drops


def asked_by_site(base: duckdb.DuckDBPyConnection) -> dict[str, int]:
    """Site -> how many questions it has, whether answered or not."""
    return dict(
        base.execute("SELECT name, count(*) FROM asked JOIN sites USING (site) GROUP BY name").fetchall()
    )


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

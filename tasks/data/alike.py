"""Which questions ask the same, and the proof that no two of them were parted: fingerprints on disk."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path

import duckdb
import pyarrow as pa
import pyarrow.parquet as pq

from tasks.data.engine import OF_PART, parts_of
from tasks.data.parallel import Crew
from tasks.data.split import Clusters, fingerprint, marks

KINDS = ("id", "title", "body")
MARK = OF_PART.format("mark")
SHARED = f"""
WITH marks AS (
    SELECT * FROM (SELECT file_row_number AS number, unnest(marks) AS mark FROM read_parquet($questions))
    WHERE {MARK}
)
SELECT mark, number FROM marks WHERE mark IN (SELECT mark FROM marks GROUP BY mark HAVING count(*) > 1)
ORDER BY mark, number
"""
LINKED = """
WITH questions AS (SELECT file_row_number AS number, site, id FROM read_parquet($questions))
SELECT a.number, b.number FROM read_parquet($links) l
JOIN questions a ON a.site = l.site AND a.id = l.a JOIN questions b ON b.site = l.site AND b.id = l.b
"""
OVERLAPS = f"""
SELECT kind, count(*)
FROM (SELECT kind, mark FROM homes WHERE {MARK} GROUP BY kind, mark HAVING min(split) < max(split))
GROUP BY kind
"""
HOMES = pa.schema(
    [("kind", pa.int8()), ("mark", pa.int64()), ("split", pa.int8())]
)  # places in KINDS, in SPLITS


def cluster(base: duckdb.DuckDBPyConnection, questions: Path, links: Path) -> Clusters:
    """Join questions that share a normalised title or body, or that are linked as duplicates.

    Args:
        base: a database.
        questions: Parquet file with site, id and `marks`, sorted by (site, id).
        links: Parquet file of `tasks.data.shelf.LINKS`.
    """
    count = pq.read_metadata(questions).num_rows
    clusters = Clusters(count)
    files = {"questions": str(questions)}
    for part in parts_of(2 * count):
        first: tuple[int, int] | None = None
        for mark, number in _rows(base.execute(SHARED, files | part)):
            if first and first[0] == mark:
                clusters.join(first[1], number)
            else:
                first = mark, number
    for a, b in _rows(base.execute(LINKED, files | {"links": str(links)})):
        clusters.join(a, b)
    return clusters


def overlaps(base: duckdb.DuckDBPyConnection, files: Mapping[str, Path], crew: Crew) -> dict[str, int]:
    """How many ids, titles and bodies stand in several splits; from what was written, not from `cluster`."""
    base.execute("CREATE OR REPLACE TABLE homes (kind TINYINT, mark BIGINT, split TINYINT)")
    rows, shared = 0, dict.fromkeys(KINDS, 0)
    for found in crew.map(_homes, _row_groups(files)):
        base.register("found", found)
        base.execute("INSERT INTO homes SELECT * FROM found")
        base.unregister("found")
        rows += len(found)
    for part in parts_of(rows):
        for kind, count in base.execute(OVERLAPS, part).fetchall():
            shared[KINDS[kind]] += count
    return shared


def _row_groups(files: Mapping[str, Path]) -> Iterator[tuple[int, Path, int]]:
    for split, path in enumerate(files.values()):
        for number in range(pq.read_metadata(path).num_row_groups):
            yield split, path, number


def _homes(row_group: tuple[int, Path, int]) -> pa.Table:
    split, path, number = row_group
    with pq.ParquetFile(path) as file:
        questions = file.read_row_group(number, columns=["site", "id", "title", "text"]).to_pylist()
    parts = []
    for question in questions:
        title, text = question["title"], question["text"]
        parts.append((title, text.removeprefix(title).removeprefix("\n\n") if title else text))
    rows = []
    for question, found in zip(questions, marks(parts), strict=True):
        for mark in (("id", f"{question['site']}/{question['id']}"), *found):
            rows.append({"kind": KINDS.index(mark[0]), "mark": fingerprint(mark), "split": split})
    return pa.Table.from_pylist(rows, schema=HOMES)


def _rows(cursor: duckdb.DuckDBPyConnection) -> Iterator[tuple]:
    while rows := cursor.fetchmany(10_000):
        yield from rows

"""DuckDB, within bounds: what does not fit into its share of memory goes to disk.

Spilling has its limits: a join or a count of more rows than `ROWS_PER_PART` is made part by part.
"""

from __future__ import annotations

from pathlib import Path

import duckdb

MEMORY = "192MB"
ROWS_PER_PART = 8_000_000
OF_PART = "({} % $parts + $parts) % $parts = $part"  # of a whole number that may be negative


def connect(folder: Path, threads: int) -> duckdb.DuckDBPyConnection:
    """A database of its own in `folder`, which also takes what spills."""
    connection = duckdb.connect(
        folder / "join.duckdb",
        config={
            "memory_limit": MEMORY,
            "threads": threads,
            "temp_directory": str(folder / "spill"),
            "autoinstall_known_extensions": False,
            "autoload_known_extensions": False,
        },
    )
    connection.execute("SET enable_progress_bar = false")
    return connection


def parts_of(rows: int) -> list[dict[str, int]]:
    """The parameters of a query that says `OF_PART`, for each part of so many rows."""
    parts = 1 + rows // ROWS_PER_PART
    return [{"parts": parts, "part": part} for part in range(parts)]

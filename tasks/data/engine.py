"""DuckDB, within bounds: what does not fit into its share of memory goes to disk."""

from __future__ import annotations

from pathlib import Path

import duckdb

MEMORY = "384MB"


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

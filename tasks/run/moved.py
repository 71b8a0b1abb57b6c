"""A home that was moved or copied: MLflow's sqlite file names places absolutely, and no call changes one.

Nothing of MLflow is imported: this runs before every connection, and costs a millisecond where nothing moved.
"""

from __future__ import annotations

import sqlite3
from contextlib import closing
from pathlib import Path
from urllib.parse import unquote, urlsplit

ARTIFACTS = "mlartifacts"
SECONDS_TO_WAIT = 10.0  # for another process that writes
PLACES = (
    ("experiments", "artifact_location"),
    ("runs", "artifact_uri"),
    ("logged_models", "artifact_location"),
    ("model_versions", "source"),
    ("model_versions", "storage_location"),
)


def old_places(store: Path, home: Path) -> list[str]:
    """The artifact folders that `store` names and that stood beside it somewhere else; [] where none did.

    A place counts if its folder is gone (the home was moved), or has a store of its own beside it (it was
    copied): a folder that somebody chose on purpose is left alone.
    """
    if not store.is_file():
        return []
    with closing(sqlite3.connect(f"{store.as_uri()}?mode=ro", uri=True)) as file:
        try:
            rows = file.execute("select distinct artifact_location from experiments").fetchall()
        except sqlite3.Error:  # no store of MLflow's, or another schema: MLflow itself will say so
            return []
    return [place for (place,) in rows if place and _is_old(place, store, home)]


def follow(store: Path, home: Path) -> list[str]:
    """Let everything that `store` names under an old place stand under `home`; the old places.

    Raises:
        sqlite3.Error: the file cannot be written.
    """
    places, new = old_places(store, home), f"{home.as_uri()}/{ARTIFACTS}"
    if places:
        with closing(sqlite3.connect(store, timeout=SECONDS_TO_WAIT)) as file, file:
            file.execute("begin immediate")
            for table, column in PLACES:
                if any(row[1] == column for row in file.execute(f"pragma table_info({table})")):
                    _rename(file, table, column, places, new)
    return places


def _rename(file: sqlite3.Connection, table: str, column: str, places: list[str], new: str) -> None:
    for old in places:
        file.execute(
            f"update {table} set {column} = ? || substr({column}, ?)"
            f" where {column} = ? or substr({column}, 1, ?) = ?",
            (new, len(old) + 1, old, len(old) + 1, f"{old}/"),
        )


def _is_old(place: str, store: Path, home: Path) -> bool:
    parts = urlsplit(place)
    folder = Path(unquote(parts.path))
    if parts.scheme not in ("", "file") or folder.name != ARTIFACTS or folder == home / ARTIFACTS:
        return False
    return not folder.exists() or (folder.parent / store.name).exists()

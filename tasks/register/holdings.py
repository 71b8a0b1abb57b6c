"""What a registry holds, and whether its files are there: a row is not the thing.

The sqlite file of the run's own folder is read as it is, because MLflow takes seconds to be imported and every
`dvc repro` asks; any other registry is asked through MLflow's client. Both give the same (tests compare them).
"""

from __future__ import annotations

import json
import os
import sqlite3
from collections.abc import Iterable, Mapping
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import unquote, urlsplit

if TYPE_CHECKING:
    from mlflow import MlflowClient

IDENTITY, SERVED, FILES, TRIAL = "stackrl.md5", "stackrl.served", "stackrl.files", "dvc.exp"
VERSIONS = """
    select v.name, v.version, coalesce(v.storage_location, v.source) from model_versions v
    where v.status = 'READY' and v.current_stage != 'Deleted_Internal' and v.name in ({})
"""
TAGS = "select name, version, key, value from model_version_tags where key in (?, ?, ?) and name in ({})"
ALIASES = "select name, alias, version from registered_model_aliases where name in ({})"


@dataclass(frozen=True, slots=True)
class Version:
    """A version that MLflow calls ready."""

    number: int
    md5: str  # of the weights, as DVC counts it
    served: str  # of code and numbers that travel along
    place: str  # of its files: a path or a URI
    files: Mapping[str, int] | None  # relative path -> bytes, written last; None: it never came to its end

    def is_whole(self, client: MlflowClient | None = None) -> bool:
        """Whether every file stands at its place with its size; any file, where no list of them was kept."""
        there = sizes(self.place, client)
        return bool(there) and (self.files or {}).items() <= there.items()


@dataclass(frozen=True, slots=True)
class Holding:
    """One registered model: its versions, the newest first, and alias -> version."""

    versions: tuple[Version, ...]
    aliases: Mapping[str, int]

    def find(self, md5: str, served: str, client: MlflowClient | None = None) -> Version | None:
        """The newest whole version of these weights that answers like that."""
        mine = (one for one in self.versions if (one.md5, one.served) == (md5, served) and one.files)
        return next((one for one in mine if one.is_whole(client)), None)

    def lost_aliases(self, client: MlflowClient | None = None) -> dict[str, int]:
        """Alias -> version of those that name files which are not there, or no version at all."""
        whole = {one.number for one in self.versions if one.is_whole(client)}
        return {alias: number for alias, number in self.aliases.items() if number not in whole}


def in_file(store: Path, names: Iterable[str]) -> dict[str, Holding]:
    """What MLflow's sqlite file holds of these models.

    Raises:
        sqlite3.Error: it cannot be read, or is of a schema that this does not know.
    """
    names = list(names)
    marks = ", ".join("?" * len(names))
    with closing(sqlite3.connect(f"{store.as_uri()}?mode=ro", uri=True)) as file:
        rows = file.execute(VERSIONS.format(marks), names).fetchall()
        keys = (IDENTITY, SERVED, FILES)
        tags = {
            (name, version, key): value
            for name, version, key, value in file.execute(TAGS.format(marks), (*keys, *names))
        }
        aliases = file.execute(ALIASES.format(marks), names).fetchall()
    return {
        name: Holding(
            _sorted(
                _version(number, {key: tags.get((name, number, key)) for key in keys}, place)
                for owner, number, place in rows
                if owner == name
            ),
            {alias: int(number) for owner, alias, number in aliases if owner == name},
        )
        for name in names
    }


def by_client(client: MlflowClient, names: Iterable[str]) -> dict[str, Holding]:
    """What any registry holds of these models."""
    from mlflow.exceptions import MlflowException

    found = {}
    for name in names:
        rows = [one for one in client.search_model_versions(f"name = '{name}'") if one.status == "READY"]
        try:
            aliases = client.get_registered_model(name).aliases
        except MlflowException:
            aliases = {}
        places = (client.get_model_version_download_uri(name, str(one.version)) for one in rows)
        versions = _sorted(_version(one.version, one.tags, place) for one, place in zip(rows, places, strict=True))
        found[name] = Holding(versions, {alias: int(number) for alias, number in aliases.items()})
    return found


def sizes(place: str, client: MlflowClient | None = None) -> dict[str, int]:
    """Relative path -> bytes of every file under a place; empty where there is none."""
    if (folder := local_folder(place)) is not None:
        walked = ((Path(base), names) for base, _, names in os.walk(folder))
        files = [base / name for base, names in walked for name in names]
        return {file.relative_to(folder).as_posix(): file.stat().st_size for file in files}
    from mlflow.exceptions import MlflowException
    from mlflow.store.artifact.artifact_repository_registry import get_artifact_repository

    found, folders = {}, [None]
    try:
        repository = get_artifact_repository(place, tracking_uri=client.tracking_uri if client else None)
        while folders:
            for one in repository.list_artifacts(folders.pop()):
                if one.is_dir:
                    folders.append(one.path)
                else:
                    found[one.path] = int(one.file_size or 0)
    except (MlflowException, OSError):
        return {}
    return found


def local_folder(place: str) -> Path | None:
    """The folder of a path or file URI; None for what lies elsewhere."""
    parts = urlsplit(place)
    if parts.scheme == "file":
        return Path(unquote(parts.path))
    return None if "://" in place or place.startswith(("models:", "mlflow-artifacts:", "runs:")) else Path(place)


def _version(number: int | str, tags: Mapping[str, str | None], place: str) -> Version:
    files = tags.get(FILES)
    known = json.loads(files) if files else None
    return Version(int(number), tags.get(IDENTITY) or "", tags.get(SERVED) or "", place, known)


def _sorted(versions: Iterable[Version]) -> tuple[Version, ...]:
    return tuple(sorted(versions, key=lambda one: -one.number))

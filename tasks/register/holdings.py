"""What a registry holds, and whether its files are there: a row is not the thing.

The sqlite file of the run's own folder is read as it is, because every `dvc repro` asks and MLflow takes
seconds to be imported; any other registry is asked through MLflow's client. A test holds that both agree.
"""

from __future__ import annotations

import json
import os
import sqlite3
from collections import defaultdict
from collections.abc import Iterable, Mapping
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import unquote, urlsplit

if TYPE_CHECKING:
    from mlflow import MlflowClient

IDENTITY, SERVED, FILES, TRIAL = "stackrl.md5", "stackrl.served", "stackrl.files", "dvc.exp"
CHAMPION, REASONS = "champion", "champion_reasons"  # what policy_eval says of a policy
KEYS = (IDENTITY, SERVED, FILES, CHAMPION, REASONS)
VERSIONS = """
    select name, version, coalesce(storage_location, source), status from model_versions
    where current_stage != 'Deleted_Internal' and name in ({})
"""
TAGS = "select name, version, key, value from model_version_tags where key in ({}) and name in ({})"
ALIASES = "select name, alias, version from registered_model_aliases where name in ({})"


@dataclass(frozen=True, slots=True)
class Version:
    """One version.

    Attributes:
        number: MLflow's.
        is_ready: MLflow's upload came to its end.
        md5: of the weights, as DVC counts it.
        served: digest of the code and numbers that travel along.
        place: of its files, a path or a URI.
        files: relative path -> bytes, written last; None where it was not.
        verdict: the tags of policy_eval's; empty where it has none.
    """

    number: int
    is_ready: bool
    md5: str
    served: str
    place: str
    files: Mapping[str, int] | None
    verdict: Mapping[str, str]

    def is_whole(self, client: MlflowClient | None = None) -> bool:
        """Whether every file stands at its place with its size; any file, where no list of them was kept."""
        there = sizes(self.place, client) if self.is_ready else {}
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

    def md5(self, number: int) -> str | None:
        """Of the weights of a version; None where there is no such version."""
        return next((one.md5 for one in self.versions if one.number == number), None)

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
    marks, of_keys = (", ".join("?" * len(each)) for each in (names, KEYS))
    with closing(sqlite3.connect(f"{store.as_uri()}?mode=ro", uri=True)) as file:
        rows = file.execute(VERSIONS.format(marks), names).fetchall()
        tagged = file.execute(TAGS.format(of_keys, marks), (*KEYS, *names)).fetchall()
        aliases = file.execute(ALIASES.format(marks), names).fetchall()
    tags: dict[tuple[str, int], dict[str, str]] = defaultdict(dict)
    for name, number, key, value in tagged:
        tags[name, number][key] = value
    versions, named = defaultdict(list), defaultdict(dict)
    for name, number, place, status in rows:
        versions[name].append(_version(number, status, tags[name, number], place))
    for name, alias, number in aliases:
        named[name][alias] = int(number)
    return {name: Holding(_sorted(versions[name]), named[name]) for name in names}


def is_deleted(store: Path, experiment: str) -> bool:
    """Whether somebody deleted the experiment: MLflow keeps it for a while, with all that its runs logged."""
    asked = "select count(*) from experiments where name = ? and lifecycle_stage = 'deleted'"
    with closing(sqlite3.connect(f"{store.as_uri()}?mode=ro", uri=True)) as file:
        return file.execute(asked, (experiment,)).fetchone()[0] > 0


def by_client(client: MlflowClient, names: Iterable[str]) -> dict[str, Holding]:
    """What any registry holds of these models."""
    from mlflow.exceptions import MlflowException

    found = {}
    for name in names:
        versions = []
        for one in client.search_model_versions(f"name = '{name}'"):
            place = client.get_model_version_download_uri(name, str(one.version))
            versions.append(_version(one.version, one.status, one.tags, place))
        try:
            aliases = client.get_registered_model(name).aliases
        except MlflowException:  # there is no such model
            aliases = {}
        found[name] = Holding(_sorted(versions), {alias: int(number) for alias, number in aliases.items()})
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
    return None if parts.scheme else Path(place)


def _version(number: int | str, status: str, tags: Mapping[str, str], place: str) -> Version:
    files = tags.get(FILES)
    known = json.loads(files) if files else None
    verdict = {key: tags[key] for key in (CHAMPION, REASONS) if key in tags}
    return Version(
        int(number), status == "READY", tags.get(IDENTITY, ""), tags.get(SERVED, ""), place, known, verdict
    )


def _sorted(versions: Iterable[Version]) -> tuple[Version, ...]:
    return tuple(sorted(versions, key=lambda one: -one.number))

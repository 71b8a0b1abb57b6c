"""Where a stage finds and leaves its files, and the fingerprint under which it may resume."""

from __future__ import annotations

import hashlib
import json
import os
import time
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import yaml

STAGES = ("data", "pack", "sft", "reward", "reward_eval", "ppo", "policy_eval", "register")
EXPERIMENT_VARIABLE = "DVC_EXP_NAME"  # DVC sets it, and DVC_ROOT, for the stages of an experiment
TRIES_OF_LOCK, SECONDS_BETWEEN_TRIES = 5, 0.1
NO_CONTENT = ("__pycache__", ".gitignore")  # neither says anything about what a stage computes


class Refusal(ValueError):  # noqa: N818 - no error: the stage did its part
    """A stage declines to run for a stated reason (a gate that did not pass); trying again cannot help."""


@dataclass(frozen=True, slots=True)
class StageResult:
    """What a stage hands back: ``StageResult({"accuracy": 0.81, "pairs": 1290.0})``.

    Attributes:
        metrics: name -> value, for artifacts/<stage>/metrics.json and MLflow; nothing timed, no ids.
        note: what the closing line says beside them.
    """

    metrics: dict[str, float]
    note: str = ""


@dataclass(frozen=True, slots=True)
class Layout:
    """The two roots of a run.

    Attributes:
        root: absolute working directory: params.yaml, dvc.yaml, dvc.lock, data/, artifacts/.
        home: absolute folder that outlives a workspace and is shared by all: mlflow.db, mlartifacts/,
            scratch/ by fingerprint, reports/. The same as `root`, except in `dvc exp run --temp` and in DVC's
            queue, whose working directory is a copy that DVC removes.
    """

    root: Path
    home: Path

    @classmethod
    def here(cls) -> Layout:
        """The layout of the working directory; home is $DVC_ROOT (set by DVC for a stage) or the same."""
        root = Path.cwd()
        return cls(root, Path(os.environ.get("DVC_ROOT") or root).resolve())

    @property
    def workspace(self) -> str:
        """A name for `root` beside others, without its place: ``gouty-toga-1f0c3a9b``.

        It begins with the name of DVC's experiment, or else of the folder.
        """
        name = os.environ.get(EXPERIMENT_VARIABLE) if self.root != self.home else None
        return f"{name or self.root.name}-{hashlib.sha256(os.fsencode(self.root)).hexdigest()[:8]}"

    def kept(self, folder: str, *parts: str) -> Path:
        """A place under `folder` (scratch, reports) of home that is this workspace's own and outlives it."""
        own = () if self.root == self.home else ("workspaces", self.workspace)
        return self.home.joinpath(folder, *own, *parts)

    def artifact(self, stage: str, *parts: str) -> Path:
        """A place among the outs of `stage`, under artifacts/<stage>."""
        return self.root.joinpath("artifacts", stage, *parts)

    def stages(self) -> dict[str, dict[str, Any]]:
        """The stages of dvc.yaml by name: cmd, deps, params, outs, meta."""
        return read_yaml(self.root / "dvc.yaml").get("stages", {})

    def locked(self) -> dict[str, dict[str, Any]]:
        """The stages that dvc.lock knows, with md5s; empty where there is no dvc.lock.

        Raises:
            ValueError: dvc.lock cannot be read, and stays so: a dvc that is writing it empties it first.
        """
        path = self.root / "dvc.lock"
        for is_last in (False,) * TRIES_OF_LOCK + (True,):
            try:
                return _stages(path) if path.exists() else {}
            except ValueError as error:
                if is_last:
                    line = f"{path} is damaged: {error}; `git checkout dvc.lock` mends it"
                    raise ValueError(line) from None
                time.sleep(SECONDS_BETWEEN_TRIES)
        return {}

    def tracked(self, stage: str) -> list[str]:
        """The sections and dotted parameters that `stage` depends on; ValueError for an unknown stage."""
        stages = self.stages()
        if stage not in stages:
            raise ValueError(f"dvc.yaml: no stage {stage!r}; it has {', '.join(stages)}")
        return stages[stage].get("params", [])

    def fingerprint(self, stage: str) -> str:
        """Identify everything that `stage` computes from; `machine` is not in it.

        An upstream out counts by its md5 in dvc.lock, so nothing large is read; anything else (code, one file
        of an out folder, an out that dvc.lock does not know) by its contents.

        Returns:
            sha256, 64 hex digits, of the stage's name, the tracked parameter values and its dependencies.

        Raises:
            ValueError: dvc.yaml has no such stage, or params.yaml no such parameter.
            FileNotFoundError: dvc.yaml, params.yaml or a dependency is missing.
        """
        tracked, deps = self.tracked(stage), self.stages()[stage].get("deps", [])
        values = read_yaml(self.root / "params.yaml") if tracked else {}
        known = self._locked_outs()
        facts = {
            "stage": stage,
            "params": {name: _value(values, name) for name in tracked},
            "deps": {dep: known.get(dep) or self._contents(stage, dep) for dep in deps},
        }
        return hashlib.sha256(json.dumps(facts, sort_keys=True, default=str).encode()).hexdigest()

    def scratch(self, stage: str) -> Path:
        """The folder, made if need be, of what `stage` needs to resume under this fingerprint only."""
        folder = self.home / "scratch" / stage / self.fingerprint(stage)
        folder.mkdir(parents=True, exist_ok=True)
        return folder

    def refusal(self, stage: str) -> Path:
        """Where `stage` of this workspace says why it declined to run: {"stage", "reason"}."""
        return self.root / "scratch" / stage / "refusal.json"

    def _locked_outs(self) -> dict[str, str]:
        """Path -> md5 of every out that dvc.lock knows."""
        outs = (out for stage in self.locked().values() for out in stage.get("outs", []))
        return {out["path"]: out["md5"] for out in outs if "md5" in out}

    def _contents(self, stage: str, dep: str) -> str:
        path = self.root / dep
        if not path.exists():
            raise FileNotFoundError(f"{stage} needs {dep}, which is missing; `dvc repro {stage}` makes it")
        return content_hash(path)


def content_hash(path: Path) -> str:
    """The sha256 of a file, or of a folder's relative names and contents; links are followed."""
    if not path.is_dir():
        status = path.stat()
        return _file_hash(path, status.st_size, status.st_mtime_ns)
    listing = hashlib.sha256()
    for file in sorted(_files(path)):
        listing.update(os.fsencode(file.relative_to(path)) + b"\0" + content_hash(file).encode() + b"\n")
    return listing.hexdigest()


@lru_cache(maxsize=10_000)
def _file_hash(path: Path, size: int, changed: int) -> str:
    """Of a dump of 100 GB, minutes; a stage asks for its fingerprint several times."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _files(folder: Path) -> Iterator[Path]:
    for base, folders, names in os.walk(folder, followlinks=True):
        folders[:] = [name for name in folders if name not in NO_CONTENT]
        yield from (Path(base, name) for name in names if name not in NO_CONTENT)


def read_yaml(path: Path) -> dict[str, Any]:
    """A YAML mapping; ValueError naming the file and the place where it cannot be read."""
    if not path.exists():
        raise FileNotFoundError(f"{path} does not exist: run from the repository's root")
    try:
        return yaml.safe_load(path.read_text(encoding="utf-8")) or {}
    except yaml.YAMLError as error:
        raise ValueError(f"{path}: {' '.join(str(error).split())}") from None


def _stages(lock: Path) -> dict[str, dict[str, Any]]:
    """`stages` of dvc.lock; ValueError where it is none."""
    try:
        found = yaml.safe_load(lock.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(" ".join(str(error).split())) from None
    if not found:
        raise ValueError("it is empty")
    stages = found.get("stages", {}) if isinstance(found, dict) else None
    if not isinstance(stages, dict) or not all(isinstance(stage, dict) for stage in stages.values()):
        raise ValueError("it names no stages")
    return stages


def _value(values: dict[str, Any], dotted: str) -> Any:
    for key in dotted.split("."):
        if not isinstance(values, dict) or key not in values:
            raise ValueError(f"params.yaml: {dotted} is missing, and dvc.yaml tracks it")
        values = values[key]
    return values

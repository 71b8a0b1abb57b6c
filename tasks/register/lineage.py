"""What a model was made of: md5s of dvc.lock, parameters, metrics, commit."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tasks.register.holdings import CHAMPION, REASONS
from tasks.run.layout import Layout
from tasks.run.provenance import git_tags

if TYPE_CHECKING:
    from params.schema import Params

SOURCES = ("data", "pack")  # stages whose outs a version is tagged with
JUDGES = ("reward_eval", "policy_eval")  # stages whose metrics a version is tagged with
NO_VERDICT = "policy_eval has given no verdict"


def locked_md5s(layout: Layout) -> dict[str, str]:
    """Path -> md5 of every out in dvc.lock; empty outside DVC."""
    outs = (out for stage in layout.locked().values() for out in stage.get("outs", []))
    return {out["path"]: out["md5"] for out in outs if "md5" in out}


def folder_md5(folder: Path) -> str:
    """The md5 that DVC gives a folder: of the JSON list of its files' md5s and names."""
    files = {path.relative_to(folder).as_posix(): path for path in folder.rglob("*") if path.is_file()}
    listing = [{"md5": _md5(files[name]), "relpath": name} for name in sorted(files)]
    return hashlib.md5(json.dumps(listing).encode()).hexdigest() + ".dir"


def sources(locked: Mapping[str, str]) -> dict[str, str]:
    """Tags of the data and the tokenizer behind the models."""
    places = tuple(f"artifacts/{stage}/" for stage in SOURCES)
    return {f"dvc.{path}": md5 for path, md5 in locked.items() if path.startswith(places)}


def tags(params: Params, layout: Layout, locked: Mapping[str, str]) -> dict[str, str]:
    """All tags of a version but its own identity."""
    judged = {
        f"{stage}.{name}": json.dumps(value)
        for stage in JUDGES
        for name, value in metrics(layout, stage).items()
    }
    numbers = dict(_leaves(params.model_dump(mode="json"), "params"))
    return {**git_tags(layout.root), **sources(locked), **judged, **numbers}


def metrics(layout: Layout, stage: str) -> dict[str, float]:
    """The stage's metrics.json; empty where there is none."""
    path = layout.artifact(stage, "metrics.json")
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}


def is_champion(layout: Layout) -> bool:
    """Whether policy_eval finds the policy worthy of being called champion."""
    return metrics(layout, "policy_eval").get("champion", 0.0) == 1.0


def verdict(layout: Layout) -> dict[str, str]:
    """What policy_eval says of the policy, as tags of its version: yes or no, and the reasons in one line.

    Raises:
        ValueError: its card cannot be read.
    """
    path, said = layout.artifact("policy_eval", "card.json"), {}
    if path.exists():
        try:
            said = json.loads(path.read_text(encoding="utf-8")).get("champion", {})
        except ValueError as error:
            raise ValueError(f"{path}: {error}; `dvc repro policy_eval` writes it anew") from None
    reasons = "; ".join(said.get("reasons", ())) or NO_VERDICT
    return {CHAMPION: "yes" if is_champion(layout) else "no", REASONS: reasons}


def _leaves(values: Mapping[str, Any], prefix: str) -> Iterator[tuple[str, str]]:
    for key, value in values.items():
        if isinstance(value, Mapping):
            yield from _leaves(value, f"{prefix}.{key}")
        else:
            yield f"{prefix}.{key}", value if isinstance(value, str) else json.dumps(value)


def _md5(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "md5").hexdigest()

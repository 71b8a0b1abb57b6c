"""The graph of dvc.yaml, as far as a flow needs it."""

from collections.abc import Iterator
from pathlib import PurePosixPath
from typing import Any


def upstream(stages: dict[str, dict[str, Any]]) -> dict[str, set[str]]:
    """Stage -> the stages whose outs it reads, from the `stages` of dvc.yaml."""
    outs = {stage: list(_paths(entry, "outs", "metrics", "plots")) for stage, entry in stages.items()}
    return {
        stage: {
            maker
            for dep in _paths(entry, "deps")
            for maker, made in outs.items()
            if any(dep.is_relative_to(out) or out.is_relative_to(dep) for out in made)
        }
        for stage, entry in stages.items()
    }


def needed(edges: dict[str, set[str]], target: str) -> set[str]:
    """`target` and everything before it."""
    return {target}.union(*(needed(edges, stage) for stage in edges[target]))


def _paths(entry: dict[str, Any], *kinds: str) -> Iterator[PurePosixPath]:
    """Paths of an entry; DVC writes one with options as {path: {cache: false}}."""
    for kind in kinds:
        for item in entry.get(kind, []):
            yield PurePosixPath(item if isinstance(item, str) else next(iter(item)))

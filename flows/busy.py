"""DVC where another process works or was killed: what it left is mended, and its words become ours."""

import configparser
import fcntl
import json
import os
import re
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from flows import process
from tasks.run.locks import is_dvc, named

SECONDS_BETWEEN_LOOKS = 0.5
TRIES = 50  # at the guard of DVC's lock file, which a dvc holds for a moment
IS_BUSY = "is busy, it is being blocked by:"
BLOCKER = re.compile(r"\(PID (\d+)\): ")
NO_GIT = (
    "is not a git repository",
    "this folder is no git repository, which DVC asks for: `git init && git add -A && git commit -m start`, "
    "or `dvc config --local core.no_scm true` (then without DVC's experiments)",
)
NO_LOCK = (
    "'./dvc.lock' validation failed",
    "dvc.lock is damaged; `git checkout dvc.lock` mends it",
)
WILL_FAIL_AGAIN = (NO_GIT, NO_LOCK)


@dataclass(frozen=True, slots=True)
class Holder:
    """Who holds files, as DVC's lock file has it: ``Holder(1727, "/venv/bin/dvc repro")``."""

    pid: int
    command: str

    @property
    def is_live(self) -> bool:
        """Whether that process still runs a dvc (a number may belong to another by now, or to a zombie)."""
        return is_dvc(self.pid, self.command)


def in_our_words(lines: tuple[str, ...]) -> str | None:
    """What a user can do about DVC's complaint, where another attempt would end like this one; else None."""
    return next((ours for theirs, ours in WILL_FAIL_AGAIN if any(theirs in line for line in lines)), None)


def blockers(lines: tuple[str, ...]) -> list[int]:
    """The processes that DVC says it is blocked by; none where it says no such thing."""
    if not any(IS_BUSY in line for line in lines):
        return []
    return sorted({int(found[1]) for line in lines if (found := BLOCKER.search(line))})


def wait_for(pids: list[int]) -> None:
    """Until none of these processes runs dvc, or the flow is being ended."""
    while any(is_dvc(pid) for pid in pids) and not process.STOPPING.wait(SECONDS_BETWEEN_LOOKS):
        pass


def names(pids: list[int]) -> str:
    """``process 1727 (dvc repro)``, for a line."""
    return "process " + ", ".join(named(pid) for pid in pids)


def mend(root: Path) -> str | None:
    """Drop from DVC's lock file what no living dvc holds, and all of it when it cannot be read.

    A killed dvc leaves an entry or half a file behind; a number in it may be another program's by now.

    Returns:
        The line that says so; None where there was nothing to mend.
    """
    path = _dvc_folder(root) / "tmp" / "rwlock"
    if not path.is_file() or _has_other_locks(path.parents[1]):
        return None
    with path.with_name("rwlock.lock").open("a+") as guard:
        if not _lock(guard.fileno()):
            return None
        try:
            found = _read(path)
        except ValueError:
            path.unlink()
            return f"{path.relative_to(root) if path.is_relative_to(root) else path}: unreadable, removed"
        gone = {one for one in _holders(found) if not one.is_live}
        if not gone:
            return None
        _write(path, _without(found, gone))
    pids = ", ".join(str(one.pid) for one in sorted(gone, key=lambda one: one.pid))
    return f"{path.name}: dropped what process {pids} held, which runs no dvc any more"


def _dvc_folder(root: Path) -> Path:
    """`.dvc` of the repository that `root` stands in."""
    return next((one / ".dvc" for one in (root, *root.parents) if (one / ".dvc").is_dir()), root / ".dvc")


def _has_other_locks(folder: Path) -> bool:
    """Whether DVC is told to guard its files by hard links, which `flock` says nothing about."""
    config = configparser.ConfigParser(strict=False, interpolation=None)
    try:
        config.read([folder / "config", folder / "config.local"], encoding="utf-8")
        return config.getboolean("core", "hardlink_lock", fallback=False)
    except (configparser.Error, ValueError):
        return False


def _lock(guard: int) -> bool:
    for _ in range(TRIES):
        try:
            fcntl.flock(guard, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return True
        except BlockingIOError:
            time.sleep(0.1)
    return False


def _read(path: Path) -> dict[str, dict[str, list[dict[str, Any]]]]:
    """{"write" or "read": {path: its holders}}; ValueError where it is anything else."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        sections = {"write": {key: [one] for key, one in found.pop("write", {}).items()}}
        sections["read"] = dict(found.pop("read", {}).items())
        if found:
            raise ValueError(f"unknown: {', '.join(found)}")
        list(_holders(sections))
    except (AttributeError, KeyError, TypeError, RecursionError) as error:
        raise ValueError(str(error)) from None
    return sections


def _holders(sections: dict[str, dict[str, list[dict[str, Any]]]]) -> Iterator[Holder]:
    for paths in sections.values():
        for entries in paths.values():
            yield from (Holder(int(one["pid"]), str(one["cmd"])) for one in entries)


def _without(sections: dict[str, dict[str, list[dict[str, Any]]]], gone: set[Holder]) -> dict[str, Any]:
    """DVC's own form again, without what these held."""
    left = {
        name: {
            path: [one for one in entries if Holder(int(one["pid"]), str(one["cmd"])) not in gone]
            for path, entries in paths.items()
        }
        for name, paths in sections.items()
    }
    write = {path: entries[0] for path, entries in left["write"].items() if entries}
    return {"write": write, "read": {path: entries for path, entries in left["read"].items() if entries}}


def _write(path: Path, value: dict[str, Any]) -> None:
    new = path.with_name(".rwlock.mended")
    new.write_text(json.dumps(value), encoding="utf-8")
    os.replace(new, path)

"""Locks that the kernel drops with their holder, and the holder's name for those who meet one."""

from __future__ import annotations

import fcntl
import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TextIO

from tasks.run.layout import Layout
from tasks.run.lifetime import parent_of, runs

SECONDS_BETWEEN_LOOKS = 1.0
LONGEST_COMMAND = 100  # characters of a command that a message quotes


class Busy(ValueError):  # noqa: N818 - no error: another does it
    """Another process does this already; the message names it."""


@contextmanager
def stage_lock(layout: Layout, stage: str) -> Iterator[int]:
    """Be the only process that runs `stage` in this workspace: it guards the outs.

    Yields:
        The lock's file descriptor: a child that inherits it holds the lock as well.

    Raises:
        Busy: another process runs it; the message names the stage and the process.
    """

    def decline(holder: str) -> None:
        raise Busy(f"stage {stage} is running already, in process {holder}")

    with held(layout.root / "scratch" / f"{stage}.lock", decline) as lock:
        yield lock


@contextmanager
def scratch_lock(layout: Layout, stage: str, on_wait: Callable[[str], None]) -> Iterator[int]:
    """Be the only process of all workspaces that uses what `stage` keeps under its fingerprint.

    Where another workspace computes the very same, `on_wait` hears of its process, and this one waits for it.
    """
    place = layout.home / "scratch" / stage / f"{layout.fingerprint(stage)}.lock"
    with held(place, on_wait) as lock:
        yield lock


@contextmanager
def held(path: Path, on_wait: Callable[[str], None]) -> Iterator[int]:
    """Hold the lock `path`, a file for that time; the kernel lets go when the process ends, however it ends.

    Args:
        path: of the file, made if need be.
        on_wait: called once with the holder, ``1727 (python -m tasks ppo)``, when it is another; what it
            raises ends the attempt, and where it returns the lock is waited for.

    Yields:
        The lock's file descriptor.
    """
    is_told = False
    while (file := _take(path)) is None:
        if not is_told:
            on_wait(_holder(path))
            is_told = True
        time.sleep(SECONDS_BETWEEN_LOOKS)
    with file:
        file.truncate(0)
        file.write(own_name())
        file.flush()
        try:
            yield file.fileno()
        finally:
            path.unlink(missing_ok=True)


def own_name() -> str:
    """This process, and the dvc above it: ``1727 (python -m tasks ppo) of 1700 (dvc repro)``."""
    above = os.getppid()
    while above > 1 and not runs(above, b"dvc"):
        above = parent_of(above)
    return named(os.getpid()) + (f" of {named(above)}" if above > 1 else "")


def named(pid: int) -> str:
    """A process with its command, as far as that can be told."""
    with suppress(OSError):
        words = Path(f"/proc/{pid}/cmdline").read_bytes().decode(errors="replace").strip("\0").split("\0")
        if any(words):
            command = " ".join([Path(words[0]).name, *words[1:]])
            return f"{pid} ({' '.join(command.split())[:LONGEST_COMMAND]})"
    return str(pid)


def is_dvc(pid: int, command: str = "") -> bool:
    """Whether a process runs dvc, or the program that used DVC under this command; a zombie runs nothing."""
    if runs(pid, b"dvc"):
        return True
    last = command.split()[-1:]
    with suppress(OSError):
        words = Path(f"/proc/{pid}/cmdline").read_bytes().decode(errors="replace").split("\0")
        return bool(last) and last[0] in words
    return False


def _take(path: Path) -> TextIO | None:
    """The locked file, or None where another process holds it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    file = path.open("a+", encoding="utf-8")
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        if os.path.samestat(os.fstat(file.fileno()), os.stat(path)):  # else its holder has just removed it
            return file
    except (BlockingIOError, FileNotFoundError):
        pass
    except BaseException:
        file.close()
        raise
    file.close()
    return None


def _holder(path: Path) -> str:
    """What the holder of a lock wrote into it; it may be about to."""
    for _ in range(20):
        with suppress(OSError):
            if text := path.read_text(encoding="utf-8", errors="replace").strip():
                return text
        time.sleep(SECONDS_BETWEEN_LOOKS / 20)
    return "unknown"

"""One process per stage, which ends when its parent ends and stops in good order when it is told to."""

from __future__ import annotations

import ctypes
import os
import signal
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType

PR_SET_PDEATHSIG = 1  # linux/prctl.h
SECONDS_BETWEEN_LOOKS = 1.0
SECONDS_TO_STOP = 10.0  # of a rank, which writes nothing then


class Stopped(KeyboardInterrupt):
    """The process was told to stop: SIGINT or SIGTERM. Unwinding writes the checkpoint and closes the run.

    Attributes:
        status: the exit status that a shell expects, 128 + the signal's number: 130 or 143.
    """

    def __init__(self, number: int) -> None:
        super().__init__(f"stopped by {signal.Signals(number).name}")
        self.status = 128 + number


def tie_to_parent() -> None:
    """Receive SIGTERM when the parent ends, however it ends: a trainer never outlives dvc. Linux only.

    DVC runs a stage through a shell; where that stays between the two, dvc itself is watched as well.
    """
    if not sys.platform.startswith("linux"):
        return
    parent = os.getppid()
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGTERM)
    if os.getppid() != parent or (parent == 1 and not runs(1, b"dvc", b"python", b"python3")):
        os.kill(os.getpid(), signal.SIGTERM)  # it ended before we could ask for that
    above = parent_of(parent)
    if not runs(parent, b"dvc") and runs(above, b"dvc"):
        threading.Thread(target=_end_with, args=(above,), daemon=True).start()


def die_with_parent() -> None:
    """Between fork and exec: the new program receives SIGTERM when this one ends. Linux only."""
    if sys.platform.startswith("linux"):
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGTERM)


def as_rank(launcher: int | None = None) -> None:
    """For one of several training processes: it ends with its parent, and with the process above that one.

    A rank that waits for another in a collective hears no signal: when its time is over, it is killed.

    Args:
        launcher: the process that started the parent; None: nobody to watch.
    """
    parent = os.getppid()
    tie_to_parent()
    threading.Thread(target=_end_after, args=(parent, launcher), daemon=True).start()


def _end_after(parent: int, launcher: int | None) -> None:
    while os.getppid() == parent and (launcher is None or _is_alive(launcher)):
        time.sleep(SECONDS_BETWEEN_LOOKS)
    os.kill(os.getpid(), signal.SIGTERM)
    time.sleep(SECONDS_TO_STOP)
    os.kill(os.getpid(), signal.SIGKILL)


def _is_alive(pid: int) -> bool:
    """Whether there is such a process; a zombie is none where that can be told."""
    try:
        os.kill(pid, 0)
        stat = Path(f"/proc/{pid}/stat")
        return not stat.exists() or stat.read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def as_worker() -> None:
    """For a process that works for another: it leaves Ctrl-C to its parent, and ends with it."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    tie_to_parent()


def _end_with(dvc: int) -> None:
    while runs(dvc, b"dvc"):
        time.sleep(SECONDS_BETWEEN_LOOKS)
    os.kill(os.getpid(), signal.SIGTERM)


def parent_of(pid: int) -> int:
    """The parent of a process; 0 where it has none or is gone."""
    try:
        return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])
    except OSError:
        return 0


def runs(pid: int, *programs: bytes) -> bool:
    """Whether a process runs one of the programs, as `dvc …` or `python -m dvc …`; a zombie runs nothing."""
    try:
        words = Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")
    except OSError:
        return False
    return any(os.path.basename(word) in programs for word in words)


@contextmanager
def stop_on_signals() -> Iterator[None]:
    """Raise `Stopped` on SIGINT and SIGTERM within the block.

    The first signal decides. A later SIGTERM is ignored, because whoever ends a group of processes sends
    several while the first one's checkpoint is still being written; a later Ctrl-C raises again. Outside the
    main thread, where Python allows no handlers, the block runs as it is.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    earlier = {number: signal.signal(number, _stop) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in earlier.items():
            signal.signal(number, handler)


def _stop(number: int, frame: FrameType | None) -> None:
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    raise Stopped(number)

"""Child processes of a flow: followed line by line, ended with everything they started.

The state lives here and not beside the flow, because Prefect pickles what stands in a flow's module.
"""

import ctypes
import os
import signal
import subprocess
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

LIVE: set[subprocess.Popen[bytes]] = set()
STOPPING = threading.Event()  # set: what runs is being ended, nothing starts, nothing is retried
ESCALATION = ((signal.SIGINT, 5.0), (signal.SIGTERM, 2.0), (signal.SIGKILL, 1.0))  # each, seconds of grace
LINES_KEPT = 50
LIBC = ctypes.CDLL(None) if sys.platform.startswith("linux") else None
PR_SET_PDEATHSIG = 1  # linux/prctl.h


@dataclass(frozen=True, slots=True)
class Ended:
    """How a process ended.

    Attributes:
        status: exit status, negative for a signal.
        lines: the last lines it wrote.
        is_overdue: it was ended because it ran into its limit.
    """

    status: int
    lines: tuple[str, ...]
    is_overdue: bool


def follow(
    command: list[str],
    folder: Path,
    environment: Mapping[str, str],
    on_line: Callable[[str], None],
    seconds: float | None = None,
) -> Ended:
    """Run `command` in `folder` for at most `seconds`, handing on each line as it comes.

    The process leads a group of its own, so that `stop` reaches whatever it starts, and gets SIGTERM when
    this thread ends, so that it does not outlive a killed flow. Of a progress bar only its end is a line.
    """
    process = subprocess.Popen(
        command,
        cwd=folder,
        env=dict(environment),
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        start_new_session=True,
        preexec_fn=_before_exec,
    )
    LIVE.add(process)
    overdue = threading.Event()
    limit = threading.Timer(seconds or 0, lambda: (overdue.set(), stop(process)))
    if seconds:
        limit.start()
    if STOPPING.is_set():  # between the caller's look at it and the start
        stop(process)
    lines: deque[str] = deque(maxlen=LINES_KEPT)
    try:
        for raw in process.stdout:
            line = raw.decode(errors="replace").rstrip().rpartition("\r")[2]
            if line:
                lines.append(line)
                on_line(line)
        return Ended(process.wait(), tuple(lines), overdue.is_set())
    finally:
        limit.cancel()
        LIVE.discard(process)


def stop(process: subprocess.Popen[bytes]) -> None:
    """End a process and all of its group, politely at first; 8 s at most."""
    for number, seconds in ESCALATION:
        if not _signal_group(process, number):
            return
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline:
            if not _signal_group(process, 0):
                return
            time.sleep(0.05)


def stop_all() -> None:
    """End everything that runs and let nothing new start, until `start_anew`."""
    STOPPING.set()
    for process in list(LIVE):
        stop(process)


def start_anew() -> None:
    """Forget an earlier flow of this process."""
    STOPPING.clear()


def _signal_group(process: subprocess.Popen[bytes], number: int) -> bool:
    """Send a signal (0: just look); whether any process of the group was left to get it."""
    process.poll()  # a zombie of ours would count as left
    try:
        os.killpg(process.pid, number)
    except ProcessLookupError:
        return False
    return True


def _before_exec() -> None:
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # a background job of a shell would ignore it
    if LIBC:
        LIBC.prctl(PR_SET_PDEATHSIG, signal.SIGTERM)

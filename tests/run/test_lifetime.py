"""A stage's process: tied to its parent, stopped in good order. Real processes and real signals."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from tasks.run.lifetime import Stopped, stop_on_signals

PATIENCE = 60  # seconds until a test gives up on a process; never a measure of speed

TRAINER = """
import signal, sys, time
from pathlib import Path
from tasks.run.lifetime import Stopped, stop_on_signals, tie_to_parent
folder = Path(sys.argv[1])
try:
    with stop_on_signals():
        tie_to_parent()
        try:
            (folder / "trainer").write_text("up")
            time.sleep(600)
        except Stopped:
            (folder / "saving").write_text("")
            time.sleep(float(sys.argv[2]))
            (folder / "checkpoint").write_text("whole")
            raise
except Stopped as stopped:
    sys.exit(stopped.status)
"""
PARENT = """
import subprocess, sys
child = subprocess.Popen([sys.executable, "-c", sys.argv[1], *sys.argv[2:]])
print(child.pid, flush=True)
child.wait()
"""


def start(script: str, *arguments: str) -> subprocess.Popen[str]:
    return subprocess.Popen([sys.executable, "-c", script, *arguments], stdout=subprocess.PIPE, text=True)


def until(condition, what: str) -> None:
    deadline = time.monotonic() + PATIENCE
    while not condition():
        assert time.monotonic() < deadline, f"waited in vain: {what}"
        time.sleep(0.02)


def is_alive(pid: int) -> bool:
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return False
    return state != "Z"


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="PDEATHSIG is Linux's")
def test_a_trainer_ends_with_its_parent_and_saves_first(tmp_path):
    parent = start(PARENT, TRAINER, str(tmp_path), "0")
    child = int(parent.stdout.readline())
    until((tmp_path / "trainer").exists, "the trainer to start")
    parent.send_signal(signal.SIGKILL)
    parent.wait()
    until(lambda: not is_alive(child), "the orphan to end")
    assert (tmp_path / "checkpoint").read_text() == "whole"


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="/proc is Linux's")
def test_a_trainer_ends_with_dvc_although_a_shell_stands_between(tmp_path):
    """dash, which DVC takes where SHELL is not set, waits for its command instead of becoming it."""
    parent = "import subprocess, sys; subprocess.Popen(sys.argv[1:]).wait()"
    (tmp_path / "dvc").write_text(parent)  # a process that runs a program of that name
    (tmp_path / "trainer.py").write_text(TRAINER)
    line = f"{sys.executable} {tmp_path / 'trainer.py'} {tmp_path} 0; true"
    dvc = subprocess.Popen([sys.executable, str(tmp_path / "dvc"), "/bin/sh", "-c", line])
    until((tmp_path / "trainer").exists, "the trainer to start")
    dvc.kill()
    dvc.wait()
    until((tmp_path / "checkpoint").exists, "the trainer to end")


@pytest.mark.parametrize(("number", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_second_sigterm_does_not_break_the_checkpoint(tmp_path, number, status):
    trainer = start(TRAINER, str(tmp_path), "0.5")
    until((tmp_path / "trainer").exists, "the trainer to start")
    trainer.send_signal(number)
    until((tmp_path / "saving").exists, "the trainer to notice")
    trainer.send_signal(signal.SIGTERM)
    assert trainer.wait(PATIENCE) == status
    assert (tmp_path / "checkpoint").read_text() == "whole"


def test_a_second_ctrl_c_stops_at_once(tmp_path):
    trainer = start(TRAINER, str(tmp_path), "600")
    until((tmp_path / "trainer").exists, "the trainer to start")
    trainer.send_signal(signal.SIGINT)
    until((tmp_path / "saving").exists, "the trainer to notice")
    trainer.send_signal(signal.SIGINT)
    assert trainer.wait(PATIENCE) == 130
    assert not (tmp_path / "checkpoint").exists()


def test_handlers_are_put_back():
    before = signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)
    with pytest.raises(Stopped) as stopped, stop_on_signals():
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(PATIENCE)
    assert stopped.value.status == 143 and isinstance(stopped.value, KeyboardInterrupt)
    assert (signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)) == before


def test_outside_the_main_thread_nothing_is_installed():
    seen = []

    def work() -> None:
        with stop_on_signals():
            seen.append(signal.getsignal(signal.SIGTERM))

    before = signal.getsignal(signal.SIGTERM)
    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert seen == [before]

"""Child processes of a flow: followed, limited, ended with all they started."""

from __future__ import annotations

import os
import signal
import sys
import threading
from pathlib import Path

import pytest
from toy import is_alive, until

from flows import process

SCRIPT = "import os, signal, subprocess, sys, time\nfrom pathlib import Path\n"
STUBBORN = """
signal.signal(signal.SIGINT, signal.SIG_IGN)
signal.signal(signal.SIGTERM, signal.SIG_IGN)
Path("child").write_text(str(os.getpid()))
print("up", flush=True)
time.sleep(600)
"""


@pytest.fixture(autouse=True)
def anew():
    process.start_anew()
    yield
    process.start_anew()


def follow(folder: Path, script: str, seconds: float | None = None) -> tuple[process.Ended, list[str]]:
    lines: list[str] = []
    ended = process.follow([sys.executable, "-c", SCRIPT + script], folder, os.environ, lines.append, seconds)
    return ended, lines


def test_lines_come_one_by_one_and_of_a_bar_only_its_end(tmp_path):
    script = r"""
print("first", flush=True)
sys.stderr.write("\r 10%\r 55%\r100%\n\n")
print("Grüße", flush=True)
os.write(1, b"\xff\n")
sys.exit(3)
"""
    ended, lines = follow(tmp_path, script)
    assert lines == ["first", "100%", "Grüße", "\ufffd"] and ended == process.Ended(3, tuple(lines), False)
    assert not process.LIVE


def test_only_the_last_lines_are_kept_but_all_are_shown(tmp_path):
    ended, lines = follow(tmp_path, "for i in range(200): print(i)")
    assert len(lines) == 200 and ended.lines == tuple(str(i) for i in range(150, 200))


def test_a_limit_ends_the_process(tmp_path):
    ended, _ = follow(tmp_path, "time.sleep(600)", seconds=0.2)
    assert ended.is_overdue and ended.status != 0


def test_an_earlier_end_is_not_overdue(tmp_path):
    ended, _ = follow(tmp_path, "pass", seconds=600)
    assert ended == process.Ended(0, (), False)
    until(lambda: not any(isinstance(one, threading.Timer) for one in threading.enumerate()), "its limit")


def test_the_whole_group_ends_even_when_its_leader_is_gone(tmp_path, monkeypatch):
    """Like a trainer that ignores every signal, below a dvc that SIGTERM ends at once."""
    monkeypatch.setattr(process, "ESCALATION", tuple((number, 0.3) for number, _ in process.ESCALATION))
    (tmp_path / "stubborn.py").write_text(SCRIPT + STUBBORN)
    leader = "subprocess.Popen([sys.executable, 'stubborn.py']); time.sleep(600)"
    thread = threading.Thread(target=follow, args=(tmp_path, leader))
    thread.start()
    until(lambda: (tmp_path / "child").exists() and (tmp_path / "child").read_text(), "the child")
    child = int((tmp_path / "child").read_text())
    process.stop_all()
    thread.join()
    until(lambda: not is_alive(child), "the child to end")


def test_nothing_starts_once_the_flow_is_ending(tmp_path, monkeypatch):
    sent, send = [], os.killpg
    monkeypatch.setattr(os, "killpg", lambda group, number: (sent.append(number), send(group, number)))
    process.stop_all()
    ended, _ = follow(tmp_path, "time.sleep(600)")
    assert ended.status != 0 and not ended.is_overdue
    assert {number for number in sent if number} == {signal.SIGINT}, "who ends at once needs no second signal"


def test_polite_signals_come_first(tmp_path):
    script = r"""
def note(number, frame):
    Path("notes").open("a").write(signal.Signals(number).name + "\n")
for number in (signal.SIGINT, signal.SIGTERM): signal.signal(number, note)
Path("child").write_text("up")
while True: time.sleep(0.05)
"""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(process, "ESCALATION", tuple((number, 0.5) for number, _ in process.ESCALATION))
        thread = threading.Thread(target=follow, args=(tmp_path, script))
        thread.start()
        until((tmp_path / "child").exists, "the child")
        process.stop_all()
        thread.join()
    assert (tmp_path / "notes").read_text().split() == ["SIGINT", "SIGTERM"]


def test_a_stage_may_be_interrupted_although_the_flow_ignores_ctrl_c(tmp_path):
    """A shell starts background jobs with SIGINT ignored, which children inherit."""
    ended, _ = follow(
        tmp_path,
        "inner = '''import signal; print(signal.getsignal(signal.SIGINT) is signal.SIG_IGN)'''\n"
        "signal.signal(signal.SIGINT, signal.SIG_IGN)\n"
        "from flows import process\n"
        "process.follow([sys.executable, '-c', inner], Path.cwd(), os.environ, lambda line: print(line))",
    )
    assert ended.lines == ("False",)


def test_the_grace_fits_into_ten_seconds():
    assert sum(seconds for _, seconds in process.ESCALATION) + 1 <= 10

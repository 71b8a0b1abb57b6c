"""Who may run what beside whom: real processes on one home. The loser names the other, or waits for it."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml

from tasks.run.layout import Layout
from tasks.run.locks import Busy, held, is_dvc, own_name, scratch_lock, stage_lock

PATIENCE = 60  # seconds until a test gives up on a process; never a measure of speed
HOLDER = """
import sys, time
from pathlib import Path
from tasks.run.layout import Layout
from tasks.run.locks import scratch_lock, stage_lock
layout, wait = Layout(Path(sys.argv[1]), Path(sys.argv[2])), lambda holder: print("waits", holder, flush=True)
with stage_lock(layout, "sft"), scratch_lock(layout, "sft", wait):
    print("held", flush=True)
    sys.stdin.readline()
"""


def start(root: Path, home: Path) -> subprocess.Popen[str]:
    command = [sys.executable, "-c", HOLDER, str(root), str(home)]
    return subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)


@pytest.fixture
def roots(tmp_path) -> tuple[Path, Path]:
    """Two workspaces that compute the same."""
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "dvc.yaml").write_text(yaml.safe_dump({"stages": {"sft": {"cmd": "x"}}}))
    return tmp_path / "one", tmp_path / "two"


def test_one_process_per_stage_and_workspace(roots):
    one, two = roots
    layout, holder = Layout(one, one), start(one, one)
    try:
        assert holder.stdout.readline() == "held\n"
        line = rf"^stage sft is running already, in process {holder.pid} \(python\S* -c .*\)$"
        with pytest.raises(Busy, match=line), stage_lock(layout, "sft"):
            pass
        with stage_lock(layout, "reward"), stage_lock(Layout(two, one), "sft"):
            pass  # another stage and another workspace are other locks, whatever home they have
    finally:
        holder.kill()
        holder.wait()
    with stage_lock(layout, "sft"):  # a killed process holds nothing
        assert (one / "scratch" / "sft.lock").read_text() == own_name()
    with stage_lock(layout, "sft"):
        pass
    assert not list((one / "scratch").glob("*.lock"))


def test_of_two_workspaces_that_compute_the_same_the_second_waits(roots, tmp_path):
    one, two = roots
    first = start(one, tmp_path)
    assert first.stdout.readline() == "held\n"
    second = start(two, tmp_path)
    try:
        assert second.stdout.readline().startswith(f"waits {first.pid} (python")
        first.stdin.close()
        assert first.wait(PATIENCE) == 0
        assert second.stdout.readline() == "held\n"
        second.stdin.close()
        assert second.wait(PATIENCE) == 0
    finally:
        for process in (first, second):
            process.kill()
            process.wait()
    assert not list((tmp_path / "scratch" / "sft").iterdir()), "no lock file is left"


def test_workspaces_that_compute_otherwise_do_not_wait(roots, tmp_path):
    one, two = roots
    (two / "dvc.yaml").write_text(yaml.safe_dump({"stages": {"sft": {"cmd": "x", "deps": ["dvc.yaml"]}}}))
    never = lambda holder: pytest.fail(f"waits for {holder}")  # noqa: E731
    with scratch_lock(Layout(one, tmp_path), "sft", never), scratch_lock(Layout(two, tmp_path), "sft", never):
        pass


def test_the_lock_is_let_go_however_the_block_ends(tmp_path):
    path = tmp_path / "a" / "x.lock"
    for error in (ValueError, KeyboardInterrupt):
        with pytest.raises(error), held(path, pytest.fail):
            assert path.exists()
            raise error
    assert not path.exists()


def test_a_process_is_dvc_by_its_command_line(tmp_path):
    (tmp_path / "dvc").write_text("input()")
    asleep = "import sys; sys.stdin.readline()"
    started = [
        subprocess.Popen([sys.executable, *words], stdin=subprocess.PIPE)
        for words in ([str(tmp_path / "dvc")], ["-c", asleep, "repro-by-api"], ["-c", asleep])
    ]
    try:
        until = time.monotonic() + PATIENCE
        while not is_dvc(started[0].pid) and time.monotonic() < until:
            time.sleep(0.02)  # between fork and exec it is still this process
        assert is_dvc(started[0].pid)
        assert is_dvc(started[1].pid, "notebook.py repro-by-api") and not is_dvc(started[1].pid)
        assert not is_dvc(started[2].pid, "/venv/bin/dvc repro")
    finally:
        for process in started:
            process.kill()
    os.waitid(os.P_PID, started[0].pid, os.WEXITED | os.WNOWAIT)
    assert not is_dvc(started[0].pid), "a zombie runs nothing"
    for process in started:
        process.wait()
    assert not is_dvc(os.getpid(), "/venv/bin/dvc repro sft-of-another-day")

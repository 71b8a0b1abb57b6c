"""DVC's lock file and its complaints: what is mended, who is waited for, and what a user is told."""

from __future__ import annotations

import fcntl
import json
import os
import subprocess
import sys
import threading

import pytest
from dvc.rwlock import SCHEMA
from toy import until

from flows import busy, process, steps
from flows.process import Ended
from tasks.run.layout import Layout

DVC = "import sys; print('up', flush=True); sys.stdin.readline()"  # a program of that name
SAYS_BUSY = (
    "Running stage 'sft':",
    "ERROR: 'artifacts/sft' is busy, it is being blocked by:",
    "  (PID {pid}): /venv/bin/dvc repro",
    "If there are no processes with such PIDs, you can manually remove '/x/.dvc/tmp/rwlock' and try again.",
)


@pytest.fixture
def rwlock(tmp_path):
    """DVC's lock file, in a repository that has none yet."""
    (tmp_path / ".dvc" / "tmp").mkdir(parents=True)
    return tmp_path / ".dvc" / "tmp" / "rwlock"


@pytest.fixture
def dvc(tmp_path):
    """A living process that runs a program called dvc."""
    (tmp_path / "dvc").write_text(DVC)
    command = [sys.executable, str(tmp_path / "dvc"), "repro"]
    started = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert started.stdout.readline() == "up\n"
    yield started
    started.kill()
    started.wait()


def entry(pid: int, command: str = "/venv/bin/dvc repro x") -> dict:
    return {"pid": pid, "cmd": command}


@pytest.mark.parametrize(
    "text",
    ["", "{", '{"write": {"a"', "[]", "3", "null", '{"write": 3}', '{"write": {"a": [1]}}', '{"else": {}}',
     '{"read": {"a": {"pid": 1}}}', '{"read": {"a": [{"pid": "x", "cmd": ""}]}}', "\ufeff{}", "[" * 100_000],
)  # fmt: skip
def test_what_cannot_be_read_is_removed(rwlock, tmp_path, text):
    rwlock.write_text(text, encoding="utf-8")
    assert busy.mend(tmp_path) == ".dvc/tmp/rwlock: unreadable, removed"
    assert not rwlock.exists() and busy.mend(tmp_path) is None


def test_entries_without_a_living_dvc_are_dropped_and_no_others(rwlock, tmp_path, dvc):
    ours = entry(os.getpid())  # lives, but is no dvc: the number was given anew
    lock = {"write": {"a": entry(dvc.pid), "b": ours}, "read": {"c": [ours, entry(dvc.pid)], "d": [ours]}}
    rwlock.write_text(json.dumps(lock))
    assert (
        busy.mend(tmp_path) == f"rwlock: dropped what process {os.getpid()} held, which runs no dvc any more"
    )
    left = {"write": {"a": entry(dvc.pid)}, "read": {"c": [entry(dvc.pid)]}}
    assert json.loads(rwlock.read_text()) == left and SCHEMA(left)
    before = rwlock.stat().st_mtime_ns
    assert busy.mend(tmp_path) is None and rwlock.stat().st_mtime_ns == before


def test_a_pipeline_inside_a_repository_is_found(rwlock, tmp_path):
    rwlock.write_text("")
    (tmp_path / "a" / "b").mkdir(parents=True)
    assert str(rwlock) in busy.mend(tmp_path / "a" / "b")


def test_another_kind_of_lock_and_a_held_guard_are_left_alone(rwlock, tmp_path, monkeypatch):
    monkeypatch.setattr(busy, "TRIES", 2)
    rwlock.write_text("{")
    with rwlock.with_name("rwlock.lock").open("a+") as guard:
        fcntl.flock(guard, fcntl.LOCK_EX)
        assert busy.mend(tmp_path) is None and rwlock.exists()
    (tmp_path / ".dvc" / "config.local").write_text(
        "[core]\n    analytics = false\n    hardlink_lock = true\n"
    )
    assert busy.mend(tmp_path) is None and rwlock.exists()
    (tmp_path / ".dvc" / "config.local").write_text("no ini")
    assert busy.mend(tmp_path)


def test_nothing_is_mended_where_there_is_no_dvc(tmp_path):
    assert busy.mend(tmp_path) is None


@pytest.fixture
def order(tmp_path) -> steps.Order:
    return steps.Order(Layout(tmp_path, tmp_path), "sft", False, 90.0, "parent-run")


def test_a_stage_waits_for_the_dvc_that_works_on_its_files(order, dvc, monkeypatch):
    """The line names its process; DVC's advice to delete a lock that is held is never shown."""
    said, calls = [], []
    lines = tuple(line.format(pid=dvc.pid) for line in SAYS_BUSY)

    def follow(command, folder, environment, show, seconds):
        calls.append(command)
        if len(calls) > 1:
            return Ended(0, ("Stage 'sft' didn't change, skipping",), False)
        for line in lines:
            show(line)
        return Ended(255, lines, False)

    monkeypatch.setattr(process, "follow", follow)
    monkeypatch.setattr(busy, "SECONDS_BETWEEN_LOOKS", 0.02)
    ended = []
    waiting = threading.Thread(target=lambda: ended.append(steps.attempt(order, said.append)))
    waiting.start()
    until(lambda: said and "waits for" in said[-1], "the stage to wait")
    assert (
        said[-1].startswith(f"stackrl: sft: waits for process {dvc.pid} (python") and "dvc repro" in said[-1]
    )
    assert waiting.is_alive() and len(calls) == 1 and not any("manually remove" in line for line in said)
    dvc.communicate("\n")
    waiting.join(60)
    assert steps.judge(order, ended[0]).name == "Unchanged" and len(calls) == 2


@pytest.mark.parametrize("is_ending", [True, False])
def test_it_waits_for_nobody_who_is_gone(order, monkeypatch, is_ending):
    calls, stop = [], threading.Event()
    lines = tuple(line.format(pid=os.getpid()) for line in SAYS_BUSY)  # no dvc
    monkeypatch.setattr(process, "follow", lambda *a: calls.append(a) or Ended(255, lines, False))
    monkeypatch.setattr(process, "STOPPING", stop)
    _ = is_ending and stop.set()
    ended = steps.attempt(order, lambda line: None)
    assert ended.status == 255 and len(calls) == (1 if is_ending else 2)


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("ERROR: /tmp/x is not a git repository", "git init"),
        ("'./dvc.lock' validation failed.", "git checkout dvc.lock"),
    ],
)
def test_what_will_fail_again_is_said_in_our_words_and_not_retried(order, line, words):
    state = steps.judge(order, Ended(255, (line, "required key not provided"), False))
    assert words in state.message and not steps.may_retry(None, None, state)


def test_dvcs_own_reason_is_shown(order):
    reason = "ERROR: failed to reproduce 'sft': Unable to read RWLock-file. JSON structure is corrupted"
    lines = (reason, "Having any troubles? Hit us up at https://dvc.org/support, happy to help!")
    assert "RWLock-file" in steps.judge(order, Ended(255, lines, False)).message

"""One stage as a task: the command, its environment, and the state it ends in."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

import pytest

from flows import process, report, steps
from flows.process import Ended
from tasks.run.layout import Layout


@pytest.fixture
def order(tmp_path) -> steps.Order:
    return steps.Order(Layout(tmp_path, tmp_path), "ppo", False, 90.0, "parent-run")


@pytest.mark.parametrize(
    ("lines", "name"),
    [
        (("Stage 'ppo' didn't change, skipping", "Data and pipelines are up to date."), "Unchanged"),
        (("Stage 'ppo' is cached - skipping run, checking out outputs",), "Restored"),
        (("Running stage 'ppo':", "> python -m tasks ppo"), "Ran"),
        (("Running stage 'ppo':", "stackrl: ppo: models 3; all registered before, up to date"), "Unchanged"),
        (("Running stage 'ppo':", "stackrl: ppo: models 3", "Data and pipelines are up to date"), "Ran"),
    ],
)
def test_a_good_end_says_what_dvc_did(order, lines, name):
    state = steps.judge(order, Ended(0, lines, False))
    assert state.is_completed() and state.name == name


def test_a_failure_quotes_the_stage(order):
    lines = ("stackrl: ppo: the disk is full", "ERROR: failed to reproduce 'ppo': exited with 1")
    assert steps.judge(order, Ended(255, lines, False)).message == "the disk is full"
    crash = ("Traceback", "RuntimeError: nan", "ERROR: failed to reproduce 'ppo': exited with 1")
    assert steps.judge(order, Ended(255, crash, False)).message == "RuntimeError: nan"
    busy = ("ERROR: 'artifacts/ppo' is busy, it is being blocked by:",)
    assert steps.judge(order, Ended(255, busy, False)).message == busy[0].removeprefix("ERROR: ")
    assert steps.judge(order, Ended(-9, (), False)).message == "dvc ended with status -9"


def test_a_refusal_is_read_and_never_retried(order):
    path = order.layout.refusal("ppo")
    path.parent.mkdir(parents=True)
    path.write_text(json.dumps({"stage": "ppo", "reason": "accuracy 0.61 < 0.8"}))
    state = steps.judge(order, Ended(255, ("stackrl: ppo: no",), False))
    assert state.is_failed() and state.name == "Refused" and state.message == "accuracy 0.61 < 0.8"
    assert not steps.may_retry(None, None, state)


def test_an_ordinary_failure_is_retried_unless_the_flow_is_ending(order, monkeypatch):
    failed = steps.judge(order, Ended(255, (), False))
    assert steps.may_retry(None, None, failed)
    monkeypatch.setattr(process, "STOPPING", type(process.STOPPING)())
    process.STOPPING.set()
    assert not steps.may_retry(None, None, failed)
    assert steps.judge(order, Ended(-15, (), False)).is_cancelled()


def test_a_limit_is_named(order):
    state = steps.judge(order, Ended(-15, (), True))
    assert state.is_failed() and "1.5 minutes" in state.message


def test_the_command_waits_for_the_lock_and_runs_one_stage(order):
    assert steps.command(order)[1:] == ["-m", "dvc", "--wait-for-lock", "repro", "--single-item", "ppo"]
    forced = steps.Order(order.layout, "ppo", True, None, "")
    assert steps.command(forced)[-1] == "--force"


def test_the_stage_sees_this_python_first_and_the_parent_run(order, monkeypatch):
    monkeypatch.setenv("PATH", "/nowhere")
    seen = steps.environment(order)
    assert seen["PATH"] == os.pathsep.join([str(Path(sys.executable).parent), "/nowhere"])
    assert "parent-run" in seen.values() and seen["PYTHONUNBUFFERED"] == "1"


def test_metrics_become_a_table(tmp_path):
    path = tmp_path / "metrics.json"
    assert report.metrics_table(path) == "No metrics."
    path.write_text('{"accuracy": 0.8123456789, "pairs": 1290}')
    assert report.metrics_table(path).splitlines()[2:] == ["| accuracy | 0.812346 |", "| pairs | 1290 |"]

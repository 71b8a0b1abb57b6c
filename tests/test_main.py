"""`python -m tasks <stage>` around a fake stage: one line for the user, nothing lost, everything recorded."""

from __future__ import annotations

import errno
import json
import os
import subprocess
import sys
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace

import pytest
import yaml

from params.schema import Params
from tasks import __main__ as main
from tasks.run.files import staged
from tasks.run.layout import Layout, Refusal, StageResult
from tasks.run.lifetime import Stopped
from tasks.run.locks import stage_lock

REPOSITORY = Path(__file__).parents[1]


class Tracker:
    """Stands in for tasks.run.tracking: what was logged, and how the run ended."""

    def __init__(self) -> None:
        self.params, self.metrics, self.end = {}, {}, ""

    @contextmanager
    def stage_run(self, stage, params, layout):
        self.params = dict(params)
        try:
            yield
        except BaseException as error:
            self.end = type(error).__name__
            raise
        self.end = "FINISHED"

    def log_metrics(self, values, step=None):
        self.metrics |= values


@pytest.fixture
def tracker(monkeypatch) -> Tracker:
    tracker = Tracker()
    monkeypatch.setattr(main, "tracking", tracker)
    return tracker


@pytest.fixture
def root(tmp_path, monkeypatch, tracker) -> Path:
    """A pipeline of one stage, `sft`, with the default parameters."""
    stage = {"cmd": "python -m tasks sft", "params": ["seed", "sft", "ppo.temperature"]}
    (tmp_path / "dvc.yaml").write_text(yaml.safe_dump({"stages": {"sft": stage}}))
    (tmp_path / "params.yaml").write_text(yaml.safe_dump(Params().model_dump(mode="json")))
    monkeypatch.chdir(tmp_path)
    for name in ("DVC_ROOT", "DVC_STAGE", "STACKRL_TRACEBACK"):
        monkeypatch.delenv(name, raising=False)
    for name in main.NO_TELEMETRY:
        monkeypatch.setenv(name, "true")
    monkeypatch.setattr(main, "tie_to_parent", lambda: None)
    return tmp_path


@pytest.fixture
def stage(monkeypatch):
    """Set what tasks.sft.run does."""

    def become(run) -> None:
        monkeypatch.setitem(sys.modules, "tasks.sft", SimpleNamespace(run=run))

    return become


def fails(error: BaseException):
    def run(params, layout):
        with staged(layout.artifact("sft", "model")) as path:
            path.mkdir()
            (path / "weights").write_text("half")
            raise error

    return run


def test_a_stage_runs_and_everything_is_recorded(root, stage, tracker, capsys):
    def run(params, layout):
        assert params == Params() and layout == Layout(root, root)
        with pytest.raises(ValueError, match="running already"), stage_lock(layout, "sft"):
            pass
        (layout.scratch("sft") / "checkpoint").write_text("x")
        return StageResult({"sft/loss": 0.1 + 0.2, "rows": 7.0})

    stage(run)
    assert main.main(["sft"]) == 0
    assert capsys.readouterr().out == "stackrl: sft: sft/loss 0.3, rows 7\n"
    text = (root / "artifacts" / "sft" / "metrics.json").read_text()
    assert text == '{\n  "rows": 7.0,\n  "sft/loss": 0.30000000000000004\n}\n'
    assert tracker.metrics == {"sft/loss": 0.1 + 0.2, "rows": 7.0} and tracker.end == "FINISHED"
    assert tracker.params["sft.learning_rate"] == Params().sft.learning_rate
    assert {"seed", "ppo.temperature", "machine.threads"} <= set(tracker.params)
    assert not any(name.startswith(("ppo.updates", "reward")) for name in tracker.params)
    assert not list((root / "scratch" / "sft").iterdir()), "done: nothing is left to resume"


@pytest.mark.parametrize(
    ("error", "line"),
    [
        (ValueError("row 3 of rows.parquet:\n  no tokens"), "row 3 of rows.parquet: no tokens"),
        (FileNotFoundError(errno.ENOENT, "No such file", "data/base"), "data/base: No such file"),
        (OSError(errno.ENOSPC, "No space left on device"), "the disk is full: [Errno 28] No space"),
        (RuntimeError("I/O error: No space left on device (os error 28)"), "the disk is full: I/O error"),
    ],
)
def test_a_users_error_is_one_line_and_the_earlier_result_stays(root, stage, tracker, capsys, error, line):
    (root / "artifacts" / "sft" / "model").mkdir(parents=True)
    (root / "artifacts" / "sft" / "model" / "weights").write_text("earlier")
    stage(fails(error))
    assert main.main(["sft"]) == 1
    seen = capsys.readouterr()
    assert seen.out == "" and seen.err.startswith(f"stackrl: sft: {line}") and seen.err.count("\n") == 1
    assert "dvc checkout" not in seen.err, "run directly, nothing was removed"
    assert [path.name for path in (root / "artifacts" / "sft").iterdir()] == ["model"]
    assert (root / "artifacts" / "sft" / "model" / "weights").read_text() == "earlier"
    assert tracker.end == type(error).__name__


def test_a_stage_whose_work_stands_opens_no_run(root, monkeypatch, tracker, capsys):
    found = [StageResult({"models": 3.0}, "up to date"), None]
    module = SimpleNamespace(
        standing=lambda params, layout: found.pop(0), run=lambda params, layout: StageResult({"models": 3.0})
    )
    monkeypatch.setitem(sys.modules, "tasks.sft", module)
    assert main.main(["sft"]) == 0
    written = (root / "artifacts/sft/metrics.json").read_text()
    assert capsys.readouterr().out == "stackrl: sft: models 3; up to date\n" and tracker.end == ""
    assert main.main(["sft"]) == 0
    assert capsys.readouterr().out == "stackrl: sft: models 3\n" and tracker.end == "FINISHED"
    assert (root / "artifacts/sft/metrics.json").read_text() == written


LOCKED = "stages: {sft: {cmd: x, outs: [{path: artifacts/sft/model.txt, md5: a}]}}"


def test_under_dvc_the_way_back_is_named(root, stage, capsys, monkeypatch):
    """Where there is an earlier result, and DVC has removed it."""
    monkeypatch.setenv("DVC_STAGE", "sft")
    stage(fails(ValueError("bad")))
    assert main.main(["sft"]) == 1
    assert capsys.readouterr().err == "stackrl: sft: bad\n", "the first run has no earlier result"
    (root / "dvc.lock").write_text(LOCKED)
    assert main.main(["sft"]) == 1
    assert capsys.readouterr().err.endswith("bad (`dvc checkout sft` brings the earlier result back)\n")
    (root / "artifacts/sft").mkdir(parents=True, exist_ok=True)
    (root / "artifacts/sft/model.txt").write_text("persists")
    assert main.main(["sft"]) == 1
    assert capsys.readouterr().err == "stackrl: sft: bad\n", "it persists"


def test_no_way_back_is_named_where_there_is_none(root, stage, capsys, monkeypatch, tmp_path_factory):
    """Another process does it, DVC will remove the workspace, or dvc.lock itself is the matter."""
    monkeypatch.setenv("DVC_STAGE", "sft")
    (root / "dvc.lock").write_text(LOCKED)
    stage(fails(ValueError("bad")))
    with stage_lock(Layout(root, root), "sft"):
        assert main.main(["sft"]) == 1
    line = capsys.readouterr().err
    assert f"running already, in process {os.getpid()} (" in line and line.count("\n") == 1
    assert "checkout" not in line
    (root / "dvc.lock").write_text("")
    assert main.main(["sft"]) == 1
    assert "dvc.lock is damaged" in capsys.readouterr().err
    (root / "dvc.lock").write_text(LOCKED)
    monkeypatch.setenv("DVC_ROOT", str(tmp_path_factory.mktemp("home")))
    assert main.main(["sft"]) == 1
    assert capsys.readouterr().err == "stackrl: sft: bad\n"


def test_another_programs_launch_is_left_out_and_said(root, stage, capsys, monkeypatch):
    """As SLURM's scripts or an earlier `accelerate launch` leave it: it is no launch of this stage."""
    found = {"RANK": "1", "WORLD_SIZE": "4", "LOCAL_RANK": "1", "ACCELERATE_MIXED_PRECISION": "fp16"}
    for name, value in found.items():
        monkeypatch.setenv(name, value)
    monkeypatch.delenv("TORCHELASTIC_RUN_ID", raising=False)

    def run(params, layout):
        assert not found.keys() & os.environ.keys()
        return StageResult({})

    stage(run)
    assert main.main(["sft"]) == 0
    line = "ACCELERATE_MIXED_PRECISION, LOCAL_RANK, RANK, WORLD_SIZE: set, but nothing was launched"
    assert capsys.readouterr().err.startswith(f"stackrl: sft: {line}")
    assert json.loads((root / "artifacts/sft/metrics.json").read_text()) == {}


def test_a_bug_shows_its_traceback(root, stage, monkeypatch):
    stage(fails(RuntimeError("shape mismatch")))
    with pytest.raises(RuntimeError, match="shape mismatch"):
        main.main(["sft"])
    stage(fails(ValueError("bad")))
    monkeypatch.setenv("STACKRL_TRACEBACK", "1")
    with pytest.raises(ValueError, match="bad"):
        main.main(["sft"])


def test_a_refusal_leaves_its_reason_until_the_next_attempt(root, stage, tracker):
    path = Layout(root, root).refusal("sft")
    stage(fails(Refusal("accuracy 0.61 is below 0.8")))
    assert main.main(["sft"]) == 1
    assert json.loads(path.read_text()) == {"stage": "sft", "reason": "accuracy 0.61 is below 0.8"}
    stage(fails(ValueError("something else")))
    assert main.main(["sft"]) == 1 and not path.exists()


@pytest.mark.parametrize(("number", "status"), [(2, 130), (15, 143)])
def test_a_stop_keeps_what_is_needed_to_resume(root, stage, tracker, capsys, number, status):
    def run(params, layout):
        (layout.scratch("sft") / "checkpoint").write_text("x")
        os.kill(os.getpid(), number)

    stage(run)
    assert main.main(["sft"]) == status
    assert "go on" in capsys.readouterr().err and tracker.end == Stopped.__name__
    assert (Layout(root, root).scratch("sft") / "checkpoint").exists()
    assert not (root / "artifacts").exists()


def test_metrics_that_are_no_numbers_are_an_error(root, stage, capsys):
    stage(lambda params, layout: StageResult({"loss": float("nan")}))
    assert main.main(["sft"]) == 1
    assert "metrics.json" in capsys.readouterr().err


def test_a_typo_in_params_names_the_key_before_anything_runs(root, stage, tracker, capsys):
    stage(lambda params, layout: pytest.fail("it ran"))
    (root / "params.yaml").write_text("sft: {learning_rat: 1}")
    assert main.main(["sft"]) == 1
    assert "sft.learning_rat" in capsys.readouterr().err and tracker.end == ""


def test_the_words_are_checked(capsys):
    with pytest.raises(SystemExit) as ended:
        main.main(["sfd"])
    assert ended.value.code == 2 and "policy_eval" in capsys.readouterr().err


def test_the_command_line_is_the_same_road(tmp_path):
    done = subprocess.run(
        [sys.executable, "-m", "tasks", "data"], cwd=tmp_path, capture_output=True, text=True
    )
    assert done.returncode == 1 and done.stderr.startswith("stackrl: data: ")
    assert "params.yaml" in done.stderr and done.stderr.count("\n") == 1

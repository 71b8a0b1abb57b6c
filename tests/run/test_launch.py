"""`python -m tasks <stage>` in two real processes around a toy: one line, one status, nothing left alive."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml

from params.schema import LAUNCH_FILES, Params
from tasks.run import launch
from tasks.run.layout import Layout, Refusal
from tasks.run.lifetime import Stopped

REPOSITORY = Path(__file__).parents[2]
PATIENCE = 60  # seconds until a test gives up; never a measure of speed
STAGE = '''
"""A stage that does what its parameter sft.loss_on says nothing of: what a file beside params.yaml says."""
import os, signal, sys, time
from pathlib import Path
from tasks.run import ranks
from tasks.run.files import staged
from tasks.run.layout import Refusal, StageResult

def run(params, layout):
    does, rank = (layout.root / "does").read_text(), ranks.rank()
    (layout.root / f"pid-{rank}").write_text(str(os.getpid()))
    print(f"rank {rank} speaks", flush=True)
    print(f"rank {rank} warns", file=sys.stderr, flush=True)
    with staged(layout.artifact("sft", "model")) as path:
        path.write_text(f"of rank {rank} of {ranks.processes()}")
    if does == "refuse" and rank:
        raise Refusal("the gate is shut")
    if does == "error":
        raise ValueError("row 3: no tokens")
    if does == "crash" and rank:
        raise RuntimeError("a bug")
    if does == "die" and rank:
        os.kill(os.getpid(), signal.SIGKILL)
    if does == "sleep" or does in ("crash", "refuse", "die"):
        (layout.root / f"up-{rank}").touch()
        time.sleep(600)
    if does == "hang":
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM, signal.SIGINT})  # as in a collective
        (layout.root / f"up-{rank}").touch()
        time.sleep(600)
    return StageResult({"rank": float(rank)})
'''


@pytest.fixture
def root(tmp_path) -> Path:
    """A working directory whose `tasks` is ours, but for a toy in the place of sft."""
    (tmp_path / "tasks").mkdir()
    (tmp_path / "tasks/__init__.py").write_text(f"__path__.append({str(REPOSITORY / 'tasks')!r})\n")
    (tmp_path / "tasks/sft.py").write_text(STAGE)
    stages = {name: {"cmd": "none", "params": ["seed"]} for name in ("sft", "data")}
    (tmp_path / "dvc.yaml").write_text(yaml.safe_dump({"stages": stages}))
    given = Params.model_validate({"machine": {"launch": "ddp_cpu"}})
    (tmp_path / "params.yaml").write_text(yaml.safe_dump(given.model_dump(mode="json")))
    return tmp_path


def start(root: Path, does: str) -> subprocess.Popen[str]:
    (root / "does").write_text(does)
    ours = ("STACKRL_", "DVC_", "MLFLOW_")
    clean = {key: value for key, value in os.environ.items() if not key.startswith(ours)}
    return subprocess.Popen(
        [sys.executable, "-m", "tasks", "sft"], cwd=root, text=True, stdout=subprocess.PIPE,
        stderr=subprocess.PIPE, env={**clean, "PYTHONPATH": f"{root}:{REPOSITORY}"},
    )  # fmt: skip


def ends(process: subprocess.Popen[str]) -> tuple[int, str, str]:
    out, err = process.communicate(timeout=PATIENCE)
    return process.returncode, out, err


def until(condition, what: str) -> None:
    deadline = time.monotonic() + PATIENCE
    while not condition():
        assert time.monotonic() < deadline, f"waited in vain: {what}"
        time.sleep(0.05)


def is_alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def pids(root: Path) -> list[int]:
    return [int(path.read_text()) for path in root.glob("pid-*")]


def are_up(root: Path) -> bool:
    return all((root / f"up-{rank}").exists() for rank in (0, 1))


@pytest.mark.slow
def test_both_run_and_the_first_writes(root):
    status, out, err = ends(start(root, "return"))
    assert status == 0 and out == "stackrl: sft: rank 0\n", err
    assert "rank 0 speaks" in err and "rank 0 warns" in err and "rank 1" not in err
    assert (root / "artifacts/sft/model").read_text() == "of rank 0 of 2"
    assert json.loads((root / "artifacts/sft/metrics.json").read_text()) == {"rank": 0.0}
    assert not list((root / "scratch/sft").iterdir()) and not (root / "scratch/sft.launch").exists()
    assert not any(map(is_alive, pids(root)))
    import mlflow

    client = mlflow.MlflowClient(f"sqlite:///{root}/mlflow.db")
    runs = client.search_runs([client.get_experiment_by_name("stackrl").experiment_id])
    assert [run.info.status for run in runs] == ["FINISHED"] and runs[0].data.metrics == {"rank": 0.0}


@pytest.mark.slow
def test_an_error_of_all_ranks_is_one_line(root):
    status, out, err = ends(start(root, "error"))
    assert status == 1 and out == ""
    lines = [line for line in err.splitlines() if not line.startswith("rank 0")]
    assert lines == ["stackrl: sft: row 3: no tokens"]


@pytest.mark.slow
def test_a_refusal_of_any_rank_is_the_stages(root):
    status, _, err = ends(start(root, "refuse"))
    assert status == 1 and err.endswith("stackrl: sft: the gate is shut\n")
    found = json.loads((root / "scratch/sft/refusal.json").read_text())
    assert found == {"stage": "sft", "reason": "the gate is shut"}
    assert not any(map(is_alive, pids(root)))


@pytest.mark.slow
def test_a_bug_shows_the_traceback_of_the_rank_that_had_it(root):
    status, _, err = ends(start(root, "crash"))
    assert status == 1 and err.count("Traceback") == 1 and 'raise RuntimeError("a bug")' in err
    assert "stackrl: sft: rank 1: RuntimeError: a bug; the other ranks: " in err
    log = (root / "scratch/sft.launch/launcher.log").read_text()
    assert "rank 1 speaks" in log and "rank 1 warns" in log


@pytest.mark.slow
def test_a_rank_that_is_killed_is_no_stop(root):
    status, _, err = ends(start(root, "die"))
    assert status == 1 and "a rank without a word" in err and "SIGKILL" in err
    assert not any(map(is_alive, pids(root)))


@pytest.mark.slow
@pytest.mark.parametrize(("number", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_signals_reach_the_ranks_and_the_status_stays(root, number, status):
    process = start(root, "sleep")
    until(lambda: are_up(root), "the ranks")
    process.send_signal(number)
    found, _, err = ends(process)
    assert found == status and err.count("stackrl:") == 1 and f"stopped by {number.name}" in err
    assert not any(map(is_alive, pids(root))) and not (root / "scratch/sft.launch").exists()


@pytest.mark.slow
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="PDEATHSIG is Linux's")
@pytest.mark.parametrize("does", ["sleep", "hang"])
def test_no_rank_outlives_a_killed_parent_and_the_lock_lasts_as_long(root, does):
    """Even one that hears no signal."""
    process = start(root, does)
    until(lambda: are_up(root), "the ranks")
    process.kill()
    process.wait()
    if does == "hang":
        status, _, err = ends(start(root, does))
        assert status == 1 and "sft is running already" in err
    until(lambda: not any(map(is_alive, pids(root))), "the ranks to end")


@pytest.mark.slow
def test_a_stage_that_does_not_train_runs_alone(root):
    (root / "tasks/data.py").write_text(STAGE.replace('"sft"', '"data"'))
    (root / "does").write_text("return")
    command = [sys.executable, "-m", "tasks", "data"]
    subprocess.run(command, cwd=root, env={**os.environ, "PYTHONPATH": f"{root}:{REPOSITORY}"}, check=True)
    assert (root / "artifacts/data/model").read_text() == "of rank 0 of 1"


# ---- what ranks leave, without processes


@pytest.fixture
def folder(tmp_path, monkeypatch) -> Path:
    monkeypatch.setenv(launch.FOLDER_VARIABLE, str(tmp_path))
    return tmp_path


def leaves(monkeypatch, rank: int, error: BaseException, line: str | None = None) -> None:
    monkeypatch.setenv("RANK", str(rank))
    try:
        raise error
    except BaseException as raised:
        assert launch.leave_word(raised, line)


def test_the_first_error_for_the_user_is_the_cause(folder, monkeypatch):
    assert launch._cause(folder, 2) is None
    leaves(monkeypatch, 3, Stopped(15))
    assert launch._cause(folder, 1).text == "15" and launch._cause(folder, 2) is None
    leaves(monkeypatch, 2, RuntimeError("closed by peer"))
    cause = launch._cause(folder, 2)
    assert cause.kind == "traceback" and "RuntimeError: closed by peer" in cause.text
    leaves(monkeypatch, 1, ValueError("x"), "no row")
    leaves(monkeypatch, 0, ValueError("x"), "another row")
    assert launch._cause(folder, 2) == launch.LastWord(1, "line", "no row", launch._cause(folder, 2).at)
    leaves(monkeypatch, 4, Refusal("shut"), "shut")
    for kind, text in ((Refusal, "shut"), (ValueError, "shut")):
        with pytest.raises(kind, match=text):
            launch._raise(1, folder, 5)


def test_a_stop_by_somebody_else_is_one(folder, monkeypatch):
    for rank in (0, 1):
        leaves(monkeypatch, rank, Stopped(15))
    with pytest.raises(Stopped) as stopped:
        launch._raise(1, folder, 2)
    assert stopped.value.status == 143


def test_without_a_launcher_there_is_nobody_to_tell(monkeypatch):
    monkeypatch.delenv(launch.FOLDER_VARIABLE, raising=False)
    for name in ("RANK", "TORCHELASTIC_RUN_ID", "DVC_STAGE"):
        monkeypatch.delenv(name, raising=False)
    assert not launch.leave_word(ValueError("x"), "x") and not launch.is_rank()
    monkeypatch.setenv("RANK", "0")
    assert not launch.is_rank(), "schedulers set it for every job"
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "none")
    assert launch.is_rank(), "torchrun"
    monkeypatch.setenv("DVC_STAGE", "sft")
    assert not launch.is_rank(), "a torchrun above dvc launched no ranks of this stage"


@pytest.mark.parametrize("name", ["fsdp", "zero3"])
def test_ppo_refuses_sharded_weights_before_anything_starts(tmp_path, name):
    file = LAUNCH_FILES / f"{name}.yaml"
    with pytest.raises(ValueError, match=rf"machine\.launch is {name}, .* set machine\.launch to ddp"):
        launch.launch("ppo", file, 0, Layout(tmp_path, tmp_path))
    assert not list(tmp_path.iterdir())
    for stage in ("sft", "reward"):
        launch.check_serves(stage, file)
    for other in ("ddp", "ddp_cpu", "one_gpu"):
        launch.check_serves("ppo", LAUNCH_FILES / f"{other}.yaml")

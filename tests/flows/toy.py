"""A pipeline with the real words and edges whose stages take no time, and a client for a real server."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

REPOSITORY = Path(__file__).parents[2]
PATIENCE = 120  # seconds until a test gives up on another process; never a measure of speed
QUIET = {
    "DO_NOT_TRACK": "true",
    "DVC_NO_ANALYTICS": "1",
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
    "PREFECT_SERVER_SERVICES_SCHEDULER_LOOP_SECONDS": "1",
    "PREFECT_SERVER_SERVICES_SCHEDULER_RECENT_DEPLOYMENTS_LOOP_SECONDS": "1",
}
# What `python -m tasks <stage>` does, without its imports; `behave/<stage>` is no dependency.
STAGE = """
import json, os, sys, time
from pathlib import Path
from tasks.run.lifetime import Stopped, stop_on_signals, tie_to_parent
stage, behave = sys.argv[1], Path("behave", sys.argv[1])
with open(f"attempts-{stage}", "a") as file: file.write(f"{os.getpid()}\\n")
words = behave.read_text().split(maxsplit=1) if behave.exists() else [""]
if words[0] == "fail" or (words[0] == "fail-once" and len(open(f"attempts-{stage}").readlines()) == 1):
    sys.exit(f"stackrl: {stage}: {words[1]}")
if words[0] == "refuse":
    folder = Path(os.environ["DVC_ROOT"], "scratch", stage)
    folder.mkdir(parents=True)
    (folder / "refusal.json").write_text(json.dumps({"stage": stage, "reason": words[1]}))
    sys.exit(1)
try:
    with stop_on_signals():
        tie_to_parent()
        while words[0] == "wait" and not Path(f"go-{stage}").exists():
            time.sleep(0.1)
        if words[0] == "record":
            from tasks.run import layout, tracking
            with tracking.stage_run(stage, {}, layout.Layout.here()):
                tracking.log_metrics({"accuracy": 0.75})
        if words[0] == "train":
            Path(f"training-{stage}").write_text(str(os.getpid()))
            time.sleep(600)
except Stopped as stopped:
    Path(f"stopped-{stage}").write_text(str(stopped))
    sys.exit(stopped.status)
out = Path("artifacts", stage)
out.mkdir(parents=True, exist_ok=True)
(out / "out.txt").write_text(open("params.yaml").read())
(out / "metrics.json").write_text(json.dumps({"accuracy": 0.75}))
print(f"stackrl: {stage}: accuracy 0.75")
"""


@dataclass(frozen=True)
class Toy:
    """A pipeline with the real one's words and edges, whose stages take no time unless told to."""

    root: Path
    environment: dict[str, str]

    def run(self, *command: str, **more: str) -> subprocess.CompletedProcess[str]:
        environment = {**self.environment, **more}
        return subprocess.run(
            [sys.executable, "-m", *command], cwd=self.root, env=environment, capture_output=True, text=True
        )

    def start(self, *command: str) -> subprocess.Popen[bytes]:
        """In the background, as the leader of a group, its output in toy.log."""
        log = (self.root / "toy.log").open("ab")
        return subprocess.Popen(
            [sys.executable, "-m", *command],
            cwd=self.root,
            env=self.environment,
            stdout=log,
            stderr=log,
            start_new_session=True,
        )

    def behave(self, stage: str, words: str) -> None:
        (self.root / "behave" / stage).write_text(words)

    def change(self, stage: str, value: int) -> None:
        values = yaml.safe_load((self.root / "params.yaml").read_text())
        (self.root / "params.yaml").write_text(yaml.safe_dump({**values, stage: {"value": value}}))

    def attempts(self, stage: str) -> int:
        path = self.root / f"attempts-{stage}"
        return len(path.read_text().splitlines()) if path.exists() else 0

    def trainer(self, stage: str, starter: subprocess.Popen[bytes] | None = None) -> int:
        """Wait until the stage trains, as long as `starter` lives; its process."""
        path, log = self.root / f"training-{stage}", self.root / "toy.log"
        is_training = lambda: path.exists() and path.read_text()  # noqa: E731
        until(lambda: is_training() or (starter and starter.poll() is not None), f"{stage} to train", log)
        assert is_training(), log.read_text()[-3000:]
        return int(path.read_text())


@dataclass(frozen=True)
class Server:
    """A Prefect server on the loopback interface."""

    api: str
    environment: dict[str, str]

    def ask(self, path: str, body: Any = None) -> Any:
        data = None if body is None else json.dumps(body).encode()
        headers = {"Content-Type": "application/json"}
        request = urllib.request.Request(f"{self.api}{path}", data, headers)
        for _ in range(60):
            try:
                with urllib.request.urlopen(request, timeout=60) as answer:
                    return json.loads(answer.read() or "null")
            except urllib.error.HTTPError as error:
                if error.code != 503:  # its database is busy
                    raise
                time.sleep(1)
        raise TimeoutError(f"{path} stays unavailable")

    def flow_runs(self, **more: Any) -> list[dict[str, Any]]:
        return self.ask("/flow_runs/filter", {"sort": "START_TIME_DESC", **more})

    def stages(self, flow_run: str) -> dict[str, str]:
        """Stage -> name of its task's state."""
        runs = self.ask("/task_runs/filter", {"flow_runs": {"id": {"any_": [flow_run]}}})
        return {run["name"].rpartition("-")[0] or run["name"]: run["state_name"] for run in runs}

    def expect(self, flow_run: str, **stages: str) -> None:
        """Wait until just these stages have these states: the server hears of a task's state by an event."""
        deadline = time.monotonic() + PATIENCE
        while self.stages(flow_run) != stages and time.monotonic() < deadline:
            time.sleep(0.2)
        assert self.stages(flow_run) == stages


def until(condition: Callable[[], Any], what: str, log: Path | None = None) -> None:
    deadline = time.monotonic() + PATIENCE
    while not condition():
        said = log.read_text(errors="replace")[-3000:] if log and log.exists() else ""
        assert time.monotonic() < deadline, f"waited in vain for {what}\n{said}"
        time.sleep(0.05)


def is_alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def end_group(process: subprocess.Popen[bytes]) -> None:
    """SIGTERM twice, because an idle Prefect worker swallows the first one, then SIGKILL."""
    for number, seconds in ((signal.SIGTERM, 3), (signal.SIGTERM, 5), (signal.SIGKILL, 5)):
        try:
            os.killpg(process.pid, number)
            process.wait(seconds)
        except (ProcessLookupError, subprocess.TimeoutExpired):
            continue


def is_healthy(api: str) -> bool:
    try:
        with urllib.request.urlopen(f"{api}/health", timeout=2) as answer:
            return answer.status == 200
    except (urllib.error.URLError, OSError):
        return False

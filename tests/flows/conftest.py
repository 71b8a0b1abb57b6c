"""The toy pipeline in a fresh repository, and one real Prefect server for all tests."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from collections.abc import Iterator

import pytest
import yaml
from toy import QUIET, REPOSITORY, STAGE, Server, Toy, end_group, is_healthy, until

from flows.graph import upstream
from tasks.run.layout import STAGES


@pytest.fixture
def toy(tmp_path) -> Toy:
    """The toy in a fresh repository, without a server: PREFECT_API_URL is not set."""
    root = tmp_path / "toy"
    (root / "behave").mkdir(parents=True)
    edges = upstream(yaml.safe_load((REPOSITORY / "dvc.yaml").read_text())["stages"])
    stages = {
        stage: {
            "cmd": f"python stage.py {stage}",
            "deps": ["stage.py", *(f"artifacts/{before}/out.txt" for before in sorted(edges[stage]))],
            "params": [stage],
            "outs": [f"artifacts/{stage}/out.txt"],
            "metrics": [{f"artifacts/{stage}/metrics.json": {"cache": False}}],
            "meta": {"retries": 1, "retry_delay_seconds": 0, "timeout_minutes": 10},
        }
        for stage in STAGES
    }
    (root / "dvc.yaml").write_text(yaml.safe_dump({"stages": stages}, sort_keys=False))
    (root / "params.yaml").write_text(yaml.safe_dump({stage: {"value": 1} for stage in STAGES}))
    (root / "stage.py").write_text(STAGE)
    ours = ("PREFECT_", "MLFLOW_", "DVC_")
    environment = {key: value for key, value in os.environ.items() if not key.startswith(ours)}
    toy = Toy(root, {**environment, **QUIET, "PREFECT_HOME": str(tmp_path / "prefect")})
    subprocess.run(["git", "init", "-q"], cwd=root, check=True)
    assert toy.run("dvc", "init", "-q").returncode == 0
    return toy


@pytest.fixture(scope="session")
def server(tmp_path_factory) -> Iterator[Server]:
    home = tmp_path_factory.mktemp("prefect")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    api = f"http://127.0.0.1:{port}/api"
    environment = {**os.environ, **QUIET, "PREFECT_HOME": str(home), "PREFECT_API_URL": api}
    command = [sys.executable, "-m", "prefect", "server", "start", "--host", "127.0.0.1", "--port", str(port)]
    with (home / "server.log").open("wb") as log:
        process = subprocess.Popen(command, env=environment, stdout=log, stderr=log, start_new_session=True)
    try:
        until(lambda: is_healthy(api), "the Prefect server", home / "server.log")
        yield Server(api, environment)
    finally:
        end_group(process)


@pytest.fixture
def served(toy, server) -> Toy:
    """The toy, talking to the server."""
    there = {key: server.environment[key] for key in ("PREFECT_API_URL", "PREFECT_HOME")}
    return Toy(toy.root, {**toy.environment, **there})

"""A server that is not there or cannot start is one line; a slow machine gets the time it needs."""

from __future__ import annotations

import os
import socket

import pytest
from toy import QUIET, Toy

from flows import rlhf, server


def last(done) -> str:
    assert done.returncode == 1 and "Traceback" not in done.stdout + done.stderr, done.stderr
    return done.stderr.splitlines()[-1]


@pytest.fixture
def bare(tmp_path) -> Toy:
    """A folder in which nothing would run: the server comes first."""
    ours = ("PREFECT_", "MLFLOW_", "DVC_", "STACKRL_")
    clean = {key: value for key, value in os.environ.items() if not key.startswith(ours)}
    (tmp_path / "root").mkdir()
    return Toy(tmp_path / "root", {**clean, **QUIET, "PREFECT_HOME": str(tmp_path / "prefect")})


@pytest.mark.parametrize("address", ["http://127.0.0.1:{port}/api", "http://bob:s3cret@127.0.0.1:{port}/api"])
def test_a_server_that_does_not_answer_is_one_line(bare, address):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        url = address.format(port=free.getsockname()[1])  # nobody listens there
        line = last(bare.run("flows.rlhf", PREFECT_API_URL=url))
    assert line.startswith("stackrl: rlhf: Prefect at http://127.0.0.1:") and "does not answer" in line
    assert "s3cret" not in line


def test_a_home_that_cannot_be_written_to_is_one_line(bare):
    line = last(bare.run("flows.rlhf", PREFECT_HOME="/proc/nowhere"))
    assert "/proc/nowhere" in line and "PREFECT_HOME" in line


@pytest.mark.slow
def test_an_embedded_server_that_does_not_start_in_time_is_one_line(bare):
    line = last(bare.run("flows.rlhf", PREFECT_SERVER_EPHEMERAL_STARTUP_TIMEOUT_SECONDS="1"))
    assert "did not start in 1 s" in line and "PREFECT_API_URL" in line


def test_a_slow_machine_gets_minutes_unless_told_otherwise(bare):
    (bare.root / "ask.py").write_text(f"import flows, os; print(os.environ[{server.TIMEOUT!r}])")
    assert int(bare.run("ask").stdout) >= 120
    assert int(bare.run("ask", **{server.TIMEOUT: "7"}).stdout) == 7


def test_an_error_of_prefects_own_is_one_line(monkeypatch, capsys):
    monkeypatch.setattr(server, "check", lambda: None)
    monkeypatch.delenv("STACKRL_TRACEBACK", raising=False)

    def fail(*options, **more):
        raise RuntimeError("a\nb")

    monkeypatch.setattr(rlhf, "rlhf", fail)
    assert rlhf.main([]) == 1
    assert capsys.readouterr().err == "stackrl: rlhf: a b (STACKRL_TRACEBACK=1 shows the rest)\n"
    monkeypatch.setenv("STACKRL_TRACEBACK", "1")
    with pytest.raises(RuntimeError):
        rlhf.main([])

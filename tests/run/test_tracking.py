import hashlib
import json
import os
import shutil
import socket
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import pytest
import yaml

from tasks.run import provenance, tracking
from tasks.run.layout import Layout

DVC_YAML = {
    "stages": {
        "sft": {"cmd": "true", "deps": [], "params": ["sft"], "outs": []},
        "ppo": {"cmd": "true", "deps": [], "params": ["ppo"], "outs": []},
    }
}


@pytest.fixture(scope="module")
def empty_store(tmp_path_factory):
    """A new sqlite file takes MLflow a second: make one, copy it."""
    home = tmp_path_factory.mktemp("store")
    tracking.connect(Layout(home, home))
    return home / "mlflow.db"


@pytest.fixture
def layout(tmp_path, monkeypatch, empty_store):
    for name in ("MLFLOW_TRACKING_URI", "RANK", "DVC_ROOT", tracking.PARENT_VARIABLE):
        monkeypatch.delenv(name, raising=False)
    root = tmp_path / "repository"
    root.mkdir()
    (root / "dvc.yaml").write_text(yaml.safe_dump(DVC_YAML))
    (root / "params.yaml").write_text("sft: {learning_rate: 0.1}\nppo: {target: 1}\n")
    shutil.copy(empty_store, root)
    monkeypatch.chdir(root)
    return Layout.here()


def the_run(layout, stage="sft"):
    client = tracking.connect(layout)
    runs = client.search_runs([tracking.experiment(client, layout)], f"tags.`stackrl.stage` = '{stage}'")
    assert len(runs) == 1
    return runs[0]


def history(layout, run, name):
    return [(m.step, m.value) for m in tracking.connect(layout).get_metric_history(run.info.run_id, name)]


def test_a_data_set_is_an_input_of_the_run(layout):
    path = layout.root / "reward.parquet"
    path.write_bytes(b"questions")
    tracking.log_dataset(path, "reward", "a.7z", {"questions": 2.0})  # without a run: nothing
    with tracking.stage_run("sft", {}, layout):
        tracking.log_dataset(path, "reward", "a.7z", {"questions": 2.0})
    (found,) = the_run(layout).inputs.dataset_inputs
    assert found.dataset.name == "reward"
    assert found.dataset.digest == hashlib.sha256(b"questions").hexdigest()[:32]
    assert json.loads(found.dataset.source) == {"uri": path.as_uri(), "origin": "a.7z"}
    assert json.loads(found.dataset.profile) == {"questions": 2.0}
    assert [(tag.key, tag.value) for tag in found.tags] == [("mlflow.data.context", "reward")]


def test_a_tag_is_the_runs(layout):
    tracking.log_tag("stackrl.monitor", "nobody hears")  # without a run: nothing
    with tracking.stage_run("sft", {}, layout):
        tracking.log_tag("stackrl.monitor", "nothing found")
    assert the_run(layout).data.tags["stackrl.monitor"] == "nothing found"


def test_a_stage_run_holds_params_metrics_artifacts_and_tags(layout):
    picture = layout.root / "loss.png"
    picture.write_bytes(b"png")
    params = {"sft.learning_rate": 1e-5, "model.base": "", "data.source": ["a", "b"], "model.tied": True}
    with tracking.stage_run("sft", params, layout):
        for step in (10, 20):
            tracking.log_metrics({"sft/loss": 1 / step, "sft/nan": float("nan")}, step)
        tracking.log_metrics({"loss": 2.5})
        tracking.log_artifact(picture)
        tracking.log_artifact(layout.root / "dvc.yaml", "pipeline")
        assert the_run(layout).info.status == "RUNNING"
    run = the_run(layout)
    assert run.info.status == "FINISHED" and run.info.run_name == "sft"
    assert run.data.params == {
        "sft.learning_rate": "1e-05",
        "model.base": "",
        "data.source": '["a", "b"]',
        "model.tied": "true",
    }
    assert history(layout, run, "sft/loss") == [(10, 0.1), (20, 0.05)]
    assert run.data.metrics["loss"] == 2.5
    client = tracking.connect(layout)
    assert [item.path for item in client.list_artifacts(run.info.run_id)] == ["loss.png", "pipeline"]
    assert [item.path for item in client.list_artifacts(run.info.run_id, "pipeline")] == ["pipeline/dvc.yaml"]
    tags = run.data.tags
    assert tags["stackrl.fingerprint"] == layout.fingerprint("sft") and len(tags["stackrl.execution"]) == 16
    assert tags["stackrl.version.python"] == sys.version.split()[0] and tags["stackrl.version.torch"]
    assert "mlflow.parentRunId" not in tags
    assert (layout.home / "mlflow.db").exists() and list((layout.home / "mlartifacts").rglob("loss.png"))


@pytest.mark.parametrize(
    ("error", "status"),
    [(OSError(), "FAILED"), (KeyboardInterrupt(), "KILLED"), (SystemExit(1), "KILLED"), (None, "FINISHED")],
)
def test_the_end_of_a_run_says_how_it_ended(layout, error, status):
    try:
        with tracking.stage_run("sft", {}, layout):
            tracking.log_metrics({"loss": 1.0}, 1)
            if error:
                raise error
    except type(error):
        pass
    run = the_run(layout)
    assert run.info.status == status and run.data.metrics == {"loss": 1.0}
    tracking.log_metrics({"late": 1.0})  # nothing is open any more
    assert tracking.active_run() is None and the_run(layout).data.metrics == {"loss": 1.0}


def test_a_killed_run_is_opened_again_and_logs_no_step_twice(layout):
    with pytest.raises(KeyboardInterrupt), tracking.stage_run("sft", {"machine.threads": 2}, layout):
        for step in (1, 2, 3):
            tracking.log_metrics({"loss": float(step)}, step)
        raise KeyboardInterrupt
    first = the_run(layout)
    assert first.info.status == "KILLED"
    with tracking.stage_run("sft", {"machine.threads": 8, "sft.epochs": 1}, layout):
        assert tracking.active_run() == first.info.run_id
        for step in (3, 4):  # a checkpoint lies a little before the kill
            tracking.log_metrics({"loss": float(step)}, step)
            tracking.log_metrics({"loss": 100.0}, step)
    run = the_run(layout)
    assert run.info.run_id == first.info.run_id and run.info.status == "FINISHED"
    assert history(layout, run, "loss") == [(1, 1.0), (2, 2.0), (3, 3.0), (4, 4.0)]
    assert run.data.params == {"machine.threads": "2", "sft.epochs": "1"}


def test_another_fingerprint_or_another_store_is_another_run(layout, monkeypatch, empty_store):
    with tracking.stage_run("sft", {}, layout):
        first = tracking.active_run()
    (layout.root / "params.yaml").write_text("sft: {learning_rate: 0.2}\nppo: {target: 1}\n")
    with tracking.stage_run("sft", {}, layout):
        second = tracking.active_run()
    assert first != second
    shutil.copy(empty_store, layout.home / "other.db")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{layout.home}/other.db")
    with tracking.stage_run("sft", {}, layout):
        assert tracking.active_run() not in (first, second)
        tracking.log_artifact(layout.root / "dvc.yaml")
    assert list((layout.home / "mlartifacts").rglob("dvc.yaml"))  # not in the working directory's mlruns


def test_the_stages_of_a_flow_are_children_of_its_run(layout, monkeypatch):
    parent = tracking.parent_run("rlhf", {"prefect.flow_run_id": "7"})
    monkeypatch.setenv(tracking.PARENT_VARIABLE, parent)
    for stage in ("sft", "ppo"):
        with tracking.stage_run(stage, {}, layout):
            pass
    (layout.root / "dvc.lock").write_text("stages: {}\n")
    tracking.end_parent(parent, "FAILED")
    client = tracking.connect(layout)
    run = client.get_run(parent)
    assert (run.info.status, run.info.run_name) == ("FAILED", "rlhf")
    assert run.data.tags["prefect.flow_run_id"] == "7"
    assert [item.path for item in client.list_artifacts(parent)] == ["dvc.lock", "dvc.yaml", "params.yaml"]
    for stage in ("sft", "ppo"):
        tags = the_run(layout, stage).data.tags
        assert tags["mlflow.parentRunId"] == parent and "stackrl.execution" not in tags


def test_a_skipped_stage_finds_the_run_that_made_it(layout):
    fingerprint = layout.fingerprint("sft")
    assert tracking.run_of(fingerprint) is None
    with pytest.raises(ValueError), tracking.stage_run("sft", {}, layout):
        raise ValueError
    assert tracking.run_of(fingerprint) is None
    with tracking.stage_run("sft", {}, layout):
        run = tracking.active_run()
    assert tracking.run_of(fingerprint) == run and tracking.run_of("0" * 64) is None
    assert tracking.run_link(run).startswith("http://127.0.0.1:5000/#/experiments/")
    assert tracking.run_link(run).endswith(f"/runs/{run}")


def test_only_rank_0_tracks(layout, monkeypatch):
    monkeypatch.setenv("RANK", "1")
    with tracking.stage_run("sft", {}, layout):
        assert tracking.active_run() is None
    client = tracking.connect(layout)
    assert client.get_experiment_by_name(tracking.EXPERIMENT) is None


@pytest.fixture
def silent_port():
    """A port that takes connections and never answers."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        yield server.getsockname()[1]


@pytest.fixture
def closed_port():
    with socket.create_server(("127.0.0.1", 0)) as server:
        return server.getsockname()[1]


@pytest.mark.parametrize("kind", ["silent_port", "closed_port"])
def test_an_unreachable_server_is_named_without_its_password(layout, monkeypatch, request, kind):
    port = request.getfixturevalue(kind)
    monkeypatch.setattr(tracking, "SECONDS_TO_CONNECT", 0.3)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"http://me:s3cret@127.0.0.1:{port}")
    for call in (tracking.preflight, lambda: tracking.stage_run("sft", {}, layout).__enter__()):
        with pytest.raises(ConnectionError, match=f"MLflow at http://127.0.0.1:{port} does not") as caught:
            call()
        assert "s3cret" not in str(caught.value) and "\n" not in str(caught.value)


def test_a_server_that_refuses_us_is_named_without_its_password(layout, monkeypatch):
    class Refuses(BaseHTTPRequestHandler):
        def do_GET(self):
            self.send_error(401)

        do_POST = do_GET  # noqa: N815

        def log_message(self, *_):
            pass

    server = HTTPServer(("127.0.0.1", 0), Refuses)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"http://me:s3cret@127.0.0.1:{server.server_port}")
    with pytest.raises(ConnectionError, match=f":{server.server_port} does not answer.*401") as caught:
        tracking.preflight()
    server.shutdown()
    assert "s3cret" not in str(caught.value)


def test_a_store_that_is_no_database_is_named(layout):
    (layout.home / "mlflow.db").write_text("not a database, but long enough to pass for one" * 9)
    with pytest.raises(ConnectionError, match=r"mlflow\.db does not answer"):
        tracking.preflight()


def delete(layout):
    client = tracking.connect(layout)
    client.delete_experiment(tracking.experiment(client, layout))


def rename(layout):
    client = tracking.connect(layout)
    client.rename_experiment(tracking.experiment(client, layout), "another")


def test_a_deleted_experiment_is_restored_with_its_runs(layout, caplog):
    with tracking.stage_run("sft", {}, layout):
        first = tracking.active_run()
    for call in (tracking.preflight, lambda: tracking.parent_run("rlhf", {}), lambda: the_run(layout)):
        delete(layout)
        call()
        assert "stackrl was deleted; it is restored" in caplog.text
        caplog.clear()
    delete(layout)
    with tracking.stage_run("sft", {}, layout):
        assert tracking.active_run() == first


def test_a_renamed_experiment_keeps_its_runs_and_another_is_made(layout):
    with tracking.stage_run("sft", {}, layout):
        pass
    rename(layout)
    with tracking.stage_run("ppo", {}, layout):
        pass
    assert the_run(layout, "ppo").info.status == "FINISHED"


def test_a_deleted_run_is_not_gone_on_with(layout):
    with tracking.stage_run("sft", {}, layout):
        first = tracking.active_run()
    tracking.connect(layout).delete_run(first)
    with tracking.stage_run("sft", {}, layout):
        assert tracking.active_run() != first


@pytest.mark.parametrize(
    ("uri", "line"),
    [
        ("sqlite:///{home}/nowhere/mlflow.db", "does not answer: there is no folder .*/nowhere"),
        ("{home}", "does not answer: The filesystem tracking backend"),
        ("sqlite:///file:{home}/mlflow.db?mode=ro&uri=true", "readonly database"),
        ("ftp://x", "does not answer: .*unsupported URI"),
    ],
)
def test_a_store_that_takes_no_runs_is_one_line_before_compute(layout, monkeypatch, uri, line):
    tracking.preflight()
    monkeypatch.setenv("MLFLOW_TRACKING_URI", uri.format(home=layout.home))
    with pytest.raises(ConnectionError, match=line) as caught:
        tracking.stage_run("sft", {}, layout).__enter__()
    assert "\n" not in str(caught.value)


def test_other_runs_in_the_environment_change_nothing(layout, monkeypatch):
    for name in ("MLFLOW_EXPERIMENT_NAME", "MLFLOW_EXPERIMENT_ID", "MLFLOW_RUN_ID"):
        monkeypatch.setenv(name, "77")
    with tracking.stage_run("sft", {}, layout):
        pass
    assert the_run(layout).info.status == "FINISHED"


def test_a_tracker_that_fails_in_the_middle_stops_nothing(layout, monkeypatch, caplog):
    def fail(*_, **__):
        raise OSError("gone: http://me:s3cret@host")

    with tracking.stage_run("sft", {}, layout):
        tracking.log_metrics({"loss": 1.0}, 1)
        monkeypatch.setattr(type(tracking._active.client), "log_batch", fail)
    assert "gone: http://host" in caplog.text and "s3cret" not in caplog.text
    assert the_run(layout).info.status == "FINISHED"


def test_thousands_of_steps_are_few_writes(layout, monkeypatch):
    monkeypatch.setattr(tracking, "SECONDS_BETWEEN_WRITES", 1e9)
    with tracking.stage_run("sft", {}, layout):
        calls = []
        write = tracking._active.client.log_batch
        monkeypatch.setattr(
            type(tracking._active.client), "log_batch", lambda _, *a, **k: calls.append(1) or write(*a, **k)
        )
        for step in range(2000):
            tracking.log_metrics({"loss": step / 7}, step)
    assert len(calls) == 4
    assert history(layout, the_run(layout), "loss") == [(step, step / 7) for step in range(2000)]


def test_nothing_of_the_environment_is_logged(layout, monkeypatch):
    monkeypatch.setenv("SECRET_TOKEN", "hunter2")
    with tracking.stage_run("sft", {"sft.epochs": 1}, layout):
        tracking.log_metrics({"loss": 1.0})
    tracking.end_parent(tracking.parent_run("rlhf", {}), "FINISHED")
    assert b"hunter2" not in (layout.home / "mlflow.db").read_bytes()
    assert not any(b"hunter2" in path.read_bytes() for path in layout.home.rglob("*") if path.is_file())


def git(root, *words):
    subprocess.run(["git", "-C", root, "-c", "user.name=n", "-c", "user.email=e@x", *words], check=True)


def test_git_tags_tell_commit_and_dirt_but_not_the_pipelines_own(tmp_path):
    assert provenance.git_tags(tmp_path) == {}
    git(tmp_path, "init", "-q")
    (tmp_path / "code.py").write_text("1\n")
    git(tmp_path, "add", ".")
    git(tmp_path, "commit", "-qm", "one")
    (tmp_path / "artifacts/sft").mkdir(parents=True)
    (tmp_path / "artifacts/sft/metrics.json").write_text("{}")
    (tmp_path / "dvc.lock").write_text("{}")
    clean = provenance.git_tags(tmp_path)
    assert len(clean["mlflow.source.git.commit"]) == 40 and clean["stackrl.git.dirty"] == "false"
    (tmp_path / "code.py").write_text("2\n")
    assert provenance.git_tags(tmp_path) == {**clean, "stackrl.git.dirty": "true"}


def test_the_stages_of_one_dvc_process_share_an_execution(tmp_path):
    """A file named dvc stands for dvc: it starts two children, as `dvc repro` starts its stages."""
    code = "from tasks.run.provenance import execution; print(execution())"
    fake = tmp_path / "dvc"
    start = f"subprocess.run([sys.executable, '-c', {code!r}])"
    fake.write_text(f"import subprocess, sys\nfor _ in 'ab': {start}")
    root = Path(__file__).parents[2]
    environment = {**os.environ, "PYTHONPATH": str(root)}

    def stages():
        return subprocess.check_output([sys.executable, fake], text=True, env=environment).split()

    (first, second), (third, _) = stages(), stages()
    assert first == second != third


def test_the_trainers_import_without_mlflow():
    code = (
        "import sys; sys.modules['mlflow'] = None\n"
        "import tasks.run.tracking as t, tasks.training.checkpoints, tasks.run.curve, tasks.run.checkpoint\n"
        "t.log_metrics({'a': 1.0}); t.log_artifact('x'); print(t.active_run())"
    )
    assert subprocess.check_output([sys.executable, "-c", code], text=True) == "None\n"


def test_the_note_holds_an_id_and_nothing_else(layout):
    with tracking.stage_run("sft", {}, layout):
        note = json.loads((layout.scratch("sft") / "mlflow_run.json").read_text())
        assert note == {"run_id": tracking.active_run()}


def test_a_repository_that_git_declines_is_said(tmp_path, caplog):
    subprocess.run(["git", "init", "-q"], cwd=tmp_path, check=True)
    assert provenance.git_tags(tmp_path) == {}, "no commit yet"
    assert len(caplog.messages) == 1 and "carries no commit: fatal" in caplog.text


def test_runs_of_two_experiments_are_told_apart(layout, monkeypatch, tmp_path):
    """DVC's queue: another working directory, the same home, and a name."""
    with tracking.stage_run("sft", {}, layout):
        pass
    tags = the_run(layout).data.tags
    assert tags["stackrl.workspace"] == layout.workspace and "stackrl.experiment" not in tags
    assert not any(str(tmp_path) in text for text in tags.values())
    shutil.copytree(layout.root, tmp_path / "tmp1", ignore=shutil.ignore_patterns("mlflow.db*", "scratch"))
    (tmp_path / "tmp1" / "params.yaml").write_text("sft: {learning_rate: 0.2}\n")
    monkeypatch.setenv("DVC_EXP_NAME", "gouty-toga")
    other = Layout(tmp_path / "tmp1", layout.home)
    with tracking.stage_run("sft", {}, other):
        pass
    client = tracking.connect(layout)
    found = client.search_runs(
        [tracking.experiment(client, layout)], "tags.`stackrl.experiment` = 'gouty-toga'"
    )
    assert [run.data.tags["stackrl.workspace"] for run in found] == [other.workspace]


@pytest.mark.slow
def test_first_users_at_once_make_one_store(tmp_path, monkeypatch):
    """Two experiments of a queue start at the same moment, where nothing was run before."""
    code = (
        "from tasks.run import layout, tracking; here = layout.Layout.here();"
        "import mlflow.store.tracking.sqlalchemy_store; print('ready', flush=True); input();"
        "print(tracking.experiment(tracking.connect(here), here))"
    )
    environment = {key: value for key, value in os.environ.items() if not key.startswith(("MLFLOW_", "DVC_"))}
    started = [
        subprocess.Popen(
            [sys.executable, "-c", code], cwd=tmp_path, env=environment, text=True,
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        )
        for _ in range(3)
    ]  # fmt: skip
    assert [process.stdout.readline() for process in started] == ["ready\n"] * 3
    for process in started:
        process.stdin.write("\n")
        process.stdin.flush()
    found = [process.communicate() for process in started]
    assert [out for out, _ in found] == ["1\n"] * 3, found
    assert not list(tmp_path.glob("*.lock"))

"""MLflow remembers what happened: one run per stage, under one parent per flow.

The store is a sqlite file in the layout's home, or MLFLOW_TRACKING_URI. Nothing of the environment is logged.
"""

from __future__ import annotations

import json
import logging
import os
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tasks.run import moved
from tasks.run.files import write_json
from tasks.run.layout import EXPERIMENT_VARIABLE, Layout, content_hash
from tasks.run.locks import held
from tasks.run.provenance import execution, git_tags, one_line, version_tags, without_secrets
from tasks.run.ranks import is_first

if TYPE_CHECKING:
    from mlflow import MlflowClient

EXPERIMENT, STORE = "stackrl", "mlflow.db"
PARENT_VARIABLE = "STACKRL_PARENT_RUN_ID"
PIPELINE_FILES = ("params.yaml", "dvc.yaml", "dvc.lock")
ENVIRONMENT = {
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "DO_NOT_TRACK": "true",
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "2",  # 7 of them take four minutes
}
QUIETER = {  # fifty lines about a new sqlite file, and as many about an error that is raised as well
    "alembic": logging.WARNING,
    "mlflow.store.db.utils": logging.CRITICAL,
}
SECONDS_TO_CONNECT = 3.0
SECONDS_BETWEEN_WRITES = 2.0  # one write costs 3 ms in sqlite, more over HTTP
OTHER_PACKAGES = {"tensorboard": ("tensorboardX",)}  # that serve a tracker as well
BATCH = 100  # MLflow takes as many params, and ten times as many metrics, in one call
_log = logging.getLogger(__name__)


class _Run:
    """An open run: buffers metrics, knows which (name, step) it has; its failures stop no training."""

    def __init__(self, client: MlflowClient, run_id: str) -> None:
        self.client, self.id = client, run_id
        self.waiting: list[tuple[str, float, int, int]] = []
        self.written = time.monotonic()
        names = client.get_run(run_id).data.metrics
        self.known = {(name, m.step) for name in names for m in client.get_metric_history(run_id, name)}

    def add(self, values: Mapping[str, float], step: int) -> None:
        now = time.time_ns() // 10**6
        new = {name: float(value) for name, value in values.items() if (name, step) not in self.known}
        self.known.update((name, step) for name in new)
        self.waiting += [(name, value, now, step) for name, value in new.items()]
        if time.monotonic() - self.written > SECONDS_BETWEEN_WRITES or len(self.waiting) >= 10 * BATCH:
            self.flush()

    def flush(self) -> None:
        from mlflow.entities import Metric

        waiting, self.waiting, self.written = self.waiting, [], time.monotonic()
        for start in range(0, len(waiting), 5 * BATCH):
            batch = [Metric(*one) for one in waiting[start : start + 5 * BATCH]]
            self.attempt(self.client.log_batch, self.id, metrics=batch)

    def attempt(self, call: Any, *args: Any, **keys: Any) -> None:
        try:
            call(*args, **keys)
        except Exception as error:
            _log.warning("MLflow: %s: %s", call.__name__, one_line(error))


_active: _Run | None = None


@contextmanager
def stage_run(stage: str, params: Mapping[str, Any], layout: Layout) -> Iterator[None]:
    """The MLflow run of a stage: opened anew, or the one that a killed process of this fingerprint left.

    It ends FINISHED, KILLED (Ctrl-C, SIGTERM, exit) or FAILED. Ranks other than 0 have none.

    Args:
        stage: its name, and the run's.
        params: dotted name -> value.
        layout: scratch(stage)/mlflow_run.json keeps the run's id.

    Raises:
        ConnectionError: the tracking server does not answer.
    """
    global _active
    if not is_first():
        yield
        return
    _active = _open(stage, params, layout)
    status = "FAILED"
    try:
        yield
        status = "FINISHED"
    except (KeyboardInterrupt, SystemExit, GeneratorExit):
        status = "KILLED"
        raise
    finally:
        run, _active = _active, None
        run.flush()
        run.attempt(run.client.set_terminated, run.id, status)


def log_metrics(values: Mapping[str, float], step: int | None = None) -> None:
    """Metrics of the active stage run, once per name and step; nothing without one."""
    if _active:
        _active.add(values, step or 0)


def log_tag(name: str, text: str) -> None:
    """A tag of the active stage run; nothing without one."""
    if _active:
        _active.attempt(_active.client.set_tag, _active.id, name, text)


def check_tracker(name: str) -> None:
    """Refuse a tracker that is not installed.

    Raises:
        ValueError: the package of this name cannot be imported.
    """
    if not any(find_spec(package) for package in (name, *OTHER_PACKAGES.get(name, ()))):
        raise ValueError(f"log_with is {name}, which is not installed")


def has_open_run() -> bool:
    """Whether there is a run to track in: a stage's, or one that the caller has opened with mlflow."""
    return _active is not None or _mlflow().active_run() is not None


def track(values: Mapping[str, float], step: int) -> None:
    """Metrics of a trainer that is used without a stage: to an open run of a stage, else to mlflow's.

    Args:
        values: finite or not.
        step: of the training.
    """
    if _active:
        _active.add(values, step)
    else:
        _mlflow().log_metrics(dict(values), step=step)


def _mlflow():
    for variable, value in ENVIRONMENT.items():
        os.environ.setdefault(variable, value)
    import mlflow

    return mlflow


def log_artifact(path: Path, folder: str = "") -> None:
    """A file or a folder as an artifact of the active stage run, under `folder`; nothing without one."""
    if _active:
        log = _active.client.log_artifacts if Path(path).is_dir() else _active.client.log_artifact
        _active.attempt(log, _active.id, str(path), folder or None)


def log_dataset(path: Path, context: str, origin: str, profile: Mapping[str, float]) -> None:
    """A file as a data set of the active stage run, by its sha256; nothing without one.

    Args:
        path: the file.
        context: what it is for, for instance "reward".
        origin: what it was made from.
        profile: its counts.
    """
    if not _active:
        return
    from mlflow.entities import Dataset, DatasetInput, InputTag

    digest = content_hash(path)[:32]  # MLflow takes 36 characters
    source, counts = json.dumps({"uri": path.as_uri(), "origin": origin}), json.dumps(dict(profile))
    dataset = Dataset(path.stem, digest, "local", source, profile=counts)
    found = DatasetInput(dataset, [InputTag("mlflow.data.context", context)])
    _active.attempt(_active.client.log_inputs, _active.id, [found])


def active_run() -> str | None:
    """The id of the stage run that is open in this process."""
    return _active.id if _active else None


def parent_run(name: str, tags: Mapping[str, str]) -> str:
    """Open the run above the stages' runs, with the pipeline's files; returns its id."""
    layout = Layout.here()
    client = connect(layout)
    tags = {**git_tags(layout.root), **_place_tags(layout), **tags}
    kept_in = experiment(client, layout)
    with _named(layout, "takes no run"):
        run_id = client.create_run(kept_in, run_name=name, tags=tags).info.run_id
        _log_pipeline_files(client, run_id, layout)
    return run_id


def tag_parent(run_id: str, stage: str, outcome: str, made_by: str) -> None:
    """Link a stage of a flow to the run that made its result: tag `stackrl.made_by.<stage>`."""
    connect(Layout.here()).set_tag(run_id, f"stackrl.made_by.{stage}", f"{outcome}: {made_by}")


def end_parent(run_id: str, status: str) -> None:
    """End a parent run as FINISHED, FAILED or KILLED, with the pipeline's files as they are now."""
    client = connect(Layout.here())
    _log_pipeline_files(client, run_id, Layout.here())
    client.set_terminated(run_id, status)


def run_of(fingerprint: str) -> str | None:
    """The newest finished run of a stage with this fingerprint, or None."""
    layout = Layout.here()
    client = connect(layout)
    wanted = f"tags.`stackrl.fingerprint` = '{fingerprint}' and attributes.status = 'FINISHED'"
    newest = ["attributes.start_time DESC"]
    found = client.search_runs([experiment(client, layout)], wanted, max_results=1, order_by=newest)
    return found[0].info.run_id if found else None


def run_link(run_id: str) -> str:
    """The page of a run: on the tracking server, or where `mlflow server` shows a local store."""
    layout = Layout.here()
    server = without_secrets(tracking_uri(layout)).rstrip("/")
    server = server if server.startswith("http") else "http://127.0.0.1:5000"
    return f"{server}/#/experiments/{experiment(connect(layout), layout)}/runs/{run_id}"


def tracking_uri(layout: Layout) -> str:
    """MLFLOW_TRACKING_URI, or the sqlite file in the layout's home."""
    return os.environ.get("MLFLOW_TRACKING_URI") or f"sqlite:///{layout.home / STORE}"


def own_store(layout: Layout) -> Path | None:
    """The sqlite file in the layout's home, made or not; None where another store is asked for."""
    path = layout.home / STORE
    return path if tracking_uri(layout) == f"sqlite:///{path}" else None


def preflight() -> None:
    """Whether runs can be logged; raises what `connect` and `experiment` raise."""
    layout = Layout.here()
    experiment(connect(layout), layout)


def connect(layout: Layout) -> MlflowClient:
    """A client of the layout's store, whose own places follow a home that was moved or copied.

    Raises:
        ConnectionError: it does not answer; in seconds, in one line that names it.
    """
    for name, value in ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    for name, level in QUIETER.items():
        logging.getLogger(name).setLevel(level)
    uri = tracking_uri(layout)
    with _named(layout, "does not answer"):
        if uri.startswith("http"):
            _knock(without_secrets(uri).rstrip("/"))
        elif (store := own_store(layout)) is not None:
            layout.home.mkdir(parents=True, exist_ok=True)
            for place in moved.follow(store, layout.home):
                _log.warning("MLflow: this folder stood at %s; %s now says where it stands", place, STORE)
        else:
            _check_folder(uri)
        from mlflow import MlflowClient

        with _alone_with(uri):
            client = MlflowClient(tracking_uri=uri, registry_uri=uri)
            client.search_experiments(max_results=1)
    return client


@contextmanager
def _named(layout: Layout, what: str) -> Iterator[None]:
    """Errors of MLflow as one line that names the store and keeps its password."""
    try:
        yield
    except Exception as error:
        line = f"MLflow at {without_secrets(tracking_uri(layout))} {what}: {one_line(error)}"
        raise ConnectionError(line) from None


def _check_folder(uri: str) -> None:
    """SQLAlchemy tries a file in a missing folder again and again, for minutes."""
    if uri.startswith("sqlite:///") and not uri.startswith("sqlite:///file:"):
        folder = Path(uri.removeprefix("sqlite:///").partition("?")[0]).parent
        if not folder.is_dir():
            raise FileNotFoundError(f"there is no folder {folder}")


def _alone_with(uri: str) -> AbstractContextManager:
    """A lock beside a sqlite store: two first users at once would both make its tables, and one fail."""
    place = uri.partition("?")[0].removeprefix("sqlite:///")
    if not uri.startswith("sqlite:///") or not Path(place).parent.is_dir():
        return nullcontext()
    return held(Path(f"{place}.lock"), lambda holder: None)


def _knock(server: str) -> None:
    """Any HTTP answer will do; MLflow itself would wait and try again for minutes."""
    with suppress(urllib.error.HTTPError):
        urllib.request.urlopen(f"{server}/health", timeout=SECONDS_TO_CONNECT).close()


def experiment(client: MlflowClient, layout: Layout) -> str:
    """The id of the experiment `stackrl`, made or restored if need be.

    Artifacts go to home/mlartifacts or the server.

    Raises:
        ConnectionError: it cannot be made or restored; one line.
    """
    from mlflow.exceptions import MlflowException

    with _named(layout, f"has no experiment {EXPERIMENT}"):
        found = client.get_experiment_by_name(EXPERIMENT)
        if not found:
            is_server = tracking_uri(layout).startswith(("http", "databricks"))
            place = None if is_server else f"{layout.home.as_uri()}/{moved.ARTIFACTS}"
            try:
                return client.create_experiment(EXPERIMENT, place)
            except MlflowException:  # another stage may be faster
                if not (found := client.get_experiment_by_name(EXPERIMENT)):
                    raise
    if found.lifecycle_stage == "deleted":
        with _named(layout, f"keeps the experiment {EXPERIMENT} as deleted and does not restore it"):
            client.restore_experiment(found.experiment_id)
        _log.warning("MLflow: the experiment %s was deleted; it is restored, with its runs", EXPERIMENT)
    return found.experiment_id


def _open(stage: str, params: Mapping[str, Any], layout: Layout) -> _Run:
    client = connect(layout)
    note = layout.scratch(stage) / "mlflow_run.json"
    tags = {**git_tags(layout.root), **version_tags(), "mlflow.source.name": f"python -m tasks {stage}"}
    tags |= {"stackrl.stage": stage, "stackrl.fingerprint": layout.fingerprint(stage), **_place_tags(layout)}
    parent = os.environ.get(PARENT_VARIABLE)
    tags |= {"mlflow.parentRunId": parent} if parent else {"stackrl.execution": execution()}
    kept_in = experiment(client, layout)
    with _named(layout, "takes no run"):
        if (run_id := _reopen(client, note, tags)) is None:
            run_id = client.create_run(kept_in, run_name=stage, tags=tags).info.run_id
            write_json(note, {"run_id": run_id})
        _log_params(client, run_id, params)
        return _Run(client, run_id)


def _place_tags(layout: Layout) -> dict[str, str]:
    """Which workspace, and which of DVC's experiments: runs of several stand side by side in one store."""
    name = os.environ.get(EXPERIMENT_VARIABLE)
    return {"stackrl.workspace": layout.workspace} | ({"stackrl.experiment": name} if name else {})


def _reopen(client: MlflowClient, note: Path, tags: Mapping[str, str]) -> str | None:
    """The run that `note` names, running again; None where there is no such note or run."""
    from mlflow.entities import RunTag
    from mlflow.exceptions import MlflowException

    try:
        run_id = json.loads(note.read_text(encoding="utf-8"))["run_id"]
        client.update_run(run_id, status="RUNNING")
    except (FileNotFoundError, ValueError, KeyError, MlflowException):
        return None
    client.log_batch(run_id, tags=[RunTag(key, value) for key, value in tags.items()])
    return run_id


def _log_params(client: MlflowClient, run_id: str, params: Mapping[str, Any]) -> None:
    from mlflow.entities import Param

    known = client.get_run(run_id).data.params  # none can change: a resumed run keeps its first machine.*
    texts = {name: value if isinstance(value, str) else json.dumps(value) for name, value in params.items()}
    new = [Param(name, text) for name, text in texts.items() if name not in known]
    for start in range(0, len(new), BATCH):
        client.log_batch(run_id, params=new[start : start + BATCH])


def _log_pipeline_files(client: MlflowClient, run_id: str, layout: Layout) -> None:
    for name in PIPELINE_FILES:
        if (layout.root / name).exists():
            client.log_artifact(run_id, str(layout.root / name))

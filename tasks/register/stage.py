"""The three models into the MLflow registry, each version tagged with all it was made from.

A model's identity is the md5 of its folder in dvc.lock: registered twice, it is one version. The alias
`candidate` stands on this run's models; `champion` too, when there is none yet and the policy beats SFT.
Afterwards it moves by hand only: ``python -m tasks.register promote stackrl-policy 3``. What an experiment of DVC
registers gets no alias.
"""

from __future__ import annotations

import json
import logging
import os
import sqlite3
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tasks.register import holdings, lineage
from tasks.register.holdings import FILES, IDENTITY, SERVED, TRIAL, Holding
from tasks.register.recipe import MODELS, Recipe
from tasks.run import moved, tracking
from tasks.run.files import write_json
from tasks.run.layout import Layout, StageResult

if TYPE_CHECKING:
    from mlflow import MlflowClient

    from params.schema import Params

LONGEST_VALUE = 5000  # of a model version's tag in MLflow, characters
NOTHING_TO_DO = "all registered before, up to date"
_log = logging.getLogger(__name__)


def standing(params: Params, layout: Layout) -> StageResult | None:
    """The stage's result where the registry has everything already; None where there is something to do.

    Raises:
        ConnectionError: the registry does not answer.
    """
    wanted = _wanted(params, layout)
    if not all(wanted.values()):
        return None
    held, client = _look(layout, list(wanted))
    if held is None or _todo(params, layout, wanted, held, client):
        return None
    return _result(layout, wanted, NOTHING_TO_DO)


def run(params: Params, layout: Layout) -> StageResult:
    """The stage.

    Raises:
        ValueError: a model folder is missing or cannot be loaded, a registered model says something else than
            the run's, or an alias names a version whose files are gone.
        ConnectionError: the registry does not answer.
    """
    with nullcontext() if tracking.active_run() else tracking.stage_run("register", {}, layout):
        client, wanted = tracking.connect(layout), _wanted(params, layout)
        tracking.experiment(client, layout)
        held, locked = holdings.by_client(client, wanted), lineage.locked_md5s(layout)
        missing = {name: kind for name, kind in _kinds(params).items() if not _found(params, name, wanted, held, client)}
        folders = {name: _folder(layout, MODELS[kind]) for name, kind in missing.items()}
        wanted |= {name: wanted[name] or lineage.folder_md5(folder) for name, folder in folders.items()}
        tags = lineage.tags(params, layout, locked) if missing else {}
        for name, kind in missing.items():
            if any(one.md5 == wanted[name] for one in held[name].versions):
                _log.warning("register: %s is logged anew: what was registered is gone or out of date", name)
            _log_version(layout, client, Recipe.of(kind, params), name, folders[name], {**tags, IDENTITY: wanted[name]})
        if missing:
            _log_pipeline(client, layout, locked)
        _set_aliases(params, layout, wanted, client)
    return _result(layout, wanted)


def _kinds(params: Params) -> dict[str, str]:
    """Name in the registry -> kind of model."""
    return {f"{params.register.prefix}-{kind}": kind for kind in MODELS}


def _wanted(params: Params, layout: Layout) -> dict[str, str]:
    """Name in the registry -> md5 of its folder; empty where neither dvc.lock nor the disk knows it."""
    locked, found = lineage.locked_md5s(layout), {}
    for name, kind in _kinds(params).items():
        folder = layout.artifact(MODELS[kind], "model")
        is_there = (folder / "config.json").is_file()
        found[name] = locked.get(f"artifacts/{MODELS[kind]}/model") or (
            lineage.folder_md5(folder) if is_there else ""
        )
    return found


def _look(layout: Layout, names: list[str]) -> tuple[dict[str, Holding] | None, MlflowClient | None]:
    """What the registry holds, and the client that was needed; None where there is none yet, or it was moved."""
    if (store := tracking.own_store(layout)) is not None:
        if not store.exists() or moved.old_places(store, layout.home):
            return None, None
        try:
            return holdings.in_file(store, names), None
        except sqlite3.Error as error:
            _log.debug("mlflow.db: %s", error)  # MLflow's client reads it, or says what is wrong
    client = tracking.connect(layout)
    return holdings.by_client(client, names), client


def _found(params: Params, name: str, wanted: Mapping[str, str], held: Mapping[str, Holding], client=None):
    """The whole version with these weights that answers as this run's do, or None."""
    return held[name].find(wanted[name], Recipe.of(_kinds(params)[name], params).digest, client)


def _todo(
    params: Params, layout: Layout, wanted: Mapping[str, str], held: Mapping[str, Holding], client=None
) -> bool:
    """Whether a model is not there, or an alias not where it should be."""
    found = {name: _found(params, name, wanted, held, client) for name in wanted}
    if not all(found.values()):
        return True
    if trial() is not None:
        return False
    aliases = _aliases(params, layout, held)
    return any(
        held[name].aliases.get(alias) != found[name].number for name in wanted for alias in aliases
    ) or any(held[name].lost_aliases(client) for name in wanted)


def _aliases(params: Params, layout: Layout, held: Mapping[str, Holding]) -> tuple[str, ...]:
    """The aliases that this run's models take by themselves."""
    has_champion = "champion" in held[f"{params.register.prefix}-policy"].aliases
    return ("candidate",) if has_champion or not lineage.beats_sft(layout) else ("candidate", "champion")


def _set_aliases(params: Params, layout: Layout, wanted: Mapping[str, str], client: MlflowClient) -> None:
    """Where they should be; the policy's last, so that what is cut short is done again.

    Raises:
        ValueError: an alias that this run may not move names a version whose files are gone.
    """
    held = holdings.by_client(client, wanted)
    found = {name: _found(params, name, wanted, held, client) for name in wanted}
    lost = [
        f"{name}@{alias} is version {number}, whose files are gone; bring them back, "
        f"or `python -m tasks.register promote {name} {found[name].number}`"
        for name in wanted
        for alias, number in held[name].lost_aliases(client).items()
        if not _move(client, name, alias, number, found[name].number, held[name])
    ]
    if trial() is None:
        for name in wanted:
            for alias in _aliases(params, layout, held):
                client.set_registered_model_alias(name, alias, str(found[name].number))
    if lost:
        raise ValueError(lost[0])


def _move(client: MlflowClient, name: str, alias: str, number: int, new: int, held: Holding) -> bool:
    """Let an alias follow weights that were logged anew; whether it is none that stays lost."""
    md5s = {one.number: one.md5 for one in held.versions}
    if md5s.get(number) == md5s[new]:
        client.set_registered_model_alias(name, alias, str(new))
        return True
    return alias == "candidate" and trial() is None  # it moves to this run's models anyway


def trial() -> str | None:
    """The name of DVC's experiment that this stage is part of; None outside one."""
    return os.environ.get("DVC_EXP_NAME") or None


def _result(layout: Layout, found: Mapping[str, str], note: str = "") -> StageResult:
    write_json(layout.artifact("register", "registered.json"), dict(found))
    beats = lineage.beats_sft(layout)
    return StageResult({"models": float(len(found)), "beats_sft": float(beats)}, note)


def _folder(layout: Layout, stage: str) -> Path:
    folder = layout.artifact(stage, "model")
    if not (folder / "config.json").is_file():
        raise ValueError(
            f"artifacts/{stage}/model holds no model; `dvc pull` brings it, or `dvc repro {stage}` makes it"
        )
    return folder


def _log_version(
    layout: Layout, client: MlflowClient, recipe: Recipe, name: str, folder: Path, tags: Mapping[str, str]
) -> None:
    """Log and register one model; the list of its files is written last, so a version that has it is whole."""
    from tasks.register import models

    own = {SERVED: recipe.digest} | ({TRIAL: trial()} if trial() else {})
    short = {key: value[:LONGEST_VALUE] for key, value in {**tags, **own}.items()}
    with _fluent(layout):
        version = models.log(recipe, folder, name, short)
    place = client.get_model_version_download_uri(name, version)
    client.set_model_version_tag(name, version, FILES, json.dumps(holdings.sizes(place, client)))


def _log_pipeline(client: MlflowClient, layout: Layout, locked: Mapping[str, str]) -> None:
    """What brings everything back, params.yaml, dvc.yaml and dvc.lock, and the data as MLflow's datasets."""
    from mlflow.data.meta_dataset import MetaDataset
    from mlflow.data.sources import LocalArtifactDatasetSource
    from mlflow.entities import DatasetInput, InputTag

    for name in tracking.PIPELINE_FILES:
        if (layout.root / name).exists():
            tracking.log_artifact(layout.root / name)
    inputs = []
    for path, md5 in lineage.sources(locked).items():
        source = LocalArtifactDatasetSource(path.removeprefix("dvc."))
        dataset = MetaDataset(source, name=Path(path).name, digest=md5)
        inputs.append(DatasetInput(dataset._to_mlflow_entity(), [InputTag("mlflow.data.context", "lineage")]))
    client.log_inputs(tracking.active_run(), inputs)


@contextmanager
def _fluent(layout: Layout) -> Iterator[Any]:
    """MLflow's module with our store and the stage's run active, for what knows no client."""
    import mlflow

    before = mlflow.get_tracking_uri(), mlflow.get_registry_uri()
    names = ("MLFLOW_TRACKING_URI", "MLFLOW_RUN_ID", "MLFLOW_EXPERIMENT_ID", "MLFLOW_EXPERIMENT_NAME")
    said = {name: os.environ.pop(name, None) for name in names}
    uri = said["MLFLOW_TRACKING_URI"] or tracking.tracking_uri(layout)
    mlflow.set_tracking_uri(uri)
    mlflow.set_registry_uri(uri)
    try:
        with mlflow.start_run(run_id=tracking.active_run()):
            yield mlflow
    finally:
        mlflow.set_tracking_uri(before[0])
        mlflow.set_registry_uri(before[1])
        for name, value in said.items():
            os.environ.pop(name, None)
            if value is not None:
                os.environ[name] = value

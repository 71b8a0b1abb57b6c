"""A model folder of the run as an MLflow model: plain transformers, and code that knows template and numbers.

Both flavours share one folder of weights. The second is MLflow's *models from code*: a file of
`tasks/register/serving` travels along, nothing is pickled.
"""

from __future__ import annotations

import json
import logging
import os
import shutil
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tasks.register import holdings
from tasks.register.checks import (
    EXAMPLES,
    check_answers,
    check_scores,
    check_text_scores,
    closing_text,
)
from tasks.register.recipe import EXPERTS, Recipe
from tasks.register.wanted import Wanted
from tasks.run import tracking
from tasks.run.layout import Layout

if TYPE_CHECKING:
    from mlflow import MlflowClient

REQUIRED = ("mlflow", "torch", "transformers")  # all that an environment without our package needs
LONGEST_VALUE = 5000  # of a model version's tag in MLflow, characters
VARIABLES = ("MLFLOW_TRACKING_URI", "MLFLOW_RUN_ID", "MLFLOW_EXPERIMENT_ID", "MLFLOW_EXPERIMENT_NAME")


def register(layout: Layout, client: MlflowClient, wanted: Wanted, tags: Mapping[str, str]) -> None:
    """Log and register one model under the stage's run; the list of its files is written last.

    Raises:
        ValueError: a folder that cannot be loaded, or a model that says something else once it is registered.
    """
    from mlflow.models import Model

    name, recipe = wanted.name, wanted.recipe
    own = {holdings.IDENTITY: wanted.md5, holdings.SERVED: recipe.digest}
    with _quiet(), _fluent(layout):
        logged = Model.log(
            artifact_path=None, name=recipe.kind, flavor=sys.modules[__name__], registered_model_name=name,
            tags={key: value[:LONGEST_VALUE] for key, value in {**tags, **own}.items()},
            recipe=recipe, folder=wanted.folder, validate_serving_input=False,
        )  # fmt: skip
    version = str(logged.registered_model_version)
    closing = (logged.flavors["python_function"].get("config") or {}).get("closing", "")
    client.update_model_version(name, version, recipe.description(name, closing))
    place = client.get_model_version_download_uri(name, version)
    client.set_model_version_tag(name, version, holdings.FILES, json.dumps(holdings.sizes(place, client)))


def save_model(path: str | Path, mlflow_model: Any, recipe: Recipe, folder: Path, **_: Any) -> None:
    """Called by MLflow: write both flavours under `path`, and check that they say what the run says.

    Raises:
        ValueError: as :func:`register`.
    """
    import mlflow

    if recipe.is_frozen_style:
        _save_experts(Path(path), mlflow_model, recipe, folder)
        return
    parts, settings = _parts(recipe, folder)
    mlflow.transformers.save_model(
        parts,
        path,
        task="text-classification" if recipe.is_reward else "text-generation",
        mlflow_model=mlflow_model,
        signature=signature(recipe),
        input_example=example(recipe),
        pip_requirements=requirements(),
    )
    path = Path(path)
    (path / "LICENSE.txt").unlink(missing_ok=True)  # it says that the folder's page on the Hub has none
    _give_code(path, mlflow_model, recipe, settings)
    check = check_scores if recipe.is_reward else check_answers
    check(parts["model"], parts["tokenizer"], settings, path, _key(folder))


def _save_experts(path: Path, mlflow_model: Any, recipe: Recipe, folder: Path) -> None:
    """The pyfunc flavour alone: no pipeline of transformers knows head.json.

    Raises:
        ValueError: as :func:`register`.
    """
    from mlflow import pyfunc

    pyfunc.save_model(
        path,
        python_model=str(recipe.code),
        artifacts={"model": str(folder), "experts": str(EXPERTS)},
        mlflow_model=mlflow_model,
        signature=signature(recipe),
        input_example=example(recipe),
        pip_requirements=requirements(),
    )
    for artifact in mlflow_model.flavors["python_function"]["artifacts"].values():
        artifact["uri"] = artifact["path"]  # where it came from is a place of this machine
    mlflow_model.save(str(path / "MLmodel"))
    check_text_scores(folder, path, _key(folder))


def requirements() -> list[str]:
    """Of an environment without our package, each with its version here."""
    return [f"{package}=={metadata.version(package).split('+')[0]}" for package in REQUIRED]


def example(recipe: Recipe) -> Any:
    """An input that works, with the run's numbers."""
    question, answer = EXAMPLES[0]
    if recipe.is_reward:
        return [{"question": question, "answer": answer}]
    return [question], dict(recipe.numbers)


def signature(recipe: Recipe) -> Any:
    """What goes in, what comes out, and the numbers that may be asked for."""
    from mlflow.models import ModelSignature
    from mlflow.types import ColSpec, ParamSchema, ParamSpec, Schema

    if recipe.is_reward:
        columns = [ColSpec("string", name) for name in ("question", "answer")]
        return ModelSignature(Schema(columns), Schema([ColSpec("double")]))
    kinds = {bool: "boolean", int: "long", float: "double"}
    numbers = {**recipe.numbers, "seed": -1}
    params = ParamSchema([ParamSpec(name, kinds[type(value)], value) for name, value in numbers.items()])
    return ModelSignature(Schema([ColSpec("string")]), Schema([ColSpec("string")]), params)


def log_pipeline(layout: Layout, client: MlflowClient, sources: Mapping[str, str]) -> None:
    """What brings everything back, params.yaml, dvc.yaml and dvc.lock, and the data as MLflow's datasets."""
    from mlflow.data.meta_dataset import MetaDataset
    from mlflow.data.sources import LocalArtifactDatasetSource
    from mlflow.entities import DatasetInput, InputTag

    for name in tracking.PIPELINE_FILES:
        if (layout.root / name).exists():
            tracking.log_artifact(layout.root / name)
    inputs = []
    for path, md5 in sources.items():
        source = LocalArtifactDatasetSource(path.removeprefix("dvc."))
        dataset = MetaDataset(source, name=Path(path).name, digest=md5)
        inputs.append(DatasetInput(dataset._to_mlflow_entity(), [InputTag("mlflow.data.context", "lineage")]))
    client.log_inputs(tracking.active_run(), inputs)


def _parts(recipe: Recipe, folder: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """Model and tokenizer as they will be saved, and what the code beside them needs to know."""
    from transformers import AutoTokenizer, GenerationConfig

    from tasks.lm.model.context import room_of
    from tasks.lm.model.kinds import is_encoder
    from tasks.lm.model.loading import load_causal, load_reward

    load = load_reward if recipe.is_reward else load_causal
    model, tokenizer = load(folder, key=_key(folder)).eval(), AutoTokenizer.from_pretrained(folder)
    model.name_or_path = _key(folder)  # MLflow notes it; the folder itself may move
    settings: dict[str, Any] = {"room": room_of(model)}
    if recipe.is_reward:
        model.config.problem_type = "regression"  # transformers would squeeze the score through a sigmoid
        settings["closes_itself"] = is_encoder(model)
        settings["closing"] = closing_text(tokenizer, settings["closes_itself"])
    else:
        saved = model.generation_config
        ends = tokenizer.eos_token_id if saved.eos_token_id is None else saved.eos_token_id
        known = {"eos_token_id": ends, "bos_token_id": saved.bos_token_id}
        model.generation_config = GenerationConfig(
            **recipe.numbers, **known, pad_token_id=tokenizer.pad_token_id
        )
        settings["defaults"] = {**recipe.numbers, "seed": -1}
        settings["cut_prompts_to"] = recipe.cut_prompts_to
    return {"model": model, "tokenizer": tokenizer}, settings


def _give_code(path: Path, mlflow_model: Any, recipe: Recipe, settings: Mapping[str, Any]) -> None:
    """Let the pyfunc flavour run our file over the weights that the transformers flavour has written."""
    from mlflow import pyfunc

    shutil.copyfile(recipe.code, path / recipe.code.name)
    places = {"model": "model", "tokenizer": "components/tokenizer"}
    pyfunc.add_to_model(
        mlflow_model,
        loader_module="mlflow.pyfunc.loaders.code_model",
        conda_env="conda.yaml",
        python_env="python_env.yaml",
        model_config=dict(settings),
        model_code_path=recipe.code.name,
        artifacts={name: {"path": place, "uri": place} for name, place in places.items()},
    )
    mlflow_model.save(str(path / "MLmodel"))


def _key(folder: Path) -> str:
    return f"artifacts/{folder.parent.name}/model"


@contextmanager
def _quiet() -> Iterator[None]:
    """No progress bars, and no look-ups on the Hub: for a model card MLflow waits 47 s without a network."""
    from huggingface_hub import constants
    from transformers.utils import logging as progress

    logging.getLogger("mlflow.transformers").setLevel(logging.ERROR)  # it warns that it found neither
    before, constants.HF_HUB_OFFLINE = constants.HF_HUB_OFFLINE, True
    had_bars = progress.is_progress_bar_enabled()
    progress.disable_progress_bar()
    try:
        yield
    finally:
        constants.HF_HUB_OFFLINE = before
        if had_bars:
            progress.enable_progress_bar()


@contextmanager
def _fluent(layout: Layout) -> Iterator[None]:
    """MLflow's module with our store and the stage's run active, for what knows no client."""
    import mlflow

    uri, before = tracking.tracking_uri(layout), (mlflow.get_tracking_uri(), mlflow.get_registry_uri())
    said = {name: os.environ.pop(name, None) for name in VARIABLES}  # of other runs than this
    mlflow.set_tracking_uri(uri)
    mlflow.set_registry_uri(uri)
    try:
        with mlflow.start_run(run_id=tracking.active_run()):
            yield
    finally:
        mlflow.set_tracking_uri(before[0])
        mlflow.set_registry_uri(before[1])
        for name, value in said.items():
            os.environ.pop(name, None)
            if value is not None:
                os.environ[name] = value

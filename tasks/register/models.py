"""A model folder of the run as an MLflow model: plain transformers, and code that knows template and numbers.

Both flavours share one folder of weights. The second is MLflow's *models from code*: a file of
:mod:`tasks.register.serving` travels along, nothing is pickled.
"""

from __future__ import annotations

import logging
import shutil
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from importlib import metadata
from pathlib import Path
from typing import Any

from tasks.register.checks import EXAMPLES, check_answers, check_scores, closing_text
from tasks.register.recipe import Recipe
REQUIRED = ("mlflow", "torch", "transformers")  # all that an environment without our package needs


def log(recipe: Recipe, folder: Path, name: str, tags: Mapping[str, str]) -> str:
    """Log and register the model in `folder` under the active MLflow run; the version's number.

    Raises:
        ValueError: a folder that cannot be loaded, or a model that says something else once it is registered.
    """
    import mlflow
    from mlflow.models import Model

    with _quiet():
        logged = Model.log(
            artifact_path=None, name=recipe.kind, flavor=sys.modules[__name__],
            registered_model_name=name, tags=dict(tags),
            recipe=recipe, folder=folder, validate_serving_input=False,
        )  # fmt: skip
    version = str(logged.registered_model_version)
    closing = logged.flavors["python_function"]["config"].get("closing", "")
    mlflow.MlflowClient().update_model_version(name, version, recipe.description(name, closing))
    return version


def save_model(path: str | Path, mlflow_model: Any, recipe: Recipe, folder: Path, **_: Any) -> None:
    """MLflow's door of a flavour: write both flavours under `path`, then check that they say what the run says.

    Raises:
        ValueError: as :func:`log`.
    """
    import mlflow

    parts, settings = _parts(recipe, folder)
    mlflow.transformers.save_model(
        parts,
        path,
        task="text-classification" if recipe.is_reward else "text-generation",
        mlflow_model=mlflow_model,
        signature=signature(recipe),
        input_example=example(recipe),
        pip_requirements=[f"{package}=={_version(package)}" for package in REQUIRED],
    )
    (Path(path) / "LICENSE.txt").unlink(missing_ok=True)  # it says that the folder's page on the Hub has none
    _give_code(Path(path), mlflow_model, recipe, settings)
    compared = parts["model"], parts["tokenizer"]
    if recipe.is_reward:
        check_scores(*compared, settings["closes_itself"], settings["closing"], Path(path), _key(folder))
    else:
        check_answers(*compared, recipe.numbers["max_new_tokens"], settings["room"], Path(path), _key(folder))


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


def _parts(recipe: Recipe, folder: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """Model and tokenizer as they will be saved, and what the code beside them needs to know."""
    from transformers import AutoTokenizer, GenerationConfig

    from tasks.lm.loading import load_causal, load_reward
    from tasks.lm.scoring import is_encoder, room_of

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
        ends = saved.eos_token_id if saved.eos_token_id is not None else tokenizer.eos_token_id
        ids = {"eos_token_id": ends, "pad_token_id": tokenizer.pad_token_id, "bos_token_id": saved.bos_token_id}
        model.generation_config = GenerationConfig(**recipe.numbers, **ids)
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


def _version(package: str) -> str:
    return metadata.version(package).split("+")[0]


@contextmanager
def _quiet() -> Iterator[None]:
    """No look-ups on the Hub: MLflow asks it for a model card and a licence, 47 seconds without a network."""
    from huggingface_hub import constants

    names = "mlflow.transformers", "mlflow.models.model", "mlflow.utils.environment"
    for each in names:  # it warns that it found neither, and of requirements that it has not guessed
        logging.getLogger(each).setLevel(logging.ERROR)
    before, constants.HF_HUB_OFFLINE = constants.HF_HUB_OFFLINE, True
    try:
        yield
    finally:
        constants.HF_HUB_OFFLINE = before

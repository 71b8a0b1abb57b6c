"""The three models into the MLflow registry, each version tagged with all it was made from.

A model's identity is the md5 of its folder in dvc.lock: registered twice, it is one version. The alias
`candidate` stands on this run's models; `champion` too, when there is none yet and the policy beats SFT.
Afterwards it moves by hand only: ``python -m tasks.register promote stackrl-policy 3``.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import logging
import os
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tasks.run import tracking
from tasks.run.files import write_json
from tasks.run.layout import Layout, StageResult
from tasks.run.provenance import git_tags

if TYPE_CHECKING:
    from mlflow import MlflowClient

    from params.schema import Params

MODELS = {"sft": "sft", "reward": "reward", "policy": "ppo"}  # name in the registry -> stage
IDENTITY = "stackrl.md5"
LINEAGE = ("data", "pack")  # stages whose outs a version is tagged with
JUDGES = ("reward_eval", "policy_eval")  # stages whose metrics a version is tagged with
EVEN = 0.5  # win rate of a policy that is no better than SFT
LONGEST_VALUE = 5000  # of a model version's tag in MLflow, characters
TEMPLATE = "a prompt is `Question: …\\n\\nAnswer:`, without a space at its end"
DESCRIPTIONS = {
    "sft": f"Fine-tuned on questions and answers; {TEMPLATE}.",
    "reward": "Scores `Question: …\\n\\nAnswer: …` followed by the eos token; higher is better.",
    "policy": f"Aligned with the reward model by PPO; {TEMPLATE}.",
}


def run(params: Params, layout: Layout) -> StageResult:
    """The stage.

    Raises:
        ValueError: a model folder is missing or cannot be loaded.
    """
    with nullcontext() if tracking.active_run() else tracking.stage_run("register", {}, layout):
        client, prefix = tracking.connect(layout), params.register.prefix
        locked = _locked_md5s(layout)
        tags = {**git_tags(layout.root), **_lineage(locked), **_metric_tags(layout), **_param_tags(params)}
        found = {}
        for kind, stage in MODELS.items():
            folder = layout.artifact(stage, "model")
            if not (folder / "config.json").is_file():
                raise ValueError(f"artifacts/{stage}/model holds no model; `dvc repro {stage}` makes it")
            md5 = locked.get(f"artifacts/{stage}/model") or folder_md5(folder)
            found[f"{prefix}-{kind}"] = md5
            if version_of(client, f"{prefix}-{kind}", md5) is None:
                _log_version(layout, f"{prefix}-{kind}", kind, folder, {**tags, IDENTITY: md5})
        _log_pipeline(client, layout, locked)
        beats = _beats_sft(layout)
        _set_aliases(client, found, f"{prefix}-policy", beats)
    write_json(layout.artifact("register", "registered.json"), found)
    return StageResult({"models": float(len(found)), "beats_sft": float(beats)})


def missing(layout: Layout, prefix: str) -> bool:
    """Whether the registry has lost a model that registered.json names: DVC cannot see that."""
    path = layout.artifact("register", "registered.json")
    if not path.exists():
        return False
    client, found = tracking.connect(layout), json.loads(path.read_text(encoding="utf-8"))
    return any(version_of(client, f"{prefix}-{k}", found.get(f"{prefix}-{k}", "")) is None for k in MODELS)


def promote(layout: Layout, name: str, version: str) -> None:
    """Give `champion` to a version by hand; ValueError when there is no such version."""
    from mlflow.exceptions import MlflowException

    try:
        tracking.connect(layout).set_registered_model_alias(name, "champion", version)
    except MlflowException as error:
        raise ValueError(f"{name} {version}: {' '.join(str(error).split())}") from None


def version_of(client: MlflowClient, name: str, md5: str) -> str | None:
    """The newest version of `name` with these weights, or None."""
    found = client.search_model_versions(f"name = '{name}'")
    versions = [int(one.version) for one in found if one.tags.get(IDENTITY) == md5 and one.status == "READY"]
    return str(max(versions)) if versions else None


def folder_md5(folder: Path) -> str:
    """The md5 that DVC gives a folder: of the JSON list of its files' md5s and names."""
    files = {path.relative_to(folder).as_posix(): path for path in folder.rglob("*") if path.is_file()}
    listing = [{"md5": _md5(files[name]), "relpath": name} for name in sorted(files)]
    return hashlib.md5(json.dumps(listing).encode()).hexdigest() + ".dir"


def _md5(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "md5").hexdigest()


def _log_version(layout: Layout, name: str, kind: str, folder: Path, tags: Mapping[str, str]) -> None:
    with _offline(), _fluent(layout) as mlflow:
        from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

        is_reward = kind == "reward"
        auto = AutoModelForSequenceClassification if is_reward else AutoModelForCausalLM
        model, tokenizer = auto.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
        logged = mlflow.transformers.log_model(
            {"model": model.eval(), "tokenizer": tokenizer},
            name=kind,
            task="text-classification" if is_reward else "text-generation",
            # the score as it is; transformers would squeeze it through a sigmoid
            model_config={"function_to_apply": "none"} if is_reward else None,
            pip_requirements=[f"{p}=={metadata.version(p).split('+')[0]}" for p in ("torch", "transformers")],
            registered_model_name=name,
            tags={key: value[:LONGEST_VALUE] for key, value in tags.items()},
        )
        version = str(logged.registered_model_version)
        mlflow.MlflowClient().update_model_version(name, version, DESCRIPTIONS[kind])


def _log_pipeline(client: MlflowClient, layout: Layout, locked: Mapping[str, str]) -> None:
    """What brings everything back, params.yaml, dvc.yaml and dvc.lock, and the data as MLflow's datasets."""
    from mlflow.data.meta_dataset import MetaDataset
    from mlflow.data.sources import LocalArtifactDatasetSource
    from mlflow.entities import DatasetInput, InputTag

    for name in tracking.PIPELINE_FILES:
        if (layout.root / name).exists():
            tracking.log_artifact(layout.root / name)
    inputs = []
    for path, md5 in _lineage(locked).items():
        source = LocalArtifactDatasetSource(str(layout.root / path.removeprefix("dvc.")))
        dataset = MetaDataset(source, name=Path(path).name, digest=md5)
        inputs.append(DatasetInput(dataset._to_mlflow_entity(), [InputTag("mlflow.data.context", "lineage")]))
    client.log_inputs(tracking.active_run(), inputs)


def _set_aliases(client: MlflowClient, found: Mapping[str, str], policy: str, beats: bool) -> None:
    is_first = beats and "champion" not in client.get_registered_model(policy).aliases
    for name, md5 in found.items():
        version = version_of(client, name, md5)
        for alias in ("candidate", "champion") if is_first else ("candidate",):
            client.set_registered_model_alias(name, alias, version)


def _locked_md5s(layout: Layout) -> dict[str, str]:
    """Path -> md5 of every out in dvc.lock; empty outside DVC."""
    outs = (out for stage in layout.locked().values() for out in stage.get("outs", []))
    return {out["path"]: out["md5"] for out in outs if "md5" in out}


def _lineage(locked: Mapping[str, str]) -> dict[str, str]:
    """Tags of the data and the tokenizer behind the models."""
    places = tuple(f"artifacts/{stage}/" for stage in LINEAGE)
    return {f"dvc.{path}": md5 for path, md5 in locked.items() if path.startswith(places)}


def _metrics(layout: Layout, stage: str) -> dict[str, float]:
    path = layout.artifact(stage, "metrics.json")
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}


def _metric_tags(layout: Layout) -> dict[str, str]:
    found = {stage: _metrics(layout, stage) for stage in JUDGES}
    return {f"{stage}.{name}": json.dumps(value) for stage in JUDGES for name, value in found[stage].items()}


def _beats_sft(layout: Layout) -> bool:
    """Whether the lower end of the paired interval of the win rate lies above even."""
    return _metrics(layout, "policy_eval").get("win_rate_low", 0.0) > EVEN


def _param_tags(params: Params) -> dict[str, str]:
    def leaves(values: Mapping[str, Any], prefix: str) -> Iterator[tuple[str, str]]:
        for key, value in values.items():
            if isinstance(value, Mapping):
                yield from leaves(value, f"{prefix}.{key}")
            else:
                yield f"{prefix}.{key}", value if isinstance(value, str) else json.dumps(value)

    return dict(leaves(params.model_dump(mode="json"), "params"))


@contextmanager
def _offline() -> Iterator[None]:
    """No look-ups on the Hub: MLflow asks it for a model card and a licence, 47 seconds without a network."""
    from huggingface_hub import constants

    logging.getLogger("mlflow.transformers").setLevel(logging.ERROR)  # it warns that it found neither
    before, constants.HF_HUB_OFFLINE = constants.HF_HUB_OFFLINE, True
    try:
        yield
    finally:
        constants.HF_HUB_OFFLINE = before


@contextmanager
def _fluent(layout: Layout) -> Iterator[Any]:
    """MLflow's module with our store and the stage's run active, for `log_model`, which knows no client."""
    import mlflow

    before = mlflow.get_tracking_uri(), mlflow.get_registry_uri(), os.environ.get("MLFLOW_TRACKING_URI")
    uri = tracking.tracking_uri(layout)
    mlflow.set_tracking_uri(uri)
    mlflow.set_registry_uri(uri)
    try:
        with mlflow.start_run(run_id=tracking.active_run()):
            yield mlflow
    finally:
        mlflow.set_tracking_uri(before[0])
        mlflow.set_registry_uri(before[1])
        os.environ.pop("MLFLOW_TRACKING_URI", None)
        if before[2] is not None:
            os.environ["MLFLOW_TRACKING_URI"] = before[2]


def main(arguments: list[str] | None = None) -> int:
    """`promote NAME VERSION`; the exit status."""
    parser = argparse.ArgumentParser(prog="python -m tasks.register", description=__doc__)
    parser.add_argument("action", choices=["promote"])
    parser.add_argument("name", help="registered model, e.g. stackrl-policy")
    parser.add_argument("version")
    options = parser.parse_args(arguments)
    try:
        promote(Layout.here(), options.name, options.version)
    except (ValueError, OSError) as error:
        print(f"stackrl: {error}", file=sys.stderr)
        return 1
    print(f"stackrl: champion of {options.name} is version {options.version}")
    return 0


if __name__ == "__main__":
    sys.exit(main())

"""Where statistics go: accelerate's Accelerator and its trackers, made of PPOConfig as TRL makes them.

Every tracker of accelerate is started with the trainer but MLflow's: statistics go to the run that is open,
of a stage or of the script, and only where none is does accelerate open one, at the first `log_stats`.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.tracking import LOGGER_TYPE_TO_CLASS, GeneralTracker, MLflowTracker
from accelerate.utils import LoggerType, ProjectConfiguration

from tasks.ppo.config import PPOConfig
from tasks.run.tracking import check_tracker, has_open_run, track

# Of Accelerator's arguments: what PPOTrainer follows. It prepares a data loader and gathers numbers with it,
# but takes forwards, precision and accumulation into its own hands.
FOLLOWED = {"cpu", "rng_types", "dataloader_config", "kwargs_handlers", "device_placement"}
INSTEAD = {
    "log_with": "ppo.log_with", "project_config": "ppo.project_kwargs", "project_dir": "ppo.project_kwargs",
    "mixed_precision": "ppo.dtype", "gradient_accumulation_steps": "ppo.gradient_accumulation_steps",
}  # fmt: skip


def make_accelerator(config: PPOConfig, on_cpu: bool) -> Accelerator:
    """As `accelerator_kwargs`, `project_kwargs` and `log_with` say.

    Raises:
        ValueError: an argument that Accelerator has not, that says what another key says, or that changes
            nothing here; a tracker that is unknown, not installed, or has no folder to write to.
    """
    given, known = config.accelerator_kwargs, inspect.signature(Accelerator.__init__).parameters
    for name, value in given.items():
        if name not in known or name == "self":
            raise ValueError(f"ppo.accelerator_kwargs: accelerate's Accelerator has no argument {name}")
        hint = f"; {INSTEAD[name]} is what says it" if name in INSTEAD else ""
        if name not in FOLLOWED and (hint or value != known[name].default):
            raise ValueError(f"ppo.accelerator_kwargs: {name}={value!r:.40} would change nothing here{hint}")
    names = tracker_names(config.log_with)
    for name in names:
        if name in LoggerType.list() and name != "all":
            check_tracker(name)
    try:
        project = ProjectConfiguration(**config.project_kwargs)
    except TypeError as error:
        raise ValueError(f"ppo.project_kwargs: {error}") from None
    started = [each for each in names if each != "mlflow"]
    for name in started:
        kind = LOGGER_TYPE_TO_CLASS.get(str(name))
        if kind and kind.requires_logging_directory and not (project.logging_dir or project.project_dir):
            raise ValueError(
                f'ppo.project_kwargs: log_with="{name}" needs a folder, as {{"logging_dir": "logs"}}'
            )
    keys = {**given, "cpu": given.get("cpu", False) or on_cpu}
    return Accelerator(log_with=started or None, project_config=project, **keys)


def tracker_names(log_with: Any) -> list[str | GeneralTracker]:
    """What `log_with` names: trackers by name, or objects of accelerate's GeneralTracker.

    Raises:
        ValueError: no tracker of accelerate.
    """
    each = log_with if isinstance(log_with, list | tuple) else [] if log_with is None else [log_with]
    each = [one.value if isinstance(one, LoggerType) else one for one in each]
    known = {*map(str, LOGGER_TYPE_TO_CLASS), "all"}
    for one in each:
        if not isinstance(one, GeneralTracker) and one not in known:
            raise ValueError(f"ppo.log_with: {one!r:.40} is none of {', '.join(sorted(known))}")
    return each


def start_trackers(accelerator: Accelerator, config: PPOConfig) -> None:
    """Open every tracker but MLflow's and tell it the configuration, flat for TensorBoard, as TRL does."""
    if accelerator.log_with:
        is_flat = any(str(each) == "tensorboard" for each in accelerator.log_with)
        told = _told(config) if is_flat else {"trl_ppo_trainer_config": _told(config)}
        accelerator.init_trackers(config.tracker_project_name, told, config.tracker_kwargs)


def send(
    accelerator: Accelerator,
    config: PPOConfig,
    stats: Mapping[str, Any],
    step: int,
    columns: Sequence[str],
    rows: Sequence[Sequence[Any]],
) -> None:
    """Statistics to every tracker, from the main process: numbers to all, arrays and the table to wandb.

    Args:
        accelerator: with its trackers.
        config: says whether MLflow is one.
        stats: by name.
        step: updates so far; wandb counts calls itself.
        columns: of the table.
        rows: of the table.
    """
    numbers = {name: number for name, value in stats.items() if (number := _number(value)) is not None}
    for tracker in accelerator.trackers:
        if tracker.name == "wandb":
            tracker.log({**stats, **_table(columns, rows)}, step=None)
        elif tracker.name != "mlflow":
            tracker.log(numbers, step=step)
    if "mlflow" in tracker_names(config.log_with):
        if not has_open_run():
            keys = config.tracker_kwargs.get("mlflow", {})
            tracker = MLflowTracker(config.tracker_project_name, accelerator.logging_dir, **keys)
            tracker.start()
            tracker.store_init_configuration(_told(config))
            accelerator.trackers.append(tracker)  # for accelerator.end_training()
        track(numbers, step)


def wants_table(accelerator: Accelerator) -> bool:
    """Whether a tracker shows texts."""
    return any(tracker.name == "wandb" for tracker in accelerator.trackers)


def _table(columns: Sequence[str], rows: Sequence[Sequence[Any]]) -> dict[str, Any]:
    import wandb

    return {"game_log": wandb.Table(columns=list(columns), rows=[list(row) for row in rows])} if rows else {}


def _number(value: Any) -> float | None:
    if isinstance(value, torch.Tensor) and value.numel() == 1:
        return value.item()
    return float(value) if isinstance(value, int | float) else None


def _told(config: PPOConfig) -> dict[str, Any]:
    plain = bool, int, float, str, type(None)
    return {name: v if isinstance(v, plain) else str(v) for name, v in config.to_dict().items()}

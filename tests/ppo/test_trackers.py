"""Where statistics go: accelerate's trackers, under TRL's names."""

from __future__ import annotations

import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from accelerate.tracking import GeneralTracker
from made_trainers import batch, trainer


class Noted(GeneralTracker):
    """Keeps what it is told."""

    requires_logging_directory = False

    def __init__(self, name: str = "noted") -> None:
        self.own, self.told, self.settings = name, [], None
        super().__init__()

    @property
    def name(self):
        return self.own

    @property
    def tracker(self):
        return self

    def start(self):
        pass

    def store_init_configuration(self, values):
        self.settings = values

    def log(self, values, step=None, **keys):
        self.told.append((values, step))


ROWS = {"query": ["a"] * 8, "response": ["b"] * 8}


def test_a_tracker_object_gets_numbers_with_trls_names():
    tracker = Noted()
    made = trainer(log_with=tracker, model_name="mine")
    assert tracker.settings["trl_ppo_trainer_config"]["model_name"] == "mine"
    stats = made.step(*batch())
    made.log_stats(stats, ROWS, [torch.tensor(float(n)) for n in range(8)])
    values, step = tracker.told[0]
    assert step == made.current_step == 1 and values["objective/kl"] == stats["objective/kl"]
    assert values["env/reward_mean"] == 3.5 and values["env/reward_std"] == pytest.approx(6**0.5)
    assert all(isinstance(value, float) for value in values.values())
    assert {
        "ppo/loss/policy",
        "ppo/val/vpred",
        "time/ppo/total",
        "tokens/responses_len_mean",
    } <= values.keys()
    made.log_stats(stats, {}, torch.zeros(8))
    trainer().log_stats(stats, {}, torch.zeros(8))  # none by default


def test_wandb_gets_arrays_and_the_texts(monkeypatch):
    shown = SimpleNamespace(Table=lambda columns, rows: (columns, rows))
    monkeypatch.setitem(sys.modules, "wandb", shown)
    tracker = Noted("wandb")
    made = trainer(log_with=[tracker])
    stats = made.step(*batch())
    made.log_stats(stats, ROWS, torch.arange(8.0))
    values, step = tracker.told[0]
    assert step is None and isinstance(values["objective/kl_dist"], np.ndarray)
    columns, rows = values["game_log"]
    assert columns == ["query", "response", "reward"] and rows[3] == ["a", "b", 3.0]
    with pytest.raises(ValueError, match="columns_to_log: the batch has no response; it has query"):
        made.log_stats(stats, {"query": []}, torch.zeros(8))


def test_tensorboard_really_gets_them(tmp_path):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    keys = {"project_kwargs": {"logging_dir": str(tmp_path)}, "tracker_project_name": "mine"}
    made = trainer(log_with="tensorboard", **keys)
    for number in range(2):
        made.log_stats(made.step(*batch(seed=number)), ROWS, torch.ones(8))
    made.accelerator.end_training()
    found = EventAccumulator(str(tmp_path / "mine")).Reload()
    assert [event.step for event in found.Scalars("env/reward_mean")] == [1, 2]
    assert "ppo/loss/policy" in found.Tags()["scalars"]


def test_mlflow_opens_a_run_of_its_own_where_none_is(tmp_path, monkeypatch):
    mlflow = pytest.importorskip("mlflow")
    store = f"sqlite:///{tmp_path}/m.db"
    monkeypatch.setenv("MLFLOW_TRACKING_URI", store)
    mlflow.set_tracking_uri(store)
    keys = {"tracker_kwargs": {"mlflow": {"run_name": "first"}}, "tracker_project_name": "mine"}
    made = trainer(log_with="mlflow", **keys)
    assert mlflow.active_run() is None
    made.log_stats(made.step(*batch()), ROWS, torch.ones(8))
    made.accelerator.end_training()
    mlflow.set_tracking_uri(None)
    client = mlflow.MlflowClient(store)
    run = client.search_runs([client.get_experiment_by_name("mine").experiment_id])[0]
    assert run.info.run_name == "first" and run.info.status == "FINISHED"
    assert run.data.metrics["env/reward_mean"] == 1 and run.data.params["learning_rate"] == "0.01"


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"log_with": "wandb"}, "log_with is wandb, which is not installed"),
        ({"log_with": ["comet_ml"]}, "log_with is comet_ml, which is not installed"),
        ({"log_with": "paper"}, r"ppo\.log_with: 'paper' is none of aim, all, "),
        ({"log_with": 3}, r"ppo\.log_with: 3 is none of"),
        ({"project_kwargs": {"folder": "x"}}, r"ppo\.project_kwargs: .*folder"),
        (
            {"accelerator_kwargs": {"cpus": 1}},
            r"ppo\.accelerator_kwargs: accelerate's Accelerator has no argument",
        ),
        (
            {"accelerator_kwargs": {"mixed_precision": "bf16"}},
            r"mixed_precision='bf16' .*ppo\.dtype is what says",
        ),
        ({"accelerator_kwargs": {"log_with": "all"}}, r"log_with='all' .*ppo\.log_with is what says it"),
        ({"accelerator_kwargs": {"step_scheduler_with_optimizer": False}}, "would change nothing here"),
    ],
)
def test_what_is_refused(keys, message, monkeypatch):
    monkeypatch.setattr("tasks.run.tracking.find_spec", lambda name: None)
    with pytest.raises(ValueError, match=message) as caught:
        trainer(**keys)
    assert "\n" not in str(caught.value)


def test_tensorboard_needs_a_folder(monkeypatch):
    monkeypatch.setattr("tasks.run.tracking.find_spec", lambda name: name)
    with pytest.raises(ValueError, match=r'project_kwargs: log_with="tensorboard" needs a folder'):
        trainer(log_with="tensorboard")


def test_what_accelerate_is_told_and_follows():
    made = trainer(accelerator_kwargs={"rng_types": ["torch"], "step_scheduler_with_optimizer": True})
    assert made.accelerator.rng_types == ["torch"] and made.accelerator.device.type == "cpu"

"""What the tracker sees of a Trainer."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

from tasks.training import callback as follow
from tasks.training.callback import Follow


@pytest.fixture
def logged(monkeypatch):
    found = []
    monkeypatch.setattr(follow, "log_metrics", lambda values, step=None: found.append((step, values)))
    return found


def state(step=7, most=20):
    return SimpleNamespace(global_step=step, max_steps=most)


def test_training_and_validation_have_names_of_their_own(logged):
    callback = Follow("reward", lambda: 0)
    callback.on_log(None, state(), None, logs={"loss": 0.5, "grad_norm": 2, "learning_rate": 1e-3})
    callback.on_log(None, state(8), None, logs={"eval_loss": 0.6, "eval_accuracy": 0.75, "epoch": 1.5})
    callback.on_log(None, state(9), None, logs={"train_loss": 9.0, "train_runtime": 3.0, "total_flos": 4.0})
    callback.on_log(None, state(9), None, logs=None)
    assert logged == [
        (7, {"reward/loss": 0.5, "reward/grad_norm": 2.0, "reward/learning_rate": 1e-3}),
        (8, {"reward/validation_loss": 0.6, "reward/validation_accuracy": 0.75, "reward/epoch": 1.5}),
        (9, {"reward/total_flos": 4.0}),
        (9, {}),
    ]


def test_words_are_not_metrics(logged):
    Follow("sft", lambda: 0).on_log(None, state(), None, logs={"note": "x", "loss": 1})
    assert logged == [(7, {"sft/loss": 1.0})]


def test_tokens_per_second_go_to_the_tracker_with_the_training_loss_alone(logged, monkeypatch, capsys):
    seen = iter([100, 160, 400])
    callback = Follow("sft", lambda: next(seen))
    now = [10.0]
    monkeypatch.setattr(follow.Progress.__init__.__globals__["time"], "monotonic", lambda: now[0])
    callback.on_train_begin(None, state(5), None)
    for step in (6, 20):
        now[0] += 15
        callback.on_step_end(None, state(step), None)
    callback.on_log(None, state(20), None, logs={"loss": 0.25})
    callback.on_log(None, state(20), None, logs={"eval_loss": 0.5})
    assert logged == [
        (20, {"sft/loss": 0.25, "sft/tokens_per_second": 10.0}),
        (20, {"sft/validation_loss": 0.5}),
    ]
    assert callback.progress.values == {"loss": 0.25} and callback.progress.first == 5
    lines = capsys.readouterr().err.splitlines()
    assert lines[0] == "sft 6/20 30 % · 4 tokens/s · 3:30 left" and lines[-1].startswith("sft 20/20 100 %")

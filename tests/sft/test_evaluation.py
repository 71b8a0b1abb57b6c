"""Held-out documents: what Trainer brings around them, and models that no forest serves."""

from __future__ import annotations

import math

import numpy as np
import pytest
import tiny
import torch
from huggingface_hub import HfApi
from test_sft import held_to_separate_documents, rows, separate
from test_sft import trainer as plain_trainer
from test_sft_models import ROWS, trainer, wide
from transformers import EarlyStoppingCallback, TrainerCallback

from tasks.sft import SFTConfig, SFTTrainer

HELD = [{"text": "It is 3."}, {"text": "What is 2 + 3? Who knows?"}]


class Seen(TrainerCallback):
    def __init__(self):
        self.metrics = []

    def on_evaluate(self, args, state, control, metrics=None, **_):
        self.metrics.append(metrics)


def test_several_datasets_and_rows_given_late(tmp_path):
    made = trainer(tmp_path, wide(), held={"a": HELD[:1], "b": HELD[1:]})
    found = made.evaluate()
    assert {"eval_a_loss", "eval_b_loss", "eval_a_perplexity", "eval_b_token_accuracy"} <= set(found)
    assert found["eval_a_loss"] == pytest.approx(made.evaluate(HELD[:1])["eval_loss"], rel=1e-6)
    both = made.evaluate({"c": HELD}, metric_key_prefix="late")["late_c_loss"]
    assert made.state.log_history[0]["eval_a_loss"] == found["eval_a_loss"]
    low, high = sorted((found["eval_a_loss"], found["eval_b_loss"]))
    assert low < both < high
    with pytest.raises(ValueError, match=r"^eval_dataset b, row 0: text: text is wanted"):
        made.evaluate({"b": [{"text": ""}]})
    with pytest.raises(ValueError, match=r"^evaluate: there is no eval_dataset"):
        trainer(tmp_path, wide()).evaluate()


def test_callbacks_see_an_evaluation_and_stop_early(tmp_path):
    """The learning rate is none at all: the first evaluation stays the best."""
    seen = Seen()
    made = trainer(
        tmp_path, wide(), held=HELD, eval_strategy="steps", eval_steps=1, max_steps=9, learning_rate=0.0,
        weight_decay=0.0, load_best_model_at_end=True, metric_for_best_model="eval_loss", save_steps=1,
    )  # fmt: skip
    made.add_callback(seen)
    made.add_callback(EarlyStoppingCallback(2))
    made.train()
    assert made.state.global_step == 3 and len(seen.metrics) == 3
    assert made.state.best_metric == pytest.approx(seen.metrics[0]["eval_loss"])


@torch.no_grad()
@pytest.mark.parametrize("size", [1, 3, 8])
def test_metrics_of_ones_own_and_predictions(tmp_path, size):
    """Whatever a batch holds: what is most probable after each prefix of each document."""
    some, model = rows(7), tiny.causal()
    guesses, tokens = [], []
    for row in some:
        for document in row.documents():
            if len(document) > 1:
                guesses += model(torch.tensor([document])).logits[0, :-1].argmax(-1).tolist()
                tokens += document[1:]
    made = plain_trainer(tmp_path, model=model, held=some, per_device_eval_batch_size=size)
    made.compute_metrics = lambda found: {"wrong": float((found.predictions != found.label_ids).mean())}
    metrics = made.evaluate()
    assert metrics["eval_wrong"] == pytest.approx(1 - metrics["eval_token_accuracy"])
    found = made.predict(some)
    assert np.array_equal(np.sort(found.label_ids), np.sort(tokens))
    assert np.array_equal(np.sort(found.predictions), np.sort(guesses))
    assert found.metrics["test_token_accuracy"] == metrics["eval_token_accuracy"]


@pytest.mark.parametrize("loss_on", ["all", "response"])
@pytest.mark.parametrize("kind", ["gptj", "bloom", "gemma2", "mamba"])
def test_a_model_no_forest_serves_sees_padded_rows(tmp_path, kind, loss_on):
    """The same loss and gradients as document by document, shared prompts and single tokens included."""
    some = rows(4)
    (prompt,) = tiny.drawn((4,), 7)
    texts = [[*prompt, *tail] for tail in tiny.drawn((3, 1, 6), 8)]
    shared = type(some[0])(tuple(t for text in texts for t in text), tuple(map(len, texts)), (4,) * 3)
    made = held_to_separate_documents(tmp_path, kind, loss_on, [*some, shared])
    plain = tiny.causal(kind, **tiny.NO_DROPOUT)
    with torch.no_grad():
        total, count, right = separate(plain, some, loss_on)
    metrics = made.evaluate(some)
    assert metrics["eval_loss"] == pytest.approx(float(total) / count, rel=1e-5)
    assert metrics["eval_token_accuracy"] == pytest.approx(right / count)
    assert metrics["eval_perplexity"] == pytest.approx(math.exp(float(total) / count), rel=1e-4)


def test_push_to_hub_uploads_a_plain_folder(tmp_path, monkeypatch):
    pushed = {}
    monkeypatch.setattr(HfApi, "create_repo", lambda self, name, **_: type("Repo", (), {"repo_id": name}))
    monkeypatch.setattr(HfApi, "upload_folder", lambda self, **keys: pushed.update(keys))
    config = SFTConfig(str(tmp_path), use_cpu=True, max_steps=1, hub_model_id="someone/tuned")
    made = SFTTrainer(wide(), config, ROWS, processing_class=tiny.tokenizer())
    made.train()
    made.push_to_hub()
    assert pushed["repo_id"] == "someone/tuned" and pushed["folder_path"] == str(tmp_path)
    names = {path.name for path in tmp_path.iterdir()}
    assert {"config.json", "model.safetensors", "tokenizer.json", "README.md"} <= names
    assert not list(tmp_path.rglob("*.bin"))

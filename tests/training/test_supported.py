"""Each field of TrainingArguments and each argument of Trainer is honoured, refused, or listed."""

from __future__ import annotations

import dataclasses
import inspect
from pathlib import Path

import pytest
import tiny
import torch
from torch.optim import SGD
from transformers import Trainer, TrainerCallback, TrainingArguments

from tasks.reward import RewardConfig, RewardTrainer
from tasks.sft import SFTConfig, SFTTrainer
from tasks.training.supported import HONOURED, HOOKS_HONOURED, HOOKS_REFUSED, REFUSED, WITHOUT_EFFECT

PAGE = (Path(__file__).parents[2] / "docs" / "trainers.md").read_text(encoding="utf-8")
FIELDS = {field.name: field for field in dataclasses.fields(TrainingArguments)}
HOOKS = set(inspect.signature(Trainer.__init__).parameters) - {"self"}
VALUES = {  # other than the default, where True would be no value
    "label_smoothing_factor": 0.1, "torch_compile_backend": "eager", "torch_compile_mode": "default",
    "liger_kernel_config": {"rope": True}, "neftune_noise_alpha": 5.0, "eval_do_concat_batches": False,
    "include_for_metrics": ["inputs"], "hub_strategy": "end", "accelerator_config": {"split_batches": True},
    "label_names": ["labels"], "length_column_name": "size", "debug": "underflow_overflow",
    "skip_memory_metrics": False, "parallelism_config": object(),
}  # fmt: skip
IDS = [{"input_ids": [5 + i, 6, 7, 8 + i, 1]} for i in range(8)]
PAIRS = [{"chosen_ids": [5, 6, 7 + i, 1], "rejected_ids": [5, 6, 9 + i, 3, 1]} for i in range(8)]
QUIET = {"use_cpu": True, "save_strategy": "no", "disable_tqdm": True, "seed": 3}
KINDS = {
    "sft": (SFTConfig, SFTTrainer, tiny.causal, IDS),
    "reward": (RewardConfig, RewardTrainer, tiny.scorer, PAIRS),
}


def made(kind: str, folder, keys=None, **arguments):
    config, trainer, model, rows = KINDS[kind]
    short = {"row_tokens": 2} if kind == "sft" else {}
    settings = {"per_device_train_batch_size": 2, "max_steps": 3, **QUIET, **short, **arguments}
    return trainer(model(), config(str(folder), **settings), rows, **keys or {})


def weights(trainer) -> torch.Tensor:
    return torch.cat([p.detach().flatten() for p in trainer.model.parameters()])


def test_nothing_is_missing_and_nothing_stands_twice():
    lists = (set(HONOURED), set(REFUSED), set(WITHOUT_EFFECT))
    assert FIELDS.keys() == set.union(*lists) & FIELDS.keys()
    assert sum(map(len, lists)) == len(set.union(*lists))
    # until 5.21 the two had other names
    assert set.union(*lists) - FIELDS.keys() <= {
        "activation_checkpointing", "activation_checkpointing_kwargs",
        "gradient_checkpointing", "gradient_checkpointing_kwargs",
    }  # fmt: skip
    assert (
        HOOKS == (HOOKS_HONOURED | HOOKS_REFUSED.keys()) & HOOKS and not HOOKS_HONOURED & HOOKS_REFUSED.keys()
    )


@pytest.mark.parametrize("name", [*REFUSED, *WITHOUT_EFFECT, *HOOKS_REFUSED])
def test_the_page_says_so(name):
    assert f"`{name}`" in PAGE


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", REFUSED)
def test_a_field_that_nothing_follows_is_refused(kind, name, tmp_path):
    if name not in FIELDS:
        pytest.skip("of another transformers")
    with pytest.raises(ValueError, match=f"^{name}: .{{10}}") as error:
        KINDS[kind][0](str(tmp_path), **{**QUIET, name: VALUES.get(name, True)})
    assert "\n" not in str(error.value)


def test_what_is_written_later_is_refused_too(tmp_path):
    config = SFTConfig(str(tmp_path), **QUIET)
    config.fp16 = True
    with pytest.raises(ValueError, match=r"^fp16: losses are not scaled here"):
        SFTTrainer(tiny.causal(), config, IDS)


def test_a_field_that_nobody_knows_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr("tasks.training.supported.HONOURED", HONOURED - {"max_grad_norm"})
    with pytest.raises(ValueError, match=r"^max_grad_norm: it is not known here"):
        SFTConfig(str(tmp_path), max_grad_norm=2.0, **QUIET)
    SFTConfig(str(tmp_path), **QUIET)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", HOOKS_REFUSED)
def test_a_hook_that_nothing_calls_is_refused(kind, name, tmp_path):
    message = f"{name}: .{{10}}"
    with pytest.raises(ValueError, match=message):
        made(kind, tmp_path, {name: lambda *given: None})
    made(kind, tmp_path, {name: None})


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    "changed",
    [
        {"learning_rate": 1e-3}, {"weight_decay": 0.5}, {"optim": "sgd"}, {"optim": "adafactor"},
        {"adam_beta1": 0.1}, {"adam_beta2": 0.1}, {"adam_epsilon": 1e-2}, {"max_grad_norm": 1e-3},
        {"optim": "sgd", "optim_args": "momentum=0.9"}, {"lr_scheduler_type": "constant"}, 
        {"warmup_steps": 2},
        {"lr_scheduler_type": "polynomial", "lr_scheduler_kwargs": {"power": 3.0}}, {"max_steps": 2},
        {"max_steps": -1, "num_train_epochs": 2}, {"per_device_train_batch_size": 3},
        {"gradient_accumulation_steps": 2}, {"seed": 4}, {"data_seed": 9}, {"bf16": True},
        {"train_sampling_strategy": "sequential"}, {"optimizer": "muon"}, {"optimizer": "adamw"},
    ],
    ids=str,
)  # fmt: skip
def test_what_is_honoured_changes_the_weights(kind, changed, tmp_path):
    found = []
    for arguments in ({}, changed):
        trainer = made(
            kind,
            tmp_path,
            weight_decay=arguments.get("weight_decay", 0.1),
            learning_rate=arguments.get("learning_rate", 1e-2),
            **{k: v for k, v in arguments.items() if k not in ("weight_decay", "learning_rate")},
        )
        trainer.train()
        found.append(weights(trainer))
    assert not torch.equal(*found)


def test_the_library_has_transformers_betas_and_the_pipeline_its_own(tmp_path):
    group = made("sft", tmp_path).create_optimizer().param_groups[0]
    assert (group["betas"], group["eps"]) == ((0.9, 0.999), 1e-8)
    group = (
        made("sft", tmp_path, optimizer="adamw", adam_beta2=0.5, adam_epsilon=1e-3)
        .create_optimizer()
        .param_groups[0]
    )
    assert (group["betas"], group["eps"]) == ((0.9, 0.5), 1e-3)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"optimizer": "muon", "optim": "sgd"}, "optimizer is 'muon' and optim 'sgd'; set one of them"),
        ({"optimizer": "sgd", "adam_beta1": 0.5}, "adam_beta1: optimizer sgd has none"),
        ({"optimizer": "adamw", "optim_args": "a=1"}, "optim_args: optimizer adamw has none"),
        ({"optim": "sgd", "adam_beta1": 0.5}, "adam_beta1: optim sgd has none"),
        ({"optim": "adamw_torch", "optim_args": "momentum=0.5"}, "optim_args: optim adamw_torch has none"),
        ({"optim_target_modules": "all-linear"}, "optim_target_modules: optim adamw_torch_fused has none"),
        ({"optim": "adamw_torch", "optim_args": "betas=(0.8,0.99)"}, "name=value,name=value is wanted"),
        ({"optim": "lomo"}, "optim lomo: it steps inside backward"),
        ({"optim": "adamw_torch_xla"}, "optim adamw_torch_xla: "),
        ({"max_steps": 0}, "max_steps: 0 trains nothing"),
        ({"max_steps": -1, "num_train_epochs": 0}, "num_train_epochs: 0 trains nothing"),
        ({"train_sampling_strategy": "group_by_length"}, "train_sampling_strategy is random or sequential"),
        ({"per_device_train_batch_size": 9, "dataloader_drop_last": True}, "drop_last: 8 .* batch of 9"),
    ],
)  # fmt: skip
@pytest.mark.parametrize("kind", KINDS)
def test_what_would_be_ignored_is_refused(kind, arguments, message, tmp_path):
    with pytest.raises(ValueError, match=message) as error:
        made(kind, tmp_path, **arguments).train()
    assert "\n" not in str(error.value)


def test_an_optimizer_of_ones_own(tmp_path):
    trainer = made("sft", tmp_path, {"optimizer_cls_and_kwargs": (SGD, {"lr": 0.25})})
    assert trainer.create_optimizer().param_groups[0]["lr"] == 0.25
    model = tiny.causal()
    own = SGD(model.parameters(), lr=0.5)
    trainer = SFTTrainer(model, SFTConfig(str(tmp_path), max_steps=1, **QUIET), IDS, optimizers=(own, None))
    assert trainer.create_optimizer() is own
    for keys in ({"optimizer_cls_and_kwargs": (SGD, {"lr": 0.25})}, {"optimizers": (own, None)}):
        with pytest.raises(ValueError, match="optimizer is 'adamw' already; set one of the two"):
            made("sft", tmp_path, keys, optimizer="adamw")


@pytest.mark.parametrize("kind", KINDS)
def test_other_arguments_and_none(kind, tmp_path):
    config, trainer, model, rows = KINDS[kind]
    plain = TrainingArguments(str(tmp_path), use_cpu=True, learning_rate=0.5, report_to="none")
    own = trainer(model(), plain, rows)
    assert isinstance(own.args, config) and own.args.learning_rate == 0.5
    plain.fp16, plain.include_num_input_tokens_seen = False, "all"
    with pytest.raises(ValueError, match=r"^include_num_input_tokens_seen: "):
        trainer(model(), plain, rows)
    again = dataclasses.replace(own.args, seed=7)
    assert again.seed == 7 and config(**again.to_dict()).learning_rate == 0.5
    with pytest.raises(TypeError, match=f"args is a {config.__name__}, not str"):
        trainer(model(), "folder", rows)
    with pytest.raises(ValueError, match="model is wanted"):
        trainer(args=own.args, train_dataset=rows)
    with pytest.raises(TypeError, match="no argument 'modle'"):
        trainer(model(), own.args, rows, modle=1)


@pytest.mark.parametrize("kind", KINDS)
def test_evaluation_without_training_rows(kind, tmp_path):
    config, trainer, model, rows = KINDS[kind]
    own = trainer(model(), config(str(tmp_path), **QUIET), eval_dataset=rows)
    assert own.evaluate() == own.evaluate(rows)
    assert own.predict(rows).metrics["test_loss"] == own.evaluate()["eval_loss"]
    for method in (own.train, own.merged):
        with pytest.raises(ValueError, match="there is no"):
            method()


@pytest.mark.parametrize(("kind", "unit"), [("sft", "packed rows"), ("reward", "questions or rows")])
def test_a_short_run_shows_each_step_and_its_unit(kind, unit, tmp_path, capsys):
    trainer = made(kind, tmp_path, max_steps=5)
    trainer.train()
    assert [line["step"] for line in trainer.state.log_history if "loss" in line] == [1, 2, 3, 4, 5]
    said = capsys.readouterr().err
    assert f"a batch is 2 of 8 {unit}" in said and "an epoch has 4 steps, the training 5" in said
    if kind == "reward":
        lines = [line for line in trainer.state.log_history if "loss" in line]
        assert all(0 <= line["accuracy"] <= 1 and isinstance(line["margin"], float) for line in lines)


def test_what_is_not_logged_yet_is_resumed(tmp_path):
    """The accuracy of a line is of all its steps, also where a checkpoint lies between them."""
    whole = made("reward", tmp_path / "a", max_steps=6, logging_steps=3, save_strategy="steps", save_steps=2)
    whole.train()
    first = made("reward", tmp_path / "b", max_steps=6, logging_steps=3, save_strategy="steps", save_steps=2)
    first.add_callback(StopAt(2))
    first.train()
    second = made("reward", tmp_path / "b", max_steps=6, logging_steps=3, save_strategy="steps", save_steps=2)
    second.resume()
    lines = [[line for line in t.state.log_history if "loss" in line] for t in (whole, second)]
    assert lines[0] == lines[1] and len(lines[0]) == 2


class StopAt(TrainerCallback):
    def __init__(self, step):
        self.step = step

    def on_step_end(self, args, state, control, **_):
        control.should_training_stop = state.global_step == self.step

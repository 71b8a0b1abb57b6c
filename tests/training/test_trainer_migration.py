"""docs/migrating-from-trl.md: each row of its SFT and reward tables is tried, no name is missing."""

from __future__ import annotations

import re
from copy import deepcopy
from pathlib import Path

import pytest
import tiny
import torch

from tasks.reward import RewardConfig, RewardTrainer
from tasks.sft import SFTConfig, SFTTrainer

PAGE = Path(__file__).parents[2] / "docs" / "migrating-from-trl.md"
OF_BOTH = "model_init_kwargs trust_remote_code chat_template_path dataset_num_proc eos_token max_length pad_to_multiple_of activation_offloading pad_token learning_rate".split()  # noqa: E501
OF_SFT = "router_aux_loss_coef dataset_text_field dataset_kwargs truncation_mode shuffle_dataset packing packing_strategy padding_free eval_packing completion_only_loss assistant_only_loss loss_type".split()  # noqa: E501
OF_REWARD = ["disable_dropout", "center_rewards_coefficient"]
OF_TRAINERS = "model args data_collator train_dataset eval_dataset processing_class compute_loss_func compute_metrics callbacks optimizers optimizer_cls_and_kwargs preprocess_logits_for_metrics quantization_config peft_config".split()  # noqa: E501
QUIET = {"use_cpu": True, "save_strategy": "no", "disable_tqdm": True, "max_steps": 1}
CHAT = "{% for m in messages %}{{ m['role'] + m['content'] + eos_token }}{% endfor %}"
PARTS = {"SFT": (SFTConfig, SFTTrainer, tiny.causal), "Reward": (RewardConfig, RewardTrainer, tiny.scorer)}


def table(part: str, title: str) -> list[tuple[str, str, str, str]]:
    """Of a section: (part, what is written, word, what is said of it)."""
    section = PAGE.read_text(encoding="utf-8").split(f"## {part}: {title}\n")[1].split("\n## ")[0]
    rows = re.findall(r"^\| `([^|]+)` \| (\w+) \| ?(.*?) ?\|$", section, flags=re.MULTILINE)
    assert len(rows) == section.count("\n| `") and len({name for name, *_ in rows}) == len(rows)
    return [(part, *row) for row in rows]


FIELDS = table("SFT", "fields of `SFTConfig`") + table("Reward", "fields of `RewardConfig`")
ARGUMENTS = table("SFT", "arguments of `SFTTrainer`") + table("Reward", "arguments of `RewardTrainer`")
ROWS = table("SFT", "rows") + table("Reward", "rows")


def test_no_name_of_trls_is_missing():
    for part, own in (("SFT", OF_SFT), ("Reward", OF_REWARD)):
        fields = {written.split("=")[0] for of, written, *_ in FIELDS if of == part}
        assert {*OF_BOTH, *own} <= fields
        assert set(OF_TRAINERS) <= {written for of, written, *_ in ARGUMENTS if of == part}


@pytest.mark.parametrize(("part", "written", "word", "text"), FIELDS)
def test_a_field(part, written, word, text, tmp_path, caplog):
    config, name = PARTS[part][0], written.split("=")[0]
    keys = eval(f"dict({written})")
    if word == "refused":
        with pytest.raises((TypeError, ValueError), match=rf"\b{name}\b.*: .{{10}}") as error:
            config(str(tmp_path), **QUIET, **keys)
        assert "\n" not in str(error.value)
        return
    made = config(str(tmp_path), **QUIET, **keys)
    assert (f"{name} has no effect: " in caplog.text) is (word == "unused")
    if setting := re.match(r"`(\w+)=([^`]+)`", text):
        assert getattr(made, setting[1]) == eval(setting[2])


def given(part: str) -> dict:
    """A value of each argument."""
    model = PARTS[part][2](vocab_size=330)
    return {
        "model": model, "args": None, "train_dataset": None, "eval_dataset": None,
        "processing_class": tiny.tokenizer(), "tokenizer": tiny.tokenizer(), "callbacks": [],
        "compute_metrics": lambda found: {}, "optimizers": (torch.optim.SGD(model.parameters(), 1.0), None),
        "optimizer_cls_and_kwargs": (torch.optim.SGD, {"lr": 1.0}), "formatting_func": str,
        "peft_config": {"r": 2, "target_modules": "all-linear"},
    }  # fmt: skip


@pytest.mark.parametrize(("part", "name", "word", "text"), ARGUMENTS)
def test_an_argument(part, name, word, text, tmp_path):
    config, trainer, _ = PARTS[part]
    values = given(part)
    keys = {"model": values["model"], "args": config(str(tmp_path), **QUIET), name: values.get(name, 5)}
    if name == "args":
        keys["args"] = config(str(tmp_path), **QUIET)
    if word == "refused":
        with pytest.raises((TypeError, ValueError), match=name):
            trainer(**keys)
    else:
        trainer(**keys)


@pytest.mark.parametrize(("part", "row", "word", "text"), ROWS)
def test_a_row(part, row, word, text, tmp_path):
    config, trainer, model = PARTS[part]
    tokenizer = deepcopy(tiny.tokenizer())
    tokenizer.chat_template = CHAT
    own = {"loss_on": "response"} if part == "SFT" else {}
    takes = word == "same"
    rows = [eval(row)]
    keys = {"model": model(vocab_size=330), "processing_class": tokenizer, "train_dataset": rows}
    if takes:
        trainer(args=config(str(tmp_path), **QUIET, **own), **keys)
        return
    with pytest.raises(ValueError, match=r"^train_dataset, row 0: "):
        trainer(args=config(str(tmp_path), **QUIET, **own), **keys)


def test_both_names_at_once(tmp_path):
    with pytest.raises(TypeError, match="assistant_only_loss is assistant_only here, and both are given"):
        SFTConfig(str(tmp_path), assistant_only=True, assistant_only_loss=True)
    with pytest.raises(TypeError, match="tokenizer is processing_class here, and both are given"):
        SFTTrainer(tiny.causal(), None, [], processing_class=tiny.tokenizer(), tokenizer=tiny.tokenizer())

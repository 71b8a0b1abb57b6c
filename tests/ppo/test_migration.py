"""docs/migrating-from-trl.md: each row of its PPO tables is tried, and none of TRL's names is missing."""

from __future__ import annotations

import importlib
import re
from pathlib import Path

import pytest
import tiny
import torch
from made_trainers import batch, trainer
from test_config import OF_TRL
from transformers import GenerationConfig

from tasks.lm import AutoModelForCausalLMWithValueHead
from tasks.ppo import PPOConfig, PPOTrainer

PAGE = Path(__file__).parents[2] / "docs" / "migrating-from-trl.md"
OF_TRAINER = """
_early_stop _filter_kwargs _generate_batched _kl_penalty _prepare_deepspeed _remove_unused_columns
_save_pretrained _set_signature_columns_if_needed _show_tokens _step_safety_checker _tag_names
batched_forward_pass compute_advantages compute_rewards create_model_card from_pretrained gather_stats
generate generate_model_card log_stats loss prepare_dataloader prepare_model_inputs push_to_hub
record_step_stats save_pretrained step train_minibatch
accelerator model model_params is_encoder_decoder is_peft_model is_using_text_environment ref_model config
optional_peft_ctx tokenizer dataset _signature_columns dataloader data_collator optimizer lr_scheduler kl_ctl
is_distributed current_step push_to_hub_kwargs compare_step highest_reward current_device running
""".split()  # dir(trl.PPOTrainer) of 0.11.4 but for huggingface_hub's own, and what its constructor sets
OF_VALUE_HEADS = """
_get_checkpoint_from_hub _get_current_device _has_lm_head _init_weights _split_kwargs
add_and_load_reward_modeling_adapter compute_reward_score from_pretrained generate lm_head_namings post_init
push_to_hub save_pretrained supported_args supported_modules supported_pretrained_model_architectures
supported_rm_modules transformers_parent_class
pretrained_model config prepare_inputs_for_generation is_loaded_in_8bit is_loaded_in_4bit
is_sequential_parallel gradient_checkpointing_disable gradient_checkpointing_enable enable_input_require_grads
supports_rm_adapter rm_adapter_name policy_adapter_name v_head is_peft_model current_device state_dict
""".split()


def table(title: str) -> dict[str, tuple[str, str]]:
    """Of a section: name -> what is said of it."""
    section = PAGE.read_text(encoding="utf-8").split(f"## PPO: {title}\n")[1].split("\n## ")[0]
    rows = re.findall(r"^\| `([^|]+)` \| (\w+) \| ?(.*?) ?\|$", section, flags=re.MULTILINE)
    assert len(rows) == section.count("\n| `") and len({name for name, *_ in rows}) == len(rows)
    return {name: (word, text) for name, word, text in rows}


IMPORTS, SETTINGS, CALLS, ARGUMENTS, MODELS = (
    table(title)
    for title in (
        "names to import", "fields of `PPOConfig`", "attributes and methods of `PPOTrainer`",
        "arguments of `generate`", "models with value heads",
    )
)  # fmt: skip


def test_no_name_of_trls_is_missing():
    assert SETTINGS.keys() == OF_TRL.keys()
    assert CALLS.keys() == set(OF_TRAINER)
    assert set(OF_VALUE_HEADS) <= MODELS.keys()


@pytest.mark.parametrize("name", IMPORTS)
def test_a_name_to_import(name):
    word, text = IMPORTS[name]
    where = re.match(r"`([\w.]+)`", text)[1]
    room, _, last = where.rpartition(".")
    if word == "instead":
        owner = PPOTrainer if room == "PPOTrainer" else importlib.import_module(room)
        assert hasattr(owner, last) and not hasattr(importlib.import_module("tasks.ppo"), name.split(".")[-1])
    else:
        assert hasattr(importlib.import_module(room), last) and last == name.split(".")[-1]


@pytest.mark.parametrize("name", SETTINGS)
def test_a_field(name):
    value = getattr(PPOConfig(), name)
    assert value == OF_TRL[name] or name == "exp_name"


@pytest.fixture(scope="module")
def made():
    return trainer(given={"tokenizer": tiny.tokenizer()}, model_keys={"vocab_size": 330})


@pytest.mark.parametrize("name", CALLS)
def test_an_attribute_or_method(name, made):
    word, _ = CALLS[name]
    nothing = {name: lambda self, *given: None}
    if word == "instead":
        with pytest.raises(AttributeError, match=f"PPOTrainer.{name} is not here: .{{10}}"):
            getattr(made, name)
    else:
        getattr(made, name)
    if word in ("instead", "call"):
        with pytest.raises(TypeError, match=f"Mine.{name} would never be called: .{{10}}"):
            type("Mine", (PPOTrainer,), nothing)


@pytest.mark.parametrize("name", [name for name, (word, _) in CALLS.items() if word == "override"])
def test_what_may_be_overridden_is_called(name, tmp_path):
    called = []

    def noted(self, *given, **keys):
        called.append(name)
        return getattr(PPOTrainer, name)(self, *given, **keys)

    mine = type("Mine", (PPOTrainer,), {name: noted})
    from datasets import Dataset

    policy = AutoModelForCausalLMWithValueHead(tiny.causal(vocab_size=330))
    rows = Dataset.from_list([{"input_ids": [n], "text": "a"} for n in range(8)])
    config = PPOConfig(batch_size=8, mini_batch_size=8, ppo_epochs=1)
    own = mine(config, policy, None, tiny.tokenizer(), dataset=rows, device="cpu")
    own.step(*batch())
    own.save_pretrained(tmp_path)
    assert called


@pytest.mark.parametrize("name", MODELS)
def test_an_attribute_of_models(name):
    word, _ = MODELS[name]
    model = AutoModelForCausalLMWithValueHead(tiny.causal())
    if word == "instead":
        with pytest.raises(AttributeError, match=f"{name} is not here: .{{5}}"):
            getattr(model, name)
    else:
        getattr(model, name)
    if word in ("instead", "call"):
        with pytest.raises(TypeError, match=f"Mine.{name} would never be asked for: .{{10}}"):
            type("Mine", (AutoModelForCausalLMWithValueHead,), {name: None})


@pytest.mark.parametrize("written", ARGUMENTS)
def test_an_argument_of_generate(written, made, caplog):
    word, _ = ARGUMENTS[written]
    keys = eval(f"dict({written})", {"GenerationConfig": GenerationConfig})
    queries = [torch.tensor(ids) for ids in tiny.drawn([3, 5])]
    keys = {"max_new_tokens": 4} | keys if "generation_config" not in keys else keys
    if word == "refused":
        with pytest.raises(ValueError, match=r"^generate: .{10}"):
            made.generate(queries, **keys)
    else:
        made.generate(queries, **keys)
    assert ("KL may become negative" in caplog.text) is (word == "warns")

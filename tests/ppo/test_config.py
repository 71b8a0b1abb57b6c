"""PPOConfig: TRL 0.11.4's fields, what becomes of each, and the params section beside it."""

from __future__ import annotations

import ast
import dataclasses
import json
import sys
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pytest
import torch
from made_trainers import batch, is_still, trainer, weights
from transformers import HfArgumentParser

from params.schema import PPOParams
from tasks.ppo import PPOConfig, set_seed
from tasks.ppo import config as room

OF_TRL = {  # 0.11.4, in its order, with its defaults; exp_name is the script's
    "exp_name": None, "seed": 0, "log_with": None, "task_name": None, "model_name": "gpt2",
    "query_dataset": "stanfordnlp/imdb", "reward_model": "sentiment-analysis:lvwerra/distilbert-imdb",
    "remove_unused_columns": True, "tracker_kwargs": {}, "accelerator_kwargs": {}, "project_kwargs": {},
    "tracker_project_name": "trl", "push_to_hub_if_best_kwargs": {}, "steps": 20000, "learning_rate": 1.41e-5,
    "adap_kl_ctrl": True, "init_kl_coef": 0.2, "kl_penalty": "kl", "target": 6.0, "horizon": 10000.0,
    "gamma": 1.0,
    "lam": 0.95, "cliprange": 0.2, "cliprange_value": 0.2, "vf_coef": 0.1, "batch_size": 128,
    "forward_batch_size": None, "mini_batch_size": 128, "gradient_accumulation_steps": 1, "world_size": None,
    "ppo_epochs": 4, "max_grad_norm": None, "optimize_cuda_cache": None, "optimize_device_cache": False,
    "early_stopping": False, "target_kl": 1.0, "compare_steps": 1, "ratio_threshold": 10.0,
    "use_score_scaling": False, "use_score_norm": False, "score_clip": None, "whiten_rewards": False,
    "gradient_checkpointing": False, "is_encoder_decoder": None, "is_peft_model": None,
    "backward_batch_size": 128, "global_backward_batch_size": 128, "global_batch_size": 128,
    "dataset_num_proc": None,
}  # fmt: skip
FIELDS = {f.name: f for f in dataclasses.fields(PPOConfig)}
SMALL = {"batch_size": 8, "mini_batch_size": 4}


def test_trls_fields_stand_first_with_trls_defaults():
    assert list(FIELDS)[: len(OF_TRL)] == list(OF_TRL)
    made = PPOConfig()
    assert {name: getattr(made, name) for name in OF_TRL} == OF_TRL | {"exp_name": made.exp_name}
    assert made.exp_name == Path(sys.argv[0]).name.removesuffix(".py")
    assert made.total_ppo_epochs == 157, "20,000 responses in batches of 128, as TRL counts"


def test_what_becomes_of_each_field():
    """Read by the trainer and its rooms under its own name; or for scripts, computed, or an older name."""
    folder = Path(room.__file__).parent
    names = "config", "self.config", "trainer.config", "self.trainer.config", "loop.config"
    read = {
        node.attr
        for path in folder.glob("*.py")
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Attribute) and path.name not in ("stage.py", "config.py")
        and ast.unparse(node.value) in names
    }  # fmt: skip
    behind = {"total_ppo_epochs": {"steps", "updates"}, "thresholds": {"monitor"}}  # properties, and of what
    assert behind.keys() <= read
    read = read.union(*behind.values())
    listed = room.FOR_SCRIPTS | room.COMPUTED | room.OLDER_NAMES.keys()
    assert listed <= FIELDS.keys() and not set(room.OLDER_NAMES.values()) - FIELDS.keys()
    unused = FIELDS.keys() - listed - read
    assert not unused, f"taken and ignored: {unused}"


def test_the_params_section_has_the_same_fields_but_for_the_tables():
    ours, section = FIELDS.keys(), PPOParams.model_fields
    assert ours - section.keys() == room.SECTION_LACKS
    assert section.keys() - ours == room.SECTION_ALONE
    made, params = PPOConfig(), PPOParams()
    for name in ours & section.keys():
        there, here = room.DIFFERENT.get(name, (getattr(params, name),) * 2)
        assert (getattr(params, name), getattr(made, name)) == (there, here), name
    assert all(FIELDS[name].metadata["help"] for name in ours)


def test_settings_of_the_section():
    section = PPOParams(updates=7, temperature=0.7, monitor={"responses": 16}, log_with="mlflow", **SMALL)
    made = PPOConfig.of_section(section, 11)
    assert (made.total_ppo_epochs, made.temperature, made.seed, made.log_with) == (7, 0.7, 11, "mlflow")
    assert made.thresholds == section.monitor
    assert PPOConfig.of_section(PPOParams(seed=3), 11).seed == 3


def test_a_script_reads_writes_and_copies():
    config = PPOConfig(steps=1000, **SMALL)
    assert (config.total_ppo_epochs, config.backward_batch_size) == (125, 4)
    config.batch_size, config.mini_batch_size = np.int64(64), 2
    config.gradient_accumulation_steps = 4
    assert (config.total_ppo_epochs, config.backward_batch_size, config.global_backward_batch_size) == (
        16,
        8,
        8,
    )
    config.check()
    assert type(config.batch_size) is int
    assert dataclasses.replace(config, mini_batch_size=1).backward_batch_size == 4
    assert PPOConfig(**dataclasses.asdict(config)) == config
    config.tracker_kwargs = {"wandb": {"name": "x"}}
    told = config.to_dict()
    assert told["tracker_kwargs/wandb/name"] == "x" and told["total_ppo_epochs"] == 16 and json.dumps(told)
    set_seed(config.seed)
    assert torch.initial_seed() == 0


def test_settings_from_a_command_line():
    @dataclass
    class ScriptArguments:
        use_peft: bool = field(default=False)
        lora_alpha: float | None = field(default=16)

    given = (
        "--use_peft --learning_rate 1e-3 --no_adap_kl_ctrl --score_clip 2 --kl_penalty full --batch-size 8"
    )
    given += " --mini_batch_size 8 --early_stopping --optimizer adamw --updates 3"
    args, config = HfArgumentParser((ScriptArguments, PPOConfig)).parse_args_into_dataclasses(
        [*given.split(), "--project_kwargs", '{"logging_dir": "logs"}']
    )
    wanted = PPOConfig(
        learning_rate=1e-3, adap_kl_ctrl=False, score_clip=2.0, kl_penalty="full", batch_size=8,
        mini_batch_size=8, early_stopping=True, optimizer="adamw", updates=3,
        project_kwargs={"logging_dir": "logs"},
    )  # fmt: skip
    assert args.use_peft and config == wanted and config.total_ppo_epochs == 3
    assert HfArgumentParser(PPOConfig).parse_args_into_dataclasses([])[0] == PPOConfig()


def test_older_names_are_taken_over():
    with pytest.warns(FutureWarning, match="forward_batch_size is the older name of mini_batch_size"):
        config = PPOConfig(batch_size=8, forward_batch_size=4)
    assert config.mini_batch_size == 4 and dataclasses.replace(config, mini_batch_size=2).mini_batch_size == 2
    with pytest.warns(FutureWarning, match="optimize_device_cache"):
        assert PPOConfig(optimize_cuda_cache=True).optimize_device_cache is True


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        (
            {"batch_size": 6, "mini_batch_size": 4},
            r"ppo\.batch_size \(6\) must be a multiple of ppo\.mini_batch",
        ),
        ({"batch_size": 0}, r"ppo\.batch_size: input should be greater than or equal to 1, not 0"),
        ({"batch_size": 3.5}, r"ppo\.batch_size: .*integer"),
        ({"learning_rate": "fast"}, r"ppo\.learning_rate: .*, not 'fast'"),
        ({"kl_penalty": "k4"}, r"ppo\.kl_penalty: .*'kl', 'abs', 'mse', 'k3' or 'full', not 'k4'"),
        ({"cliprange": -1, "lam": 2}, r"\(and 1 more\)"),
        ({"steps": 0}, r"ppo\.steps: a whole number of at least 1 is wanted, not 0"),
        ({"compare_steps": True}, r"ppo\.compare_steps"),
        ({"seed": -1}, r"ppo\.seed: a whole number of at least 0"),
        ({"updates": 0}, r"ppo\.updates: .*greater"),
        ({"tracker_kwargs": "{"}, r"ppo\.tracker_kwargs: '\{' is no JSON"),
        ({"project_kwargs": [1]}, r"ppo\.project_kwargs: a mapping is wanted, not list"),
        ({"monitor": {"nois": 1}}, r"ppo\.monitor\.nois"),
    ],
)
def test_what_is_refused_is_one_line_that_names_the_key(keys, message):
    with pytest.raises(ValueError, match=message) as caught:
        PPOConfig(**keys)
    assert "\n" not in str(caught.value)
    with pytest.raises(TypeError, match="learning_rat"):
        PPOConfig(learning_rat=1.0)


def test_a_name_that_is_no_field_is_kept_and_said():
    config = PPOConfig()
    with pytest.warns(UserWarning, match="no field batch_sise: .*did you mean batch_size"):
        config.batch_sise = 4
    assert config.batch_sise == 4


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("mini_batch_size", 3, r"ppo\.batch_size \(8\) must be a multiple"),
        ("cliprange", -1.0, r"ppo\.cliprange: "),
        (
            "learning_rate",
            0.5,
            r"ppo\.learning_rate is 0\.5, the trainer was made with 0\.01; write the rates in",
        ),
        ("log_with", "wandb", r"ppo\.log_with is 'wandb', the trainer was made with None"),
    ],
)
def test_what_is_written_later_is_looked_at_before_the_next_step(name, value, message):
    made = trainer()
    start = weights(made)
    setattr(made.config, name, value)
    for use in (lambda: made.step(*batch()), lambda: made.generate([torch.tensor([5])], max_new_tokens=1)):
        with pytest.raises(ValueError, match=message):
            use()
    assert is_still(made, start) and made.updates == made.draws == 0


def test_what_is_written_later_counts():
    made = trainer()
    made.config.ppo_epochs, made.config.batch_size, made.config.mini_batch_size = 1, 4, 2
    stats = made.step(*batch(4))
    assert made.batch_rows == 4 and made.updates == 1 and len(stats["ppo/policy/ratio"]) > 0
    with pytest.raises(ValueError, match="queries holds 8 rows; a step takes 4"):
        made.step(*batch(8))


def test_what_the_trainer_tells_the_configuration():
    made = trainer()
    assert (made.config.world_size, made.config.is_peft_model, made.config.is_encoder_decoder) == (
        1,
        False,
        False,
    )
    for asked in (2, None):  # None: as many as the model has
        with pytest.raises(
            ValueError,
            match=rf"num_value_layers_unfrozen is {asked}, but the model's value head has 0 blocks .*=2$",
        ):
            trainer(num_value_layers_unfrozen=asked)

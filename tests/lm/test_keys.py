"""No keyword that our code gives itself can be given twice: it is taken, or refused in a sentence."""

from __future__ import annotations

import pytest
import tiny
import torch
from adapted import lora, saved_base
from transformers import DataCollatorForLanguageModeling

from tasks.lm import AutoModelForCausalLMWithValueHead as Valued
from tasks.lm.heads.reward_model import RewardModel
from tasks.lm.model.loading import load_causal, load_reward
from tasks.reward import RewardConfig, RewardTrainer
from tasks.sft import SFTConfig, SFTTrainer
from tasks.training.microbatches import Parts

ROWS = [{"input_ids": [5, 6, 7, 1]}]
PAIRS = [{"chosen_ids": [5, 6, 1], "rejected_ids": [5, 7, 1]}]


@pytest.fixture
def base(tmp_path):
    return saved_base(tmp_path / "base")


@pytest.fixture
def scorer(tmp_path):
    return tiny.save(tiny.scorer(vocab_size=len(tiny.tokenizer())), tmp_path / "scorer")


def doors(base, scorer):
    return {
        "policy": lambda **keys: Valued.from_pretrained(base, **keys),
        "causal": lambda **keys: load_causal(base, **keys),
        "reward": lambda **keys: load_reward(scorer, **keys),
        "reward model": lambda **keys: RewardModel.load(scorer, tiny.tokenizer(), **keys),
    }


@pytest.mark.parametrize("door", ["policy", "causal", "reward", "reward model"])
@pytest.mark.parametrize(
    "keys",
    [{"use_safetensors": True}, {"use_safetensors": None}, {"trust_remote_code": False}, {"revision": "main"},
     {"dtype": torch.float64}, {"torch_dtype": torch.float64}, {"dtype": None, "torch_dtype": None},
     {"dtype": torch.float64, "torch_dtype": torch.float16}, {"output_loading_info": False},
     {"attn_implementation": "eager"}, {"low_cpu_mem_usage": True}],
)  # fmt: skip
def test_what_is_taken(door, keys, base, scorer):
    made = doors(base, scorer)[door](**keys)
    model = getattr(made, "pretrained_model", getattr(made, "model", made))
    model = made if door in ("causal", "reward") else model
    wanted = keys.get("dtype") or keys.get("torch_dtype") or torch.float32
    assert {p.dtype for p in model.parameters()} == {wanted}


@pytest.mark.parametrize("door", ["policy", "causal", "reward", "reward model"])
@pytest.mark.parametrize(
    ("keys", "match"),
    [({"trust_remote_code": True}, r"trust_remote_code=True: code that comes with a model is never run"),
     ({"output_loading_info": True}, r"output_loading_info=True: the model alone comes back")],
)  # fmt: skip
def test_what_is_refused(door, keys, match, base, scorer):
    with pytest.raises(ValueError, match=match) as found:
        doors(base, scorer)[door](**keys)
    assert "\n" not in str(found.value)


@pytest.mark.parametrize("door", ["causal", "reward", "reward model"])
def test_no_pickle_is_asked_for(door, base, scorer):
    with pytest.raises(ValueError, match=r"use_safetensors=False: safetensors alone are read, no pickle$"):
        doors(base, scorer)[door](use_safetensors=False)


def test_a_script_that_asks_for_pickles_gets_safetensors(base, scorer, caplog):
    """TRL's own scripts do; what there is is read, and that is said."""
    assert doors(base, scorer)["policy"](use_safetensors=False)
    assert "safetensors are read all the same, and a pickle never is" in caplog.text


def test_a_reward_model_has_one_label(scorer):
    assert load_reward(scorer, num_labels=1).config.num_labels == 1
    with pytest.raises(ValueError, match="num_labels is 2; a reward model has one label"):
        load_reward(scorer, num_labels=2)


@pytest.mark.parametrize("name", ["key", "load"])
def test_a_loaders_own_word_is_no_argument(name, base):
    with pytest.raises(ValueError, match=f"{name}: no argument of from_pretrained"):
        Valued.from_pretrained(base, **{name: "x"})


@pytest.mark.parametrize("config", [None, lora()])
def test_no_pickle_is_written(config, base, tmp_path):
    policy = Valued.from_pretrained(base, peft_config=config)
    with pytest.raises(ValueError, match="safe_serialization=False: safetensors alone are written"):
        policy.save_pretrained(tmp_path / "saved", safe_serialization=False)
    assert not (tmp_path / "saved").exists()
    policy.save_pretrained(tmp_path / "saved", safe_serialization=True)
    assert list((tmp_path / "saved").glob("*.safetensors"))


@pytest.mark.parametrize("kind", ["sft", "reward"])
def test_a_collator_is_ours_or_none(kind, tmp_path):
    keys = {"use_cpu": True, "report_to": []}

    def made(**more):
        if kind == "sft":
            return SFTTrainer(tiny.causal(), SFTConfig(str(tmp_path), **keys), ROWS, **more)
        return RewardTrainer(tiny.scorer(), RewardConfig(str(tmp_path), **keys), PAIRS, **more)

    own = made(data_collator=None).data_collator
    assert isinstance(own, Parts) and made(data_collator=own).data_collator is own
    foreign = DataCollatorForLanguageModeling(tiny.tokenizer(), mlm=False)
    with pytest.raises(ValueError, match="data_collator: DataCollatorForLanguageModeling makes padded rows"):
        made(data_collator=foreign)

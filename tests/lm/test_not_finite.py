"""A weight that is not finite, in every file that a model is read from and at every door it is saved by."""

from __future__ import annotations

import math

import pytest
import tiny
from peft import LoraConfig
from safetensors.torch import load_file, save_file

from tasks.lm import AutoModelForCausalLMWithValueHead
from tasks.lm.adapters.files import read_adapter
from tasks.lm.adapters.lora import add_adapter
from tasks.lm.heads.reward_model import RewardModel
from tasks.lm.model.loading import load_causal, load_reward, load_seq2seq, save_model
from tasks.ppo import PPOConfig, PPOTrainer


def spoil(path, name: str, bad: float = math.nan) -> None:
    """Put one such number into a tensor of a file."""
    tensors = load_file(path)
    tensors[name].view(-1)[-1] = bad
    save_file(tensors, path, {"format": "pt"})


def saved(folder, model, **keys):
    model.save_pretrained(folder, **keys)
    tiny.tokenizer().save_pretrained(folder)
    return folder


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize(
    ("load", "model", "name"),
    [
        (load_causal, tiny.causal, "model.layers.1.mlp.up_proj.weight"),
        (load_reward, tiny.scorer, "score.weight"),
        (load_reward, tiny.causal, "model.norm.weight"),  # under a fresh score head
        (load_seq2seq, tiny.seq2seq, "decoder.final_layer_norm.weight"),
        (AutoModelForCausalLMWithValueHead.from_pretrained, tiny.causal, "lm_head.weight"),
        (lambda base, key: RewardModel.load(base, tiny.tokenizer(), key=key), tiny.scorer, "score.weight"),
    ],
)
def test_a_base_with_such_a_weight_is_refused(tmp_path, load, model, name, bad):
    folder = saved(tmp_path / "base", model(vocab_size=len(tiny.tokenizer())))
    spoil(folder / "model.safetensors", name, bad)
    keys = {} if "from_pretrained" in getattr(load, "__qualname__", "") else {"key": "model.base"}
    with pytest.raises(
        ValueError, match=rf"^\S+: \S+base, model\.safetensors: {name} holds a number that"
    ) as caught:
        load(folder, **keys)
    assert "\n" not in str(caught.value)


def test_of_several_files_the_one_is_named(tmp_path):
    folder = saved(tmp_path, tiny.causal(vocab_size=len(tiny.tokenizer())), max_shard_size="8KB")
    name = "model.layers.1.self_attn.o_proj.weight"
    shard = next(path for path in sorted(folder.glob("*.safetensors")) if name in load_file(path))
    spoil(shard, name)
    with pytest.raises(ValueError, match=rf"^model\.base: {folder}, {shard.name}: {name} holds"):
        load_causal(folder)


@pytest.mark.parametrize("name", ["summary.weight", "summary.bias", "branch.blocks.0.mlp.up_proj.weight"])
def test_a_value_head_or_critic(tmp_path, name):
    policy = AutoModelForCausalLMWithValueHead(tiny.causal(), num_value_layers_unfrozen=1)
    policy.save_pretrained(tmp_path)
    spoil(tmp_path / "value_head.safetensors", name)
    with pytest.raises(
        ValueError, match=rf"value_head\.safetensors: {name} holds a number that is not finite"
    ):
        AutoModelForCausalLMWithValueHead.from_pretrained(tmp_path)


def test_an_adapter(tmp_path):
    adapted = add_adapter(tiny.causal(), config=LoraConfig(r=2, target_modules=["q_proj"]))
    adapted.save_pretrained(tmp_path)
    name = "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"
    spoil(tmp_path / "adapter_model.safetensors", name)
    with pytest.raises(ValueError, match=rf"^reward_adapter: .*adapter_model\.safetensors: {name} holds"):
        read_adapter(tmp_path, "reward_adapter")


def test_nothing_such_is_saved_and_what_was_there_stays(tmp_path):
    model = tiny.causal(vocab_size=len(tiny.tokenizer()))
    policy = AutoModelForCausalLMWithValueHead(model)
    for name, save in (
        ("plain", lambda out: save_model(model, tiny.tokenizer(), out)),
        ("policy", policy.save_pretrained),
    ):
        save(tmp_path / name)
    before = {path: path.read_bytes() for path in tmp_path.rglob("*.safetensors")}
    model.lm_head.weight.data[3, 3] = math.inf
    with pytest.raises(ValueError, match=r"^the model is not saved: lm_head\.weight holds a number"):
        save_model(model, tiny.tokenizer(), tmp_path / "plain")
    with pytest.raises(ValueError, match=r"^the model is not saved: pretrained_model\.lm_head\.weight holds"):
        policy.save_pretrained(tmp_path / "policy")
    assert {path: path.read_bytes() for path in tmp_path.rglob("*.safetensors")} == before


@pytest.mark.parametrize("which", ["model", "ref_model"])
def test_a_ppo_trainer_takes_none(which):
    models = {
        name: AutoModelForCausalLMWithValueHead(tiny.causal(seed=i))
        for i, name in enumerate(("model", "ref_model"))
    }
    models[which].v_head.summary.bias.data[0] = math.nan
    with pytest.raises(
        ValueError, match=rf"^{which}: v_head\.summary\.bias holds a number that is not finite"
    ):
        PPOTrainer(PPOConfig(), **models, tokenizer=tiny.SPECIAL, device="cpu")

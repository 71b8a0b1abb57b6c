"""Adapters: what trains, what a merge keeps, and that a merge that loses something is seen."""

from __future__ import annotations

import pytest
import tiny
import torch
from peft import LoraConfig, PeftModel, PromptTuningConfig
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

from tasks.lm import AutoModelForCausalLMWithValueHead
from tasks.lm.adapters.lora import add_adapter, has_adapter, merge_checked

DOCUMENTS = tiny.drawn([3, 7, 5], seed=1)


def trained(model, *args, **keys):
    """An adapter that does something: every trainable weight moved."""
    adapter = add_adapter(model, *args, **keys)
    torch.manual_seed(3)
    with torch.no_grad():
        for weight in adapter.parameters():
            if weight.requires_grad:
                weight.add_(0.1 * torch.randn_like(weight))
    return adapter


@torch.no_grad()
def logits(model, ids=DOCUMENTS[0]):
    return model.eval()(input_ids=torch.tensor([ids])).logits


@pytest.mark.parametrize("kind", ["llama", "gpt2", "qwen2", "opt"])
@pytest.mark.parametrize("make", [tiny.causal, tiny.scorer])
def test_merged_is_adapter_and_not_base(make, kind, tmp_path):
    base = make(kind)
    plain, is_scorer = logits(base), make is tiny.scorer
    adapter = trained(base, 2, 4)
    wanted = logits(adapter)
    assert tiny.far(wanted, plain) > 1e-2
    adapter.save_pretrained(tmp_path / "adapter")
    merged = merge_checked(adapter, DOCUMENTS)
    assert not has_adapter(merged) and type(merged) is type(make(kind))
    assert tiny.far(logits(merged), wanted) <= 1e-5
    merged.save_pretrained(tmp_path / "merged")
    auto = AutoModelForSequenceClassification if is_scorer else AutoModelForCausalLM
    assert tiny.far(logits(auto.from_pretrained(tmp_path / "merged")), wanted) <= 1e-5
    again = PeftModel.from_pretrained(make(kind), tmp_path / "adapter")
    assert tiny.far(logits(again), wanted) <= 1e-5


def test_what_trains():
    names = [n for n, p in add_adapter(tiny.scorer(), 2, 4).named_parameters() if p.requires_grad]
    assert all("lora_" in n or ".score.modules_to_save." in n for n in names)
    assert sum("score" in n for n in names) == 1 and not any("score" in n and "lora" in n for n in names)
    assert {n.split(".lora")[0].split(".")[-1] for n in names if "lora_" in n} == {
        "q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"
    }  # fmt: skip
    names = [n for n, p in add_adapter(tiny.causal(), 2, 4).named_parameters() if p.requires_grad]
    assert names and not any("lm_head" in n or "embed" in n for n in names)


def test_a_fresh_adapter_changes_nothing_and_rank_and_alpha_arrive():
    model = tiny.causal()
    before = logits(model)
    adapter = add_adapter(model, 3, 12)
    assert tiny.far(logits(adapter), before) == 0
    layer = model.model.layers[0].self_attn.q_proj
    assert layer.r["default"] == 3 and layer.scaling["default"] == 4
    assert adapter.get_base_model() is model


def test_a_given_configuration_keeps_the_score_head():
    config = LoraConfig(r=2, target_modules=["q_proj"])
    adapter = trained(tiny.scorer(), config=config)
    wanted = logits(adapter)
    assert config.task_type is None, "the caller's configuration is not written into"
    assert sum(p.requires_grad for n, p in adapter.named_parameters() if "score" in n) == 1
    assert tiny.far(logits(merge_checked(adapter, DOCUMENTS)), wanted) <= 1e-5


def test_dropout_of_an_adapter_does_not_disturb_the_check():
    config = LoraConfig(r=2, target_modules="all-linear", lora_dropout=0.5)
    adapter = trained(tiny.scorer(), config=config).train()
    assert not merge_checked(adapter, DOCUMENTS).training


def test_a_merge_that_loses_the_head_is_seen(monkeypatch):
    adapter = trained(tiny.scorer(), 2, 4)
    merge = type(adapter.base_model).merge_and_unload

    def losing(self, *args, **keys):
        merged = merge(self, *args, **keys)
        merged.score = tiny.scorer(seed=5).score
        return merged

    monkeypatch.setattr(type(adapter.base_model), "merge_and_unload", losing)
    with pytest.raises(ValueError, match=r"differs from its adapter by \d\.\d+e[+-]\d+ .*at most 1e-04"):
        merge_checked(adapter, DOCUMENTS)


def test_a_merge_that_gives_nan_is_seen(monkeypatch):
    adapter = trained(tiny.scorer(), 2, 4)
    merge = type(adapter.base_model).merge_and_unload

    def broken(self, *args, **keys):
        merged = merge(self, *args, **keys)
        torch.nn.init.constant_(merged.score.weight, float("nan"))
        return merged

    monkeypatch.setattr(type(adapter.base_model), "merge_and_unload", broken)
    with pytest.raises(ValueError, match="differs"):
        merge_checked(adapter, DOCUMENTS)


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
@pytest.mark.parametrize("layers", [0, 1])
def test_a_policy_is_merged_under_its_value_head(kind, layers, tmp_path):
    model = AutoModelForCausalLMWithValueHead(
        trained(tiny.causal(kind), 2, 4), v_head_init_strategy="normal", num_value_layers_unfrozen=layers
    ).eval()
    ids = torch.tensor([DOCUMENTS[1]])
    wanted, _, values = model(input_ids=ids)
    merged = merge_checked(model, DOCUMENTS)
    assert merged is model and not merged.is_peft_model and not has_adapter(merged.pretrained_model)
    found = merged(input_ids=ids)
    assert tiny.far(found[0], wanted) <= 1e-5 and tiny.far(found[2], values) <= 1e-5
    merged.save_pretrained(tmp_path)
    again = AutoModelForCausalLMWithValueHead.from_pretrained(tmp_path).eval()
    assert torch.equal(again(input_ids=ids)[0], merged(input_ids=ids)[0])
    assert torch.equal(again(input_ids=ids)[2], merged(input_ids=ids)[2])
    assert tiny.far(logits(AutoModelForCausalLM.from_pretrained(tmp_path), DOCUMENTS[1]), wanted) <= 1e-5


def test_a_merge_that_loses_the_value_is_seen(monkeypatch):
    keys = {"v_head_init_strategy": "normal"}
    model = AutoModelForCausalLMWithValueHead(trained(tiny.causal(), 2, 4), **keys)
    take = model.take_merged

    def losing(merged):
        take(merged)
        torch.nn.init.zeros_(model.v_head.summary.weight)

    monkeypatch.setattr(model, "take_merged", losing, raising=False)
    with pytest.raises(ValueError, match=r"differs from its adapter by 1\.00e\+00 of the largest value"):
        merge_checked(model, DOCUMENTS)


def test_refusals():
    with pytest.raises(ValueError, match="adapter already"):
        add_adapter(add_adapter(tiny.causal(), 2, 4), 2, 4)
    with pytest.raises(ValueError, match="PromptTuningConfig adds virtual tokens"):
        add_adapter(tiny.causal(), config=PromptTuningConfig(num_virtual_tokens=2, task_type="CAUSAL_LM"))
    with pytest.raises(ValueError, match="at least one document"):
        merge_checked(add_adapter(tiny.causal(), 2, 4), [])

"""Which adapters are at work, which one the reference is, and what a checkpoint keeps."""

from __future__ import annotations

import pytest
import tiny
import torch
from adapted import copied, lora, moved, same_state, saved_base, saved_policy
from peft import get_peft_model

from tasks.lm import AutoModelForCausalLMWithValueHead as Valued
from tasks.lm.adapters.active import at_work, learnt, load_learnt, reference_adapters

IDS = torch.tensor([[5, 6, 7, 8]])


def logits(model):
    with torch.no_grad():
        return model.eval()(input_ids=IDS).logits


def test_what_is_at_work_and_what_learns():
    plain = logits(tiny.causal())
    model = moved(get_peft_model(tiny.causal(), lora()))
    own = logits(model)
    model.base_model.model.model.layers[0].requires_grad_(False)
    flags = [p.requires_grad for p in model.parameters()]
    with pytest.raises(KeyError), at_work(model, []):
        assert torch.equal(logits(model), plain)
        assert [p.requires_grad for p in model.parameters()] == flags
        raise KeyError
    assert torch.equal(logits(model), own) and [p.requires_grad for p in model.parameters()] == flags
    with at_work(model, ["default"]):
        assert torch.equal(logits(model), own)
        assert [p.requires_grad for p in model.parameters()] == flags
    assert [p.requires_grad for p in model.parameters()] == flags and model.active_adapters == ["default"]


@pytest.mark.parametrize("keys", [{}, {"use_dora": True}, {"target_modules": ["q_proj", "embed_tokens"]}])
def test_the_reference_of_an_adapter_that_says_something_is_its_copy(keys):
    model = moved(get_peft_model(tiny.causal(), lora(**keys)))
    own, state = logits(model), torch.get_rng_state()
    assert reference_adapters(model) == ["reference"] == reference_adapters(model)
    assert torch.equal(torch.get_rng_state(), state), "no global random number is drawn"
    assert torch.equal(logits(model), own)
    assert not any(p.requires_grad for n, p in model.named_parameters() if ".reference" in n)
    assert any(p.requires_grad for n, p in model.named_parameters() if ".default" in n)
    later = logits(moved(model, 9))
    assert tiny.far(later, own) > 1e-3
    with at_work(model, ["reference"]):
        assert torch.equal(logits(model), own)
    assert torch.equal(logits(model), later) and model.active_adapters == ["default"]


def test_a_copy_is_in_the_mode_of_the_model():
    for mode in (True, False):
        model = moved(get_peft_model(tiny.causal(), lora(lora_dropout=0.5))).train(mode)
        list(model.modules())[-1].training = not mode
        modes = {n: m.training for n, m in model.named_modules()}
        reference_adapters(model)
        found = {n: m.training for n, m in model.named_modules()}
        assert {n: found[n] for n in modes} == modes, "each of its parts as it was"
        assert {on for n, on in found.items() if n not in modes} == {mode}


def test_the_reference_of_a_fresh_adapter_is_the_model_without_it():
    assert reference_adapters(get_peft_model(tiny.causal(), lora())) == []
    model = moved(get_peft_model(tiny.causal(), lora()))
    model.requires_grad_(False)
    assert reference_adapters(model) == ["default"], "one that learns nothing is its own reference"
    whole = get_peft_model(tiny.causal(), lora(modules_to_save=["norm"]))
    assert reference_adapters(whole) == ["reference"], "a part that is trained whole has no off"


def test_a_base_that_learns_is_no_reference():
    model = get_peft_model(tiny.causal(), lora(bias="all", target_modules=["q_proj"]))
    model.base_model.model.lm_head.requires_grad_(True)
    with pytest.raises(ValueError, match=r"ref_model: .*lm_head.* is the base's own and learns.*bias='none'"):
        reference_adapters(model)


def test_two_adapters_that_learn_have_no_reference():
    model = get_peft_model(tiny.causal(), lora())
    model.add_adapter("second", lora())
    model.base_model.set_adapter(["default", "second"])
    assert reference_adapters(model) == []
    moved(model)
    with pytest.raises(ValueError, match="the adapters default, second all learn"):
        reference_adapters(model)


def test_a_fresh_adapter_over_a_frozen_one(tmp_path):
    base = saved_base(tmp_path / "base")
    sft = saved_policy(tmp_path / "sft", base)
    policy = Valued.from_pretrained(tmp_path / "sft", peft_config=lora(r=3))
    assert torch.equal(logits(policy.pretrained_model), logits(sft))
    names = {n.split(".")[-2] for n, p in policy.named_parameters() if p.requires_grad}
    assert names == {"policy", "summary"}
    assert reference_adapters(policy.pretrained_model) == ["reference"]
    moved(policy)
    with at_work(policy.pretrained_model, ["reference"]) as reference:
        assert torch.equal(logits(reference), logits(sft))
    policy.save_pretrained(tmp_path / "saved")
    with pytest.raises(ValueError, match="has several adapters; merge it first"):
        Valued.from_pretrained(tmp_path / "saved", peft_config=lora())


def test_a_checkpoint_holds_what_learns(tmp_path):
    saved_policy(tmp_path / "sft", saved_base(tmp_path / "base"))
    policy = Valued.from_pretrained(tmp_path / "sft")
    reference_adapters(policy.pretrained_model)
    kept = {n: v.clone() for n, v in learnt(policy).items()}
    assert all(".default." in n or n.startswith("v_head.") for n in kept) and len(kept) == 28 + 2
    before = copied(policy)
    moved(policy)
    load_learnt(policy, kept)
    assert same_state(policy, before)
    whole = Valued(tiny.causal())
    assert learnt(whole).keys() == whole.state_dict().keys()


def test_a_checkpoint_of_another_model_is_refused(tmp_path):
    policy, wide = (Valued.from_pretrained(tiny.causal(), peft_config=lora(r=r)) for r in (2, 3))
    before = copied(policy)
    with pytest.raises(ValueError, match=r"its .*lora_A.* is \(3, 16\), the model's \(2, 16\)"):
        load_learnt(policy, learnt(wide))
    few = Valued.from_pretrained(tiny.causal(), peft_config=lora(target_modules=["q_proj"]))
    with pytest.raises(ValueError, match=r"of another model: .* is on one side only"):
        load_learnt(policy, learnt(few))
    assert same_state(policy, before)

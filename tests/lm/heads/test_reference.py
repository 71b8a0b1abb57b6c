"""The reference: frozen, and either independent or truly of one memory with the policy."""

from __future__ import annotations

import pytest
import tiny
import torch
from peft import LoraConfig, get_peft_model

from tasks.lm import AutoModelForCausalLMWithValueHead, create_reference_model

IDS = torch.tensor([[5, 6, 7, 8], [9, 4, 3, 2]])
KINDS = ("llama", "gpt2", "opt", "gpt_neox", "gemma", "bloom", "gptj")


def logits(model):
    out = model(IDS)
    return out[0] if isinstance(out, tuple) else out.logits


def memory(model) -> dict[str, int]:
    return {name: parameter.data_ptr() for name, parameter in model.named_parameters()}


def learn(model) -> None:
    logits(model).square().sum().backward()
    torch.optim.SGD([p for p in model.parameters() if p.requires_grad], 0.1).step()
    model.zero_grad()


@pytest.mark.parametrize("wrap", [AutoModelForCausalLMWithValueHead, lambda model: model])
@pytest.mark.parametrize("kind", KINDS)
def test_an_independent_reference(kind, wrap):
    model = wrap(tiny.causal(kind)).train()
    reference = create_reference_model(model)
    before = logits(reference).clone()
    assert type(reference) is type(model) and not reference.training and model.training
    assert not any(p.requires_grad for p in reference.parameters())
    assert all(p.requires_grad for p in model.parameters())
    assert not set(memory(model).values()) & set(memory(reference).values())
    learn(model.eval())
    assert torch.equal(logits(reference), before)
    assert tiny.far(logits(model), before) > 1e-3


@pytest.mark.parametrize("wrap", [AutoModelForCausalLMWithValueHead, lambda model: model])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("n", [0, 1, 2])
def test_shared_layers_share_memory(kind, wrap, tied, n):
    """They are frozen in both; the rest is independent, and what is learnt there leaves the reference be."""
    model = wrap(tiny.causal(kind, tie_word_embeddings=tied))
    reference = create_reference_model(model, n)
    own, other = memory(model), memory(reference)
    shared = {name for name in own if own[name] == other[name]}
    assert shared == {name for name, p in model.named_parameters() if not p.requires_grad}
    blocks = {
        int(part[0]) for name in shared for part in [[x for x in name.split(".") if x.isdigit()]] if part
    }
    assert blocks == set(range(n)) and any("em" in name or "wte" in name for name in shared)
    assert not any("v_head" in name for name in shared)
    assert not any(p.requires_grad for p in reference.parameters()) and not reference.training
    before = logits(reference).clone()
    learn(model)
    assert torch.equal(logits(reference), before) and tiny.far(logits(model), before) > 1e-3


def test_which_parameters_by_hand():
    """One of two blocks; a tied head belongs to the embeddings, which both share."""
    for tied in (True, False):
        model = tiny.causal(tie_word_embeddings=tied)
        create_reference_model(model, 1)
        learns = {n for n, p in model.named_parameters() if p.requires_grad}
        assert {n for n in learns if "layers.1." not in n} == {"model.norm.weight"} | (
            set() if tied else {"lm_head.weight"}
        )
        assert sum("layers.1." in n for n in learns) == 9


def test_an_adapter_below_is_shared_with_its_block():
    model = get_peft_model(tiny.causal(), LoraConfig(r=2, target_modules="all-linear"))
    reference = create_reference_model(model, 1)
    own, other = memory(model), memory(reference)
    assert all((own[n] == other[n]) == ("layers.0." in n or "embed" in n) for n in own)
    assert all("layers.1." in n for n, p in model.named_parameters() if p.requires_grad)


@pytest.mark.parametrize("n", [-1, 3])
def test_more_layers_than_there_are(n):
    model = AutoModelForCausalLMWithValueHead(tiny.causal())
    with pytest.raises(ValueError, match=rf"num_shared_layers is {n}; the model has 2 blocks"):
        create_reference_model(model, n)
    assert all(p.requires_grad for p in model.parameters())

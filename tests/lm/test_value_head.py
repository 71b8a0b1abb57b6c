"""A value for every token, in a folder that plain transformers loads."""

from __future__ import annotations

import pytest
import tiny
import torch
from transformers import AutoModelForCausalLM

from tasks.lm import AutoModelForCausalLMWithValueHead, create_reference_model
from tasks.lm.value_head import VALUE_HEAD

IDS = torch.tensor([[5, 6, 7, 8], [9, 4, 3, 2]])


def policy(kind="llama", **keys):
    model = AutoModelForCausalLMWithValueHead(tiny.causal(kind, **keys))
    torch.manual_seed(7)
    torch.nn.init.normal_(model.v_head.summary.weight)
    torch.nn.init.constant_(model.v_head.summary.bias, 0.25)
    return model.eval()


@pytest.mark.parametrize("kind", ["llama", "gpt2", "opt", "gpt_neox"])
@torch.no_grad()
def test_the_forward_is_trls(kind):
    model = policy(kind)
    logits, loss, values = model(IDS, torch.ones_like(IDS))
    plain = model.pretrained_model(IDS, output_hidden_states=True)
    assert logits.shape == (2, 4, 32) and loss is None and values.shape == (2, 4)
    assert torch.equal(logits, plain.logits) and values.dtype == torch.float32
    hidden = plain.hidden_states[-1]
    wanted = hidden @ model.v_head.summary.weight[0] + model.v_head.summary.bias
    assert tiny.far(values, wanted) < 1e-6
    assert tiny.far(model.pretrained_model.get_output_embeddings()(hidden), plain.logits) < 1e-5, (
        "the value is read where the logits are read, after the last norm"
    )


@torch.no_grad()
def test_values_begin_at_zero():
    assert not AutoModelForCausalLMWithValueHead(tiny.causal())(IDS)[2].any()


@torch.no_grad()
def test_values_of_padding_free_and_padded_rows_agree():
    model = policy("gpt2")
    padded = torch.cat([torch.full((2, 2), 17), IDS], 1)
    mask = torch.tensor([[0, 0, 1, 1, 1, 1]] * 2)
    found = model(padded, mask, position_ids=torch.tensor([[0, 0, 0, 1, 2, 3]] * 2))[2][:, 2:]
    assert tiny.far(found, model(IDS)[2]) < 1e-5


@pytest.mark.parametrize("tied", [True, False])
@torch.no_grad()
def test_a_saved_folder_is_a_plain_transformers_folder(tmp_path, tied):
    model = policy(tie_word_embeddings=tied)
    model.save_pretrained(tmp_path)
    plain = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert torch.equal(plain(IDS).logits, model(IDS)[0])
    assert (tmp_path / VALUE_HEAD).is_file() and not list(tmp_path.glob("*.bin"))
    loaded = AutoModelForCausalLMWithValueHead.from_pretrained(tmp_path).eval()
    for found, wanted in zip(loaded(IDS), model(IDS), strict=True):
        assert wanted is None or torch.equal(found, wanted)
    assert loaded.config.hidden_size == 16


@torch.no_grad()
def test_a_folder_without_a_value_head_gets_a_fresh_one(tmp_path):
    tiny.causal().save_pretrained(tmp_path)
    assert not AutoModelForCausalLMWithValueHead.from_pretrained(tmp_path)(IDS)[2].any()
    with pytest.raises(ValueError, match=r"model\.base"):
        AutoModelForCausalLMWithValueHead.from_pretrained(tmp_path / "nowhere")


def test_generate_is_the_language_models_own():
    model = policy()
    found = model.generate(IDS, max_new_tokens=3, do_sample=False)
    assert torch.equal(found, model.pretrained_model.generate(IDS, max_new_tokens=3, do_sample=False))


def test_the_reference_is_frozen_and_independent():
    model = policy().train()
    reference = create_reference_model(model)
    before = reference(IDS)[0].detach().clone()
    assert not reference.training and model.training
    assert not any(p.requires_grad for p in reference.parameters())
    assert all(p.requires_grad for p in model.parameters())
    own = {p.data_ptr() for p in model.parameters()}
    assert not own & {p.data_ptr() for p in reference.parameters()}
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(1)
    assert torch.equal(reference(IDS)[0], before)

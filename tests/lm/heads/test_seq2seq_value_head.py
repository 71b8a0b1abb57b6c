"""AutoModelForSeq2SeqLMWithValueHead: TRL's forward, and folders that plain transformers loads."""

from __future__ import annotations

import json
import os
import subprocess

import pytest
import tiny
import torch
from peft import LoraConfig
from safetensors.torch import load_file, save_file
from seq2seq_models import alone, close, laid_out, model_of, rows, valued
from transformers import AutoModelForSeq2SeqLM

from tasks.lm import AutoModelForCausalLMWithValueHead, AutoModelForSeq2SeqLMWithValueHead
from tasks.lm.attention.forest import serve_forest
from tasks.lm.heads.policy_files import VALUE_HEAD
from tasks.lm.logprobs.responses import read_responses

Valued = AutoModelForSeq2SeqLMWithValueHead
FEW = ["t5", "t5 v1.1", "bart"]
SOURCES, TARGETS = torch.tensor([[5, 6, 7, 8], [9, 4, 0, 0]]), torch.tensor([[11, 12, 1], [13, 1, 1]])
MASK = (SOURCES != 0).long()


@pytest.mark.parametrize("name", FEW)
@torch.no_grad()
def test_the_forward_of_trl(name):
    """Values of the places of the decoder, from what it gives before T5 scales it."""
    model = valued(model_of(name))
    plain = model_of(name)
    asked = {"input_ids": SOURCES, "attention_mask": MASK, "labels": TARGETS}
    logits, loss, values = model(**asked)
    out = plain(**asked, output_hidden_states=True)
    assert torch.equal(logits, out.logits) and torch.equal(loss, out.loss)
    wanted = model.v_head.summary(out.decoder_hidden_states[-1])[..., 0]
    assert values.shape == (2, 3) and tiny.far(values, wanted) <= 1e-6
    start = model.config.decoder_start_token_id
    asking = torch.cat([torch.full((2, 1), start), TARGETS[:, :-1]], 1)
    again = model(SOURCES, attention_mask=MASK, decoder_input_ids=asking, return_past_key_values=True)
    assert torch.equal(again[0], logits) and again[1] is None and torch.equal(again[2], values)
    told = {"attention_mask": MASK, "past_key_values": again[3], "decoder_input_ids": TARGETS[:, -1:]}
    more = model(SOURCES, **told)
    whole = model(SOURCES, attention_mask=MASK, decoder_input_ids=torch.cat([asking, TARGETS[:, -1:]], 1))
    assert close(more[0][:, -1], whole[0][:, -1]) and close(more[2][:, -1], whole[2][:, -1])


@pytest.mark.parametrize("name", FEW)
@torch.no_grad()
def test_saved_and_loaded(name, tmp_path):
    """Plain transformers finds every key and no other; here the value head comes back too."""
    model = valued(model_of(name))
    model.save_pretrained(tmp_path)
    plain, told = AutoModelForSeq2SeqLM.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(told[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    own = model.pretrained_model.state_dict()
    assert all(torch.equal(own[key], value) for key, value in plain.state_dict().items())
    assert set(load_file(tmp_path / VALUE_HEAD)) == {"summary.weight", "summary.bias"}
    again = Valued.from_pretrained(tmp_path)
    for found, wanted in zip(again(SOURCES, labels=TARGETS), model(SOURCES, labels=TARGETS), strict=True):
        assert torch.equal(found, wanted)
    assert again.pretrained_model.dtype == torch.float32
    half = Valued.from_pretrained(tmp_path, dtype=torch.bfloat16)
    assert half.pretrained_model.dtype == torch.bfloat16 and half.v_head.summary.weight.dtype == torch.float32


@torch.no_grad()
def test_a_checkpoint_as_trl_saves_it(tmp_path):
    """The head stands among the model's own tensors."""
    model = valued(model_of())
    model.pretrained_model.save_pretrained(tmp_path)
    path = tmp_path / "model.safetensors"
    head = {f"v_head.{key}": value for key, value in model.v_head.state_dict().items()}
    save_file(load_file(path) | head, path, metadata={"format": "pt"})
    again = Valued.from_pretrained(tmp_path)
    assert torch.equal(again(SOURCES, labels=TARGETS)[2], model(SOURCES, labels=TARGETS)[2])


BY_TRL = """
import sys
import torch
from transformers import T5Config, T5ForConditionalGeneration
from trl import AutoModelForSeq2SeqLMWithValueHead as Valued

folder = sys.argv[1]
keys = {"d_model": 16, "d_kv": 8, "d_ff": 24, "num_layers": 2, "num_heads": 2, "decoder_start_token_id": 0}
torch.manual_seed(0)
for name, tied in (("tied", True), ("untied", False)):
    config = T5Config(**keys, vocab_size=32, tie_word_embeddings=tied)
    T5ForConditionalGeneration(config).save_pretrained(f"{folder}/base-{name}")
    model = Valued.from_pretrained(f"{folder}/base-{name}").eval()
    model.save_pretrained(f"{folder}/{name}")
    with torch.no_grad():
        asked = torch.tensor([[5, 6, 7, 8], [9, 4, 3, 2]]), torch.tensor([[11, 12, 1], [13, 1, 1]])
        logits, _, values = model(asked[0], labels=asked[1])
    print(logits.flatten().tolist(), values.flatten().tolist(), sep="\\n")
"""


@pytest.mark.slow
@pytest.mark.skipif(not os.environ.get("STACKRL_PPO_PEER_PYTHON"), reason="no python with TRL 0.11")
@torch.no_grad()
def test_checkpoints_of_trl_itself(tmp_path):
    python = os.environ["STACKRL_PPO_PEER_PYTHON"]
    plain = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    made = subprocess.run(
        [python, "-c", BY_TRL, str(tmp_path)], env=plain, capture_output=True, text=True, check=False
    )
    assert made.returncode == 0, made.stderr
    said = [torch.tensor(json.loads(line)) for line in made.stdout.splitlines()[-4:]]
    for name, logits, values in (("tied", *said[:2]), ("untied", *said[2:])):
        model = Valued.from_pretrained(tmp_path / name)
        found = model(torch.tensor([[5, 6, 7, 8], [9, 4, 3, 2]]), labels=TARGETS)
        assert tiny.far(found[0].flatten(), logits) <= 1e-5 and tiny.far(found[2].flatten(), values) <= 1e-5


@pytest.mark.parametrize("name", ["t5", "bart"])
@torch.no_grad()
def test_under_an_adapter(name, tmp_path):
    """Saved as an adapter, whose base is where it says."""
    model_of(name).save_pretrained(tmp_path / "base")
    lora = LoraConfig(target_modules="all-linear", init_lora_weights=False)
    model = Valued.from_pretrained(tmp_path / "base", peft_config=lora)
    assert model.is_peft_model and model.pretrained_model.active_peft_config.task_type == "SEQ_2_SEQ_LM"
    model.v_head.summary.weight.data.normal_(generator=torch.Generator().manual_seed(3))
    model.save_pretrained(tmp_path / "adapter")
    assert not (tmp_path / "adapter" / "model.safetensors").exists()
    again = Valued.from_pretrained(tmp_path / "adapter")
    for found, wanted in zip(again(SOURCES, labels=TARGETS), model(SOURCES, labels=TARGETS), strict=True):
        assert tiny.far(found, wanted) <= 1e-6
    assert type(again.pretrained_model) is type(model.pretrained_model)


def test_generate_is_the_language_models_own():
    model = valued(model_of())
    found = model.generate(input_ids=SOURCES[:1], do_sample=False, max_new_tokens=4)
    assert torch.equal(found, model_of().generate(input_ids=SOURCES[:1], do_sample=False, max_new_tokens=4))


def test_models_of_another_kind_are_refused(tmp_path):
    for model in (tiny.causal(), tiny.scorer(), tiny.scorer("bert")):
        with pytest.raises(ValueError, match=rf"^{type(model).__name__} is no encoder-decoder"):
            Valued(model)
    with pytest.raises(ValueError, match="T5ForConditionalGeneration is no causal language model"):
        AutoModelForCausalLMWithValueHead(model_of())
    tiny.causal().save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"base: cannot load .* Unrecognized configuration class"):
        Valued.from_pretrained(tmp_path)


# ---- blocks of the value head's own


@pytest.mark.parametrize("name", FEW)
@pytest.mark.parametrize("k", [1, 2])
@torch.no_grad()
def test_values_begin_as_those_of_a_plain_head(name, k, tmp_path):
    plain, own = valued(model_of(name)), valued(model_of(name), num_value_layers_unfrozen=k)
    assert len(own.v_head.branch.blocks) == k and own.v_head.branch.blocks[0].training is False
    assert tiny.far(own(SOURCES, labels=TARGETS)[2], plain(SOURCES, labels=TARGETS)[2]) <= 1e-6
    for planted in (False, True):
        assert not planted or serve_forest(own.pretrained_model) or name == "bart"
        found = read_responses(own, laid_out(), 0.7)[2]
        assert tiny.far(found, read_responses(plain, laid_out(), 0.7)[2]) <= 1e-5
    own.save_pretrained(tmp_path)
    again = Valued.from_pretrained(tmp_path)
    assert len(again.v_head.branch.blocks) == k


@pytest.mark.parametrize("name", FEW)
def test_losses_reach_blocks_of_their_own(name):
    model = valued(model_of(name), num_value_layers_unfrozen=1)
    assert serve_forest(model.pretrained_model) or name == "bart"
    logprobs, _, values = read_responses(model, laid_out(), 0.7)
    values.square().sum().backward(retain_graph=True)
    moved = {n for n, g in tiny.gradients(model).items() if g.any()}
    last = {n for n in moved if ".decoder.block.1." in n or ".decoder.layers.2." in n}
    assert not last and any("v_head.branch" in n for n in moved) and any("encoder" in n for n in moved)
    logprobs.sum().backward()
    moved = {n for n, g in tiny.gradients(model).items() if g.any()}
    assert not any("v_head" in n for n in moved)


def test_the_branch_after_it_has_moved():
    """By the definition: the copied block and norm over what enters the original."""
    model = valued(model_of(), num_value_layers_unfrozen=1)
    torch.manual_seed(4)
    for parameter in model.v_head.branch.parameters():
        parameter.data.add_(0.3 * torch.randn_like(parameter))
    swapped = valued(model_of())
    swapped.v_head.load_state_dict({k: v for k, v in model.v_head.state_dict().items() if "branch" not in k})
    decoder, branch = swapped.pretrained_model.decoder, model.v_head.branch
    decoder.block[1].load_state_dict(branch.blocks[0].state_dict())
    decoder.final_layer_norm.load_state_dict(branch.between[0].state_dict())
    assert serve_forest(model.pretrained_model)
    found = read_responses(model, laid_out(), 0.7)[2]
    for row, (prompt, response) in zip(found, zip(*rows(), strict=True), strict=True):
        if response:
            assert close(row[: len(response)], alone(swapped, prompt, response, 0.7)[2])

"""Sizes against those of transformers and peft, activations against what autograd keeps, a user's lines."""

from __future__ import annotations

import json
import math

import pytest
import torch
from torch.autograd.graph import saved_tensors_hooks
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSequenceClassification

from params.__main__ import main
from params.estimate import Device, describe, estimates
from params.load import ParamsError
from params.memory import GB, activations, kv_cache, training
from params.schema import Params
from params.shapes import LLAMA_7B, Shape, shape_of

SMALL = Shape(256, 688, 4, 4, 4, 500)
GROUPED = Shape(128, 344, 6, 8, 2, 400, is_tied=True)


def config(shape: Shape):
    return AutoConfig.for_model(
        "llama", hidden_size=shape.hidden, intermediate_size=shape.intermediate,
        num_hidden_layers=shape.layers, num_attention_heads=shape.heads,
        num_key_value_heads=shape.kv_heads, vocab_size=shape.vocabulary, tie_word_embeddings=shape.is_tied,
        num_labels=1, pad_token_id=0,
    )  # fmt: skip


def count(parameters) -> int:
    return sum(p.numel() for p in parameters)


@pytest.mark.parametrize("shape", [SMALL, GROUPED])
def test_parameters_are_those_of_transformers_and_peft(shape):
    from tasks.lm.adapters.lora import add_adapter

    model = AutoModelForCausalLM.from_config(config(shape))
    assert count(model.parameters()) == shape.parameters
    assert count(model.model.layers[0].parameters()) == shape.of_block
    scorer = AutoModelForSequenceClassification.from_config(config(shape))
    assert count(scorer.parameters()) == shape.of_trunk + shape.hidden
    adapted = add_adapter(model, rank=3)
    assert count(p for p in adapted.parameters() if p.requires_grad) == shape.of_lora(3)


def test_llama_7b_has_its_published_size():
    assert LLAMA_7B.parameters == 6_738_415_616 and LLAMA_7B.of_lora(16) == 39_976_960


def kept(shape: Shape, tokens: int, dtype: str) -> int:
    """Bytes that autograd keeps of a forward through the blocks, but for weights and their casts."""
    model = AutoModelForCausalLM.from_config(config(shape)).model
    sizes = {p.shape for p in model.parameters()} | {p.T.shape for p in model.parameters() if p.dim() == 2}
    seen: dict[int, torch.Tensor] = {}

    def keep(tensor):
        if tensor.shape not in sizes:
            seen[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    low = torch.autocast("cpu", torch.bfloat16, enabled=dtype == "bfloat16")
    with saved_tensors_hooks(keep, lambda tensor: tensor), low:
        output = model(input_ids=torch.zeros(1, tokens, dtype=torch.long), use_cache=False)
        assert output.last_hidden_state.requires_grad  # and so the graph lives
    return sum(tensor.untyped_storage().nbytes() for tensor in seen.values())


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("shape", [SMALL, GROUPED])
def test_activations_are_within_a_tenth_of_what_autograd_keeps(shape, dtype):
    for tokens in (50, 200):
        assert activations(shape, tokens, dtype) == pytest.approx(kept(shape, tokens, dtype), rel=0.1)


def test_recomputing_keeps_one_float32_input_of_a_block_and_one_block():
    whole, one = (activations(SMALL, 10, "bfloat16") / n for n in (1, SMALL.layers))
    assert activations(SMALL, 10, "bfloat16", recompute=True) == one + 4 * 10 * 4 * 256 < whole


def test_weights_gradients_and_moments_are_those_of_a_step():
    model = AutoModelForCausalLM.from_config(config(SMALL))
    adam = torch.optim.AdamW(model.parameters())
    model(input_ids=torch.zeros(1, 4, dtype=torch.long)).logits.sum().backward()
    adam.step()
    held = {
        "weights": [p for p in model.parameters()],
        "gradients": [p.grad for p in model.parameters()],
        "moments": [v for s in adam.state.values() for v in s.values() if v.dim()],
    }
    found = training(SMALL, 4, "float32", trained=SMALL.parameters)
    for name, tensors in held.items():
        assert found[name] * GB == pytest.approx(sum(t.nbytes for t in tensors))
    assert found["casts"] == 0 and found["logits"] * GB == 3 * 4 * 4 * 500


def test_an_adapter_a_share_and_a_quantised_base_by_hand():
    n, lora, block = LLAMA_7B.parameters, LLAMA_7B.of_lora(16), LLAMA_7B.of_block
    found = training(LLAMA_7B, 2**20, "bfloat16", trained=lora, base=1.0)
    assert found["weights"] * GB == n + 4 * lora and found["moments"] * GB == 8 * lora
    assert found["casts"] * GB == 2 * n and found["logits"] * GB == 3 * 4 * 2**28
    shared = training(LLAMA_7B, 8, "bfloat16", trained=n, shards=8, muon=True)
    assert shared["weights"] * GB == pytest.approx(4 * n / 8 + 2 * 4 * block)
    assert shared["gradients"] * GB == shared["moments"] * GB == 4 * n / 8
    assert shared["casts"] * GB == 2 * 2 * block
    assert training(LLAMA_7B, 8, "bfloat16", trained=n, recompute=True)["casts"] * GB == 2 * 2 * block


def test_the_cache_is_that_of_transformers():
    model = AutoModelForCausalLM.from_config(config(GROUPED))
    cache = model(input_ids=torch.zeros(3, 7, dtype=torch.long), use_cache=True).past_key_values
    assert kv_cache(GROUPED, 3, 7, "float32") == sum(
        x.nbytes for layer in cache.layers for x in (layer.keys, layer.values)
    )


def params(**sections) -> Params:
    base = {"base": "huggyllama/llama-7b"}
    return Params.model_validate(
        {"model": base, "pack": {"row_tokens": 1024, "document_tokens": 512}, **sections}
    )


FLAT = Device(tflops=100, utilisation=0.5, bandwidth=1.0, answers=2, rows=64, questions=96)


def test_steps_and_seconds_by_hand():
    n = LLAMA_7B.parameters
    sft = {"batch_rows": 16, "epochs": 2, "dtype": "bfloat16"}
    found = estimates(params(sft=sft), 8, False, FLAT)["sft"]
    assert found.steps == 8 and found.seconds == pytest.approx(2 * 1024 * 6 * n / 50e12)
    found = estimates(
        params(sft={**sft, "lora_rank": 4, "dtype": "float32", "max_steps": 3}), 8, False, FLAT
    )["sft"]
    assert found.steps == 3 and found.seconds == pytest.approx(2 * 1024 * 4 * n / 25e12)
    assert estimates(params(sft={**sft, "max_steps": 99}), 8, False, FLAT)["sft"].steps == 8
    unknown = Device()
    assert estimates(params(sft=sft), 8, False, unknown)["sft"].steps == 0
    assert estimates(params(sft={**sft, "max_steps": 7}), 8, False, unknown)["sft"].steps == 7
    reward = {"batch_questions": 8, "epochs": 1, "dtype": "bfloat16"}
    found = estimates(params(reward=reward), 2, False, FLAT)["reward"]
    trunk = n - 32000 * 4096
    assert found.steps == 12 and found.seconds == pytest.approx(4 * 1024 * 6 * trunk / 50e12)


def test_a_forward_is_bounded_unless_weights_are_shared():
    sizes = {"sft": {"batch_rows": 16}, "machine": {"microbatch_tokens": 2048}}

    def activation(processes, is_sharded):
        return estimates(params(**sizes), processes, is_sharded, FLAT)["sft"].gigabytes["activations"]

    assert activation(2, False) * GB == activations(LLAMA_7B, 2048, "float32")
    assert activation(16, False) * GB == activations(LLAMA_7B, 1024, "float32")
    assert activation(2, True) * GB == activations(LLAMA_7B, 8 * 1024, "float32")


def test_the_reward_model_is_the_trunk_and_reads_a_question_at_once():
    reward = {"batch_questions": 8, "dtype": "float32", "optimizer": "adamw"}
    found = estimates(params(reward=reward, machine={"microbatch_tokens": 100}), 2, False, FLAT)[
        "reward"
    ].gigabytes
    n = LLAMA_7B.of_trunk
    assert found["weights"] * GB == pytest.approx(4 * n, rel=1e-5)  # but for a row of scores
    assert found["moments"] / found["gradients"] == pytest.approx(2) and found["logits"] == 0
    assert found["activations"] * GB == activations(LLAMA_7B, 2 * 512, "float32")


def test_ppo_by_hand():
    n, dtype = LLAMA_7B.parameters, "bfloat16"
    ppo = {
        "batch_size": 64, "mini_batch_size": 8, "response_tokens": 100, "dtype": dtype, "ppo_epochs": 2,
        "updates": 9,
    }  # fmt: skip
    given = params(
        ppo=ppo,
        machine={"decode_rows": 4, "microbatch_rows": 3},
        pack={"prompt_tokens": 156, "document_tokens": 64},
    )
    found = estimates(given, 2, False, FLAT)["ppo"]
    assert found.steps == 9 and found.gigabytes["reference"] * GB == 4 * n
    assert found.gigabytes["scores"] * GB == 2 * 4 * (n - 32000 * 4096), "the reward model and the judge"
    assert found.gigabytes["activations"] * GB == activations(LLAMA_7B, 3 * 256, dtype)
    assert found.gigabytes["cache"] == 0, "the update's activations take more, later"
    sampling = 8 * 100 * 4 * n / 1e12  # 32 rows, 4 at a time; each token reads 4n bytes
    forwards = 32 * 256 * 2 * (4 * n - 32000 * 4096) / 50e12
    passes = 2 * 32 * 256 * 6 * n / 50e12
    assert found.seconds == pytest.approx(sampling + forwards + passes)
    again = params(
        ppo={**ppo, "gradient_checkpointing": True},
        pack=given.pack.model_dump(),
        machine=given.machine.model_dump(),
    )
    more = estimates(again, 2, False, FLAT)["ppo"]
    adapters = params(ppo={**ppo, "lora_rank": 4}, reward={"lora_rank": 2})
    beside = estimates(adapters, 2, False, FLAT)["ppo"].gigabytes
    assert beside["scores"] * GB == pytest.approx(2 * 4 * LLAMA_7B.of_lora(2)), "on the policy's base"
    assert more.seconds - found.seconds == pytest.approx(2 * 32 * 256 * 2 * n / 50e12)
    wide = params(
        ppo=ppo,
        machine={"decode_rows": 64, "microbatch_rows": 1},
        pack={"prompt_tokens": 156, "document_tokens": 64},
    )
    found = estimates(wide, 1, False, Device(tflops=1, utilisation=1, bandwidth=1e6))["ppo"]
    cache = kv_cache(LLAMA_7B, 64, 256, dtype) - activations(LLAMA_7B, 256, dtype)
    assert found.gigabytes["cache"] * GB == pytest.approx(cache)
    bound = (100 * 64 * 2 * n + 64 * 256 * (2 * (4 * n - 32000 * 4096) + 2 * 6 * n)) / 1e12
    assert found.seconds == pytest.approx(bound), "so narrow a device is bound by its arithmetic"


def test_shapes_come_from_the_configuration_the_table_or_a_folder(tmp_path):
    own = shape_of(Params().model)
    assert (own.hidden, own.layers, own.vocabulary, own.is_tied) == (128, 4, 1024, True)
    assert shape_of(params().model) == LLAMA_7B
    (tmp_path / "config.json").write_text(json.dumps(config(GROUPED).to_dict()))
    assert shape_of(params(model={"base": str(tmp_path)}).model) == GROUPED
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "gpt2", "n_embd": 16}))
    with pytest.raises(ParamsError, match=r"config\.json: no hidden_size; sizes are known of LLaMA-type"):
        shape_of(params(model={"base": str(tmp_path)}).model)
    with pytest.raises(ParamsError, match=r"model\.base: the shape of a/b is not in the table \(huggyllama"):
        shape_of(params(model={"base": "a/b"}).model)
    with pytest.raises(ParamsError, match=r"data/base/config\.json is missing"):
        shape_of(params(model={"base": "data/base"}).model)


def test_what_the_user_reads():
    text = describe(params(machine={"launch": "ddp"}, sft={"lora_rank": 16}), {"memory": "24"})
    head, *lines = text.splitlines()
    assert "6.738 billion parameters, 8 process(es); a GPU of 24 GB" in head
    assert lines[0].startswith("sft") and "more than 24" in lines[0] and "steps unknown" in lines[0]
    assert lines[4].startswith("ppo") and "100 steps" in lines[4]
    shared = describe(params(machine={"launch": "fsdp", "processes": 4}), {}).splitlines()
    assert "4 process(es), sharded" in shared[0] and shared[-1].startswith("ppo     needs machine.launch ddp")
    total = float(lines[0].split()[1])
    parts = [float(part.split()[-1]) for part in lines[1].split(",")]
    assert math.isclose(total, sum(parts), abs_tol=0.05)
    assert "1 process(es);" in describe(Params(), {})


@pytest.mark.parametrize(
    ("setting", "words"),
    [
        ("tflop=3", "tflop: no such setting"),
        ("tflops=x", "tflops: a number"),
        ("rows=-1", "rows: a positive"),
    ],
)
def test_a_wrong_setting_is_one_line(tmp_path, monkeypatch, capsys, setting, words):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "dvc.yaml").touch()
    assert main(["use", "sample"]) == 0 and main(["estimate"]) == 0
    assert "model.config" in capsys.readouterr().out
    assert main(["estimate", setting]) == 1 and words in capsys.readouterr().err


def test_what_is_not_trained_is_not_estimated():
    params = Params(reward={"way": "frozen_style", "base": "org/encoder"})
    assert list(estimates(params, 1, False, Device())) == ["sft", "ppo"]
    assert "reward  frozen_style: no training" in describe(params, {})

"""A quantised base: refused where it cannot run, asked for in transformers' words, never merged into.

No machine here has bitsandbytes and a GPU: both are pretended where the calls are to be seen.
"""

from __future__ import annotations

import json
import sys
from types import ModuleType, SimpleNamespace

import pytest
import tiny
import torch
from adapted import copied, lora, moved, rounded, same_state, saved_base, saved_policy
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

from tasks.lm import AutoModelForCausalLMWithValueHead as Valued
from tasks.lm.adapters.lora import add_adapter, merge_checked, merge_onto
from tasks.lm.model import loading, quantized
from tasks.lm.model.quantized import is_quantized, quantized_keys, read_quantized
from tasks.lm.numerics.optimizer import check_optimizer, make_optimizer

DOCUMENTS = tiny.drawn([3, 7, 5], seed=1)


@pytest.fixture
def gpu(monkeypatch):
    """As if there were one, with bitsandbytes."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda: True)
    monkeypatch.setattr(quantized, "find_spec", lambda name: name == "bitsandbytes")
    monkeypatch.setattr("transformers.BitsAndBytesConfig", SimpleNamespace)


def test_on_a_cpu_it_is_refused_before_anything_loads(tmp_path, monkeypatch):
    base = saved_base(tmp_path / "base")
    monkeypatch.setattr(loading, "_load", lambda *_, **__: pytest.fail("it was loaded"))
    for keys in ({"load_in_8bit": True}, {"load_in_4bit": True}, {"quantization_config": {"bits": 4}}):
        (name,) = keys
        with pytest.raises(ValueError, match=rf"^{name}: a quantised base needs a GPU.*a CPU; load it in f"):
            Valued.from_pretrained(base, peft_config=lora(), **keys)
    for kind in ("8bit", "4bit"):
        with pytest.raises(ValueError, match=rf"^model\.quantize: a quantised base \({kind}\) needs a G"):
            quantized_keys(kind)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(quantized, "find_spec", lambda _: None)
    with pytest.raises(ValueError, match=r"needs bitsandbytes, which is not installed: pip install it"):
        quantized_keys("4bit")


def test_a_checkpoint_that_is_quantised_itself_is_one_line(tmp_path):
    base = saved_base(tmp_path / "base")
    config = json.loads((base / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "bitsandbytes", "load_in_4bit": True}
    (base / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match=r"^base: cannot load .*bitsandbytes"):
        Valued.from_pretrained(base)


def test_what_is_asked_of_transformers(gpu):
    assert quantized_keys("none") == {}
    eight, four = quantized_keys("8bit"), quantized_keys("4bit")
    assert eight["device_map"] == four["device_map"] == {"": 0}
    asked, eight = four["quantization_config"], eight["quantization_config"]
    assert eight.load_in_8bit and not hasattr(eight, "load_in_4bit")
    assert asked.load_in_4bit and asked.bnb_4bit_quant_type == "nf4" and asked.bnb_4bit_use_double_quant
    assert asked.bnb_4bit_compute_dtype == torch.bfloat16
    assert {"lm_head", "score"} <= set(asked.llm_int8_skip_modules), "heads are read in full precision"
    assert eight.llm_int8_skip_modules == asked.llm_int8_skip_modules
    with pytest.raises(ValueError, match=r"model\.quantize is '3bit'; none, 8bit or 4bit"):
        quantized_keys("3bit")


def test_what_trls_users_ask(gpu):
    assert read_quantized({"a": 1}) == {"a": 1} == read_quantized({"a": 1, "load_in_8bit": False})
    assert read_quantized({"load_in_8bit": True, "a": 1})["quantization_config"].load_in_8bit
    assert read_quantized({"load_in_4bit": True, "device_map": "auto"})["device_map"] == "auto"
    own = object()
    assert read_quantized({"quantization_config": own}) == {"quantization_config": own, "device_map": {"": 0}}
    for other in ({"load_in_4bit": True}, {"quantization_config": own}):
        with pytest.raises(ValueError, match=r"load_in_8bit.*only one way"):
            read_quantized({"load_in_8bit": True, **other})


@pytest.mark.parametrize("auto", [AutoModelForCausalLM, AutoModelForSequenceClassification])
def test_an_adapter_of_a_quantised_base_goes_onto_the_base(tmp_path, auto):
    """The merged model is the base in full precision with the adapter's weights, vocabulary and head."""
    base = saved_base(tmp_path / "base")
    keys = {} if auto is AutoModelForCausalLM else {"num_labels": 1}
    quantised = rounded(auto.from_pretrained(base, **keys))
    quantised.resize_token_embeddings(40)
    model = moved(add_adapter(quantised, config=lora())).eval()
    assert is_quantized(model) and sum(p.requires_grad for p in model.parameters()) == 28 + bool(keys)
    before = copied(model)
    with pytest.raises(ValueError, match=r"quantised, and a merge .*load the base in float32 .*merge_onto"):
        merge_checked(model, DOCUMENTS)
    assert same_state(model, before)
    onto = auto.from_pretrained(base, **keys)
    onto.resize_token_embeddings(40)
    state = torch.get_rng_state()
    merged = merge_onto(onto, model, [*DOCUMENTS, [39]])
    assert torch.equal(torch.get_rng_state(), state) and same_state(model, before)
    assert not is_quantized(merged) and not hasattr(merged, "peft_config")
    for name in ("layers.0.mlp.up_proj", "layers.1.self_attn.q_proj"):
        layer = model.get_base_model().model.get_submodule(name)
        plain = auto.from_pretrained(base, **keys).model.get_submodule(name).weight
        wanted = plain + layer.get_delta_weight("default")
        assert tiny.far(merged.model.get_submodule(name).weight, wanted) < 1e-6
    wanted = model.get_base_model().get_input_embeddings().weight
    assert torch.equal(merged.get_input_embeddings().weight, wanted) and len(wanted) == 40
    if keys:
        head = model.get_base_model().score.modules_to_save["default"]
        assert torch.equal(merged.score.weight, head.weight)
    with pytest.raises(ValueError, match="base is quantised as well"):
        merge_onto(rounded(auto.from_pretrained(base, **keys)), model, DOCUMENTS)


def test_a_policy_over_a_quantised_base(tmp_path):
    """Its value head comes to stand over the merged model."""
    base = saved_base(tmp_path / "base")
    inside = add_adapter(rounded(AutoModelForCausalLM.from_pretrained(base)), config=lora())
    policy = moved(Valued(inside, v_head_init_strategy="normal")).eval()
    head = copied(policy.v_head)
    with pytest.raises(ValueError, match="is quantised"):
        merge_checked(policy, DOCUMENTS)
    assert merge_onto(AutoModelForCausalLM.from_pretrained(base), policy, DOCUMENTS) is policy
    assert not policy.is_peft_model and same_state(policy.v_head, head)
    policy.save_pretrained(tmp_path / "merged")
    found, ids = Valued.from_pretrained(tmp_path / "merged").eval(), torch.tensor([DOCUMENTS[1]])
    assert torch.equal(found(ids)[0], policy(ids)[0]) and torch.equal(found(ids)[2], policy(ids)[2])


def test_a_plain_folder_is_loaded_as_ever(tmp_path):
    saved_policy(tmp_path / "sft", saved_base(tmp_path / "base"))
    assert not is_quantized(Valued.from_pretrained(tmp_path / "sft", load_in_8bit=False).pretrained_model)


# ---- 8-bit AdamW


def test_eight_bit_adam_is_refused_by_its_key(monkeypatch):
    with pytest.raises(ValueError, match=r"^sft\.optimizer: adamw_8bit needs a GPU.*; take adamw"):
        check_optimizer("adamw_8bit", "sft.optimizer")
    with pytest.raises(ValueError, match=r"^optimizer: adamw_8bit needs a GPU"):
        make_optimizer(tiny.causal(), "adamw_8bit", 1e-3, 0.1)
    with pytest.raises(ValueError, match="x is 'lion'; adam, adamw, adamw_8bit, muon or sgd is wanted"):
        check_optimizer("lion", "x")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(quantized, "find_spec", lambda _: None)
    with pytest.raises(ValueError, match="needs bitsandbytes, which is not installed"):
        check_optimizer("adamw_8bit")


def test_eight_bit_adam_keeps_embeddings_whole(gpu, monkeypatch):
    asked = []
    manager = SimpleNamespace(register_module_override=lambda *given: asked.append(given))
    fake = ModuleType("bitsandbytes")
    fake.optim = SimpleNamespace(
        GlobalOptimManager=SimpleNamespace(get_instance=lambda: manager),
        AdamW8bit=lambda groups, **keys: (groups, keys),
    )
    monkeypatch.setitem(sys.modules, "bitsandbytes", fake)
    model = tiny.causal("gpt2")
    groups, keys = make_optimizer(model, "adamw_8bit", 1e-3, 0.1, (0.9, 0.99))
    assert keys == {"lr": 1e-3, "betas": (0.9, 0.99), "eps": 1e-8}
    assert [g["weight_decay"] for g in groups] == [0.1, 0.0]
    assert sum(len(g["params"]) for g in groups) == len(list(model.parameters()))
    tables = [model.transformer.wte, model.transformer.wpe]
    assert asked == [(table, "weight", {"optim_bits": 32}) for table in tables]

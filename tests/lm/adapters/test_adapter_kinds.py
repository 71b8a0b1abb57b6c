"""Every type and every initialisation of adapter that peft has: exact, or refused in one sentence.

The base keeps its bits while adapters are added, copied, switched, saved and loaded.
"""

from __future__ import annotations

import dataclasses
import typing
from copy import deepcopy
from functools import cache

import peft
import pytest
import tiny
import torch
from adapted import copied, lora, moved, rounded, same_state, saved_base, saved_scorer
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

from tasks.lm import AutoModelForCausalLMWithValueHead as Valued
from tasks.lm.adapters.active import at_work, reference_adapters
from tasks.lm.adapters.kinds import ADAPTIVE, OPTIONS, REFUSED, REPEATABLE, check_kind, rewrites
from tasks.lm.adapters.lora import add_adapter, merge_checked, stack_adapter
from tasks.lm.attention.forest import Segment, plant, run_forest, serve_forest
from tasks.lm.heads.scores import check_scorer

KINDS = {getattr(k, "value", k): v for k, v in peft.mapping.PEFT_TYPE_TO_CONFIG_MAPPING.items()}
OF_KIND = {  # what a type wants beside its target modules
    "ADALORA": {"total_step": 10}, "ADAPTION_PROMPT": {"adapter_len": 2, "adapter_layers": 1},
    "BOFT": {"boft_block_size": 4}, "C3A": {"block_size": 4}, "CPT": {"cpt_token_ids": [1, 2]},
    "FOURIERFT": {"n_frequency": 20}, "LN_TUNING": {"target_modules": ["input_layernorm", "norm"]},
    "IA3": {"target_modules": ["k_proj", "down_proj"], "feedforward_modules": ["down_proj"]},
    "OFT": {"oft_block_size": 4}, "ROAD": {"group_size": 8}, "WAVEFT": {"n_frequency": 20},
    "TRAINABLE_TOKENS": {"token_indices": [5, 6], "target_modules": ["embed_tokens"]},
    "VBLORA": {"num_vectors": 8, "vector_length": 4, "topk": 2}, "XLORA": {"adapters": {}},
}  # fmt: skip
NO_MERGE = {"BEFT"}  # of a layer without a bias
IDS = torch.tensor([[5, 6, 7, 8, 9, 3]])
INITS = typing.get_args(typing.get_type_hints(LoraConfig)["init_lora_weights"])
NAMED = [name.replace("[number of iters]", "4") for part in INITS for name in typing.get_args(part)]


def config_of(kind: str):
    """A small configuration of a type."""
    fields = {f.name for f in dataclasses.fields(KINDS[kind])}
    keys = {"target_modules": ["q_proj", "v_proj", "down_proj"], "r": 2, "num_virtual_tokens": 2}
    keys = {name: value for name, value in keys.items() if name in fields} | OF_KIND.get(kind, {})
    for name in ("r", "num_virtual_tokens") if kind in ("BOFT", "OFT", "CPT") else ():
        keys.pop(name, None)
    return KINDS[kind](task_type="CAUSAL_LM", **keys)


def is_refused(kind: str) -> bool:
    return issubclass(KINDS[kind], peft.PromptLearningConfig) or kind in {*REFUSED, *ADAPTIVE}


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return saved_base(tmp_path_factory.mktemp("kinds") / "base", num_key_value_heads=2)


@cache
def loaded(base):
    return AutoModelForCausalLM.from_pretrained(base)


def plain(base):
    return deepcopy(loaded(base))


@torch.no_grad()
def logits(model, ids=IDS):
    return model.eval()(input_ids=ids, use_cache=False).logits


def keeps(model, base) -> bool:
    """Whether every weight of the base stands in the model to the bit."""
    held = list(model.parameters())
    wanted = loaded(base).state_dict().values()
    return all(any(t.shape == w.shape and torch.equal(t, w) for t in held) for w in wanted)


@pytest.mark.parametrize("kind", sorted(k for k in KINDS if is_refused(k)))
def test_a_type_that_is_not_served_is_refused_at_every_door(kind, base, tmp_path):
    """As `peft_config`, on a user's own model, and from a file that holds one; the model is as it was."""
    config, model = config_of(kind), plain(base)
    before = logits(model)
    with pytest.raises(ValueError, match=rf"peft_config: {type(config).__name__} .*take LoRA") as found:
        Valued.from_pretrained(base, peft_config=config)
    assert "\n" not in str(found.value)
    with pytest.raises(ValueError, match="peft_config: "):
        add_adapter(model, config=config)
    assert torch.equal(logits(model), before)
    if kind not in ("XLORA", "ADAPTION_PROMPT"):  # peft itself wants another model for these
        own = get_peft_model(model, config)
        with pytest.raises(ValueError, match=rf"model: {type(config).__name__} "):
            Valued.from_pretrained(own)
        with pytest.raises(ValueError, match=rf"model: {type(config).__name__} "):
            check_scorer(own)


@pytest.mark.parametrize("kind", sorted(k for k in KINDS if not is_refused(k)))
def test_a_type_is_exact_and_leaves_the_base_alone(kind, base, tmp_path):
    """Made, moved, read in the forest, copied, switched, saved, loaded by plain peft and here, merged."""
    torch.manual_seed(1)
    policy = moved(Valued.from_pretrained(base, peft_config=config_of(kind)))
    model, began = policy.pretrained_model, logits(policy.pretrained_model)
    assert tiny.far(began, logits(loaded(base))) > 1e-3 and keeps(model, base)
    names = reference_adapters(model)
    assert names == ["reference"] and torch.equal(logits(model), began) and keeps(model, base)
    later = logits(moved(model, 9))
    assert tiny.far(later, began) > 1e-3
    with at_work(model, names) as reference:
        assert tiny.far(logits(reference), began) < 1e-6
    with at_work(model, []) as alone:
        assert torch.equal(logits(alone), logits(loaded(base)))
    assert torch.equal(logits(model), later) and keeps(model, base)
    policy.save_pretrained(tmp_path / "saved")
    assert keeps(model, base) and torch.equal(logits(model), later)
    assert tiny.far(logits(PeftModel.from_pretrained(plain(base), tmp_path / "saved")), later) < 1e-5
    again = Valued.from_pretrained(tmp_path / "saved").pretrained_model
    assert tiny.far(logits(again), later) < 1e-6 and keeps(again, base)
    with at_work(again, ["reference"]) as reference:
        assert tiny.far(logits(reference), began) < 1e-6
    assert serve_forest(model)
    pair = plant([Segment(IDS[0, :2].tolist()), Segment(IDS[0, 2:].tolist(), 0), Segment([4, 4], 0)])
    with torch.no_grad():
        assert tiny.far(run_forest(model, pair).logits[0, :6], later[0]) < 1e-5
    if kind in NO_MERGE:
        with pytest.raises(ValueError, match="Base layer has no bias, cannot merge"):
            merge_checked(model, [IDS[0].tolist()])
    else:
        assert tiny.far(logits(merge_checked(model, [IDS[0].tolist()])), later) < 1e-4


@pytest.mark.parametrize("more", [{}, {"use_dora": True}, "patterns"])
@pytest.mark.parametrize("init", [True, False, *NAMED])
def test_an_initialisation_is_exact_or_refused(init, more, base, tmp_path):
    """A user's own model and `peft_config`: the reference is what the policy was, and files bring it back."""
    if more == "patterns":
        more = {"rank_pattern": {"v_proj": 4}, "alpha_pattern": {"q_proj": 6}, "use_rslora": True}
    if init == "mica" and "use_dora" in more:
        pytest.skip("peft has no such thing")
    config = LoraConfig(r=2, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM", **more)
    config.init_lora_weights = init  # without what its preparation wants
    if (cut := rewrites(config)) and cut not in REPEATABLE:
        with pytest.raises(ValueError, match=f"peft_config: init_lora_weights='{init}' cuts out of the base"):
            Valued.from_pretrained(base, peft_config=config)
        return
    torch.manual_seed(1)
    model = get_peft_model(plain(base), config)
    if init is not False:
        assert tiny.far(logits(model), logits(loaded(base))) < 1e-5
    held = {n: v.clone() for n, v in model.state_dict().items()}
    policy = Valued.from_pretrained(moved(model))
    began, held = logits(model), {n: v for n, v in held.items() if "lora" not in n}
    same = lambda: all(torch.equal(model.state_dict()[n], v) for n, v in held.items())  # noqa: E731
    names = reference_adapters(model)
    assert names == ["reference"] and torch.equal(logits(model), began) and same()
    later = logits(moved(model, 9))
    with at_work(model, names) as reference:
        assert torch.equal(logits(reference), began)
    policy.save_pretrained(tmp_path / "saved")
    assert tiny.far(later, began) > 1e-3 and torch.equal(logits(model), later) and same()
    assert tiny.far(logits(PeftModel.from_pretrained(plain(base), tmp_path / "saved")), later) < 1e-5
    again = Valued.from_pretrained(tmp_path / "saved").pretrained_model
    assert tiny.far(logits(again), later) < 1e-5 and keeps(again, base)
    with at_work(again, ["reference"]) as reference:
        assert tiny.far(logits(reference), began) < 1e-5
    with at_work(again, []) as alone:
        assert torch.equal(logits(alone), logits(loaded(base)))
    assert not any(rewrites(each) for each in again.peft_config.values())
    assert tiny.far(logits(merge_checked(model, [IDS[0].tolist()])), later) < 1e-4


@pytest.mark.parametrize(("kind", "init"), [("llama", "pissa"), ("llama", "olora"), ("gpt2", "pissa")])
def test_a_reward_adapter_that_was_cut_out_of_the_base(init, kind, tmp_path):
    """Beside a policy it scores as its own model does, and the policy says what it said."""
    base = saved_base(tmp_path / "base", kind)
    scorer = saved_scorer(tmp_path / "reward", base, adapter=lora(init_lora_weights=init))
    policy = Valued.from_pretrained(base, peft_config=lora(), reward_adapter=tmp_path / "reward")
    assert torch.equal(logits(policy.pretrained_model), logits(loaded(base)))
    document = IDS[0].tolist()
    wanted = scorer(input_ids=IDS).logits[0, 0]
    assert tiny.far(policy.score_documents([document])[0], wanted) < 1e-5
    policy.save_pretrained(tmp_path / "saved")
    again = AutoModelForSequenceClassification.from_pretrained(base, num_labels=1)
    again = PeftModel.from_pretrained(again, tmp_path / "saved" / "reward_model_adapter").eval()
    assert tiny.far(again(input_ids=IDS).logits[0, 0], wanted) < 1e-5
    cut = Valued.from_pretrained(base, peft_config=lora(init_lora_weights=init))
    before = logits(cut.pretrained_model)
    with pytest.raises(ValueError, match=r"is of the base as it was, and the adapter default .*merge it"):
        Valued.from_pretrained(
            base, peft_config=lora(init_lora_weights=init), reward_adapter=tmp_path / "reward"
        )
    assert torch.equal(logits(cut.pretrained_model), before)


def test_nothing_is_stacked_that_moves_the_base(base, tmp_path):
    policy = moved(Valued.from_pretrained(base, peft_config=lora()))
    policy.save_pretrained(tmp_path / "sft")
    with pytest.raises(ValueError, match="would move the base from under the adapter that is there"):
        Valued.from_pretrained(tmp_path / "sft", peft_config=lora(init_lora_weights="pissa"))
    model = get_peft_model(plain(base), lora(), adapter_name="reference")
    stack_adapter(model, lora(init_lora_weights="orthogonal"))
    assert keeps(model, base)


def test_an_initialisation_that_nobody_has_heard_of_is_refused():
    config = lora()
    config.init_lora_weights = "of_next_year"
    with pytest.raises(ValueError, match="init_lora_weights='of_next_year' cuts out"):
        check_kind(config)


@pytest.mark.parametrize("option", OPTIONS)
def test_an_option_that_is_not_served_is_refused(option):
    config = lora(target_modules=["q_proj"])
    setattr(config, option, [(0, 2), (1, 2)])
    with pytest.raises(ValueError, match=f"peft_config: {option} is not served: it .*; leave") as found:
        add_adapter(tiny.causal(), config=config)
    assert "\n" not in str(found.value)


def test_an_adapter_that_transformers_put_on_is_refused():
    model = tiny.causal()
    model.add_adapter(lora(target_modules=["q_proj"]))
    with pytest.raises(ValueError, match=r"by transformers' own add_adapter; put it on with peft\."):
        Valued.from_pretrained(model)


def test_a_copy_that_says_something_else_is_taken_off_again(monkeypatch):
    """Whatever a type keeps outside its parameters, the reference is tried before it is believed."""
    model = moved(get_peft_model(tiny.causal(), lora()))
    before = logits(model)
    monkeypatch.setattr("tasks.lm.adapters.active._tensors_of", lambda *_: {})
    with pytest.raises(ValueError, match=r"a copy of the adapter default differs .* ref_model=create_ref"):
        reference_adapters(model)
    assert list(model.peft_config) == ["default"] and torch.equal(logits(model), before)
    assert any(p.requires_grad for p in model.parameters()) and model.active_adapters == ["default"]


@pytest.mark.parametrize("init", REPEATABLE)
def test_a_base_that_gives_no_part_of_itself_is_refused(init):
    config, quantised = lora(init_lora_weights=init), rounded(tiny.causal())
    before = copied(quantised)
    with pytest.raises(ValueError, match=f"init_lora_weights='{init}' would round LlamaForCausalLM"):
        add_adapter(quantised, config=config)
    assert same_state(quantised, before)
    if init == "olora":
        with pytest.raises(ValueError, match="'olora' does not fit GPT2LMHeadModel's layers; take 'pissa'"):
            add_adapter(tiny.causal("gpt2"), config=config)


def test_a_tied_adapter_that_cannot_be_copied_is_said(base):
    """One LoRA for the two layers of one table: peft's second adapter is not tied as the first."""
    config = lora(target_modules=["embed_tokens", "q_proj"], ensure_weight_tying=True)
    model = moved(get_peft_model(tiny.causal(tie_word_embeddings=True), config))
    before = logits(model)
    with pytest.raises(ValueError, match=r"ref_model: .*; give ref_model=create_reference_model\(model\)"):
        reference_adapters(model)
    assert torch.equal(logits(model), before) and list(model.peft_config) == ["default"]


def test_a_refusal_of_pefts_own_is_said_as_ours():
    model = moved(get_peft_model(tiny.causal(), lora(bias="lora_only")))
    with pytest.raises(ValueError, match=r"the adapter default cannot be copied .*; give ref_model="):
        reference_adapters(model)
    assert list(model.peft_config) == ["default"]

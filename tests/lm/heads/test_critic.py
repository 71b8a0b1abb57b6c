"""Blocks of the critic's own: they begin as the policy's, and only the value loss moves them."""

from __future__ import annotations

import pytest
import tiny
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file

from tasks.lm import AutoModelForCausalLMWithValueHead, create_reference_model
from tasks.lm.attention.forest import serve_forest
from tasks.lm.attention.padding import lay_out
from tasks.lm.heads.policy_files import VALUE_HEAD
from tasks.lm.heads.value_branch import ValueBranch
from tasks.lm.logprobs.responses import read_responses
from tasks.lm.model.freezing import blocks_of

KINDS = ["llama", "gpt2", "opt", "gpt_neox", "qwen2", "gemma"]
NARROW = {"word_embed_proj_dim": 8, "do_layer_norm_before": False}  # OPT-350m
IDS = torch.tensor([[5, 6, 7, 8], [9, 4, 3, 2]])
Valued = AutoModelForCausalLMWithValueHead


def lora(**keys) -> LoraConfig:
    return LoraConfig(r=2, target_modules="all-linear", **keys)


def valued(model, k: int = 0):
    """With a value head that is not zero, the same for every k."""
    wrapped = Valued(model, num_value_layers_unfrozen=k)
    wrapped.v_head.summary.weight.data.normal_(generator=torch.Generator().manual_seed(3))
    return wrapped


def laid_out():
    """Two rows share a prompt; one response is empty."""
    prompts = tiny.drawn((4, 9, 1), 1)
    return lay_out([*prompts, prompts[1]], [*tiny.drawn((5, 1, 3), 2), []], tiny.PAD, "cpu")


def names(model, part) -> set[str]:
    """The model's names of the parameters of a part."""
    own = {id(parameter) for parameter in part.parameters()}
    return {name for name, parameter in model.named_parameters() if id(parameter) in own}


def loud(module, deviation: float = 0.3):
    """Moved by as much as learning would."""
    torch.manual_seed(4)
    for parameter in module.parameters():
        parameter.data.add_(deviation * torch.randn_like(parameter))


@pytest.mark.parametrize("planted", [False, True])
@pytest.mark.parametrize("k", [1, 2])
@pytest.mark.parametrize("kind", [*KINDS, "bloom", "gptj", "mamba", "gemma2", "cohere", "phi3"])
@torch.no_grad()
def test_values_begin_as_those_of_a_plain_head(kind, k, planted):
    plain, own = (valued(tiny.causal(kind), layers) for layers in (0, k))
    assert len(own.v_head.branch.blocks) == k
    if planted:
        assert serve_forest(own.pretrained_model) or kind in ("bloom", "gptj", "mamba", "gemma2")
    assert tiny.far(own(IDS)[2], plain(IDS)[2]) <= 1e-6 and own(IDS)[2].any()
    found, wanted = (read_responses(model, laid_out(), 0.7)[2] for model in (own, plain))
    assert tiny.far(found, wanted) <= 1e-6


@pytest.mark.parametrize("keys", [NARROW, {"do_layer_norm_before": False}])
@torch.no_grad()
def test_a_projection_behind_the_last_block_is_copied_too(keys):
    plain, own = (valued(tiny.causal("opt", **keys), k) for k in (0, 1))
    assert len(own.v_head.branch.between) == len(keys) - 1
    assert tiny.far(own(IDS)[2], plain(IDS)[2]) <= 1e-6
    adapted = valued(get_peft_model(tiny.causal("opt", **keys), lora(init_lora_weights=False)), 1)
    read = adapted.v_head.branch
    assert not any("lora" in name or "base_layer" in name for name in read.state_dict())


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("planted", [False, True])
def test_what_the_value_loss_reaches(kind, planted):
    """Not the policy's copied block nor its last norm; the trunk below it, the branch, and the head."""
    model = valued(tiny.causal(kind, tie_word_embeddings=False), 1)
    assert not planted or serve_forest(model.pretrained_model)
    for read in (lambda: model(IDS)[2], lambda: read_responses(model, laid_out(), 0.7)[2]):
        read().square().sum().backward()
        moved = {n for n, g in tiny.gradients(model).items() if g.any()}
        first, last = (names(model, block) for block in blocks_of(model.pretrained_model))
        behind = (
            {n for n in names(model, model.pretrained_model) if "norm" in n or "ln_f" in n} - first - last
        )
        assert behind and not moved & (last | behind | names(model, model.pretrained_model.lm_head))
        assert names(model, model.v_head) <= moved and len(moved & first) >= 0.8 * len(first)
    logprobs, _, values = read_responses(model, laid_out(), 0.7, freeze_trunk=True)
    values.square().sum().backward()
    assert not logprobs.requires_grad and set(tiny.gradients(model)) == names(model, model.v_head)


@pytest.mark.parametrize("kind", KINDS)
def test_in_the_forest_as_in_padded_rows(kind):
    """After both have moved apart: values and all gradients, of the policy's loss and the critic's."""
    found = []
    for planted in (False, True):
        model = valued(tiny.causal(kind), 1)
        loud(model.v_head.branch)
        assert not planted or serve_forest(model.pretrained_model)
        logprobs, _, values = read_responses(model, laid_out(), 0.7)
        (logprobs.square().sum() + 2 * values.square().sum()).backward()
        found.append((values.detach(), tiny.gradients(model)))
    assert tiny.far(found[1][0], found[0][0]) <= 1e-5
    assert tiny.far_gradients(found[1][1], found[0][1]) <= 1e-5
    plain = valued(tiny.causal(kind))
    assert tiny.far(found[0][0], read_responses(plain, laid_out(), 0.7)[2]) > 1e-2, "the branch is read"


@pytest.mark.parametrize("kind", ["llama", "gpt2", "opt"])
@torch.no_grad()
def test_padding_changes_no_value_of_the_branch(kind):
    model = valued(tiny.causal(kind), 1)
    loud(model.v_head.branch)
    wanted, mask = model(IDS)[2], torch.tensor([[0, 0, 1, 1, 1, 1]] * 2)
    found = model(torch.cat([torch.full((2, 2), 17), IDS], 1), attention_mask=mask)[2][:, 2:]
    assert tiny.far(found, wanted) <= 1e-5


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("planted", [False, True])
@pytest.mark.parametrize("kind", ["llama", "gpt2", "opt", "gpt_neox"])
def test_under_gradient_checkpointing(kind, planted, reentrant):
    """Which works in training mode alone; there is no dropout here."""
    found = []
    for checkpointed in (False, True):
        model = valued(tiny.causal(kind, **tiny.NO_DROPOUT), 1).train()
        assert not planted or serve_forest(model.pretrained_model)
        if checkpointed:
            model.gradient_checkpointing_enable({"use_reentrant": reentrant})
        logprobs, _, values = read_responses(model, laid_out(), 0.7)
        assert all(b.gradient_checkpointing is checkpointed for b in model.v_head.branch.blocks)
        (logprobs.square().sum() + values.square().sum()).backward()
        found.append((values.detach(), tiny.gradients(model)))
    assert tiny.far(found[1][0], found[0][0]) <= 1e-6
    assert tiny.far_gradients(found[1][1], found[0][1]) <= 1e-5


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("fresh", [True, False])
def test_under_an_adapter(kind, fresh):
    """The branch has no adapter: what one says already is merged into it. All of it learns."""
    policy = get_peft_model(tiny.causal(kind), lora(init_lora_weights=fresh))
    before = {n: p.clone() for n, p in policy.named_parameters()}
    plain, own = (valued(policy, k) for k in (0, 1))
    branch = own.v_head.branch
    assert not any("lora" in name or "base_layer" in name for name, _ in branch.named_modules())
    assert all(p.requires_grad for p in branch.parameters())
    assert tiny.far(own(IDS)[2], plain(IDS)[2]) <= 1e-5
    assert all(torch.equal(p, before[n]) for n, p in policy.named_parameters()), (
        "nothing merged in the policy"
    )
    assert serve_forest(policy)
    logprobs, _, values = read_responses(own, laid_out(), 0.7)
    (logprobs.sum() + values.square().sum()).backward()
    learns = tiny.gradients(own)
    assert all("lora_" in n or n.startswith("v_head.") for n in learns)
    assert all(n in learns for n, _ in own.named_parameters() if n.startswith("v_head."))


def test_what_an_adapter_trains_whole_is_copied_as_trained():
    policy = get_peft_model(tiny.causal(), LoraConfig(target_modules=["q_proj"], modules_to_save=["norm"]))
    loud(policy.base_model.model.model.norm.modules_to_save)
    plain, own = (valued(policy, k) for k in (0, 1))
    assert set(own.v_head.branch.between.state_dict()) == {"0.weight"}
    assert tiny.far(own(IDS)[2], plain(IDS)[2]) <= 1e-6


def test_it_is_saved_and_loaded(tmp_path):
    """In the value head's file; a plain model's folder stays plain."""
    model = valued(tiny.causal(), 1)
    loud(model.v_head.branch)
    model.save_pretrained(tmp_path)
    names = load_file(tmp_path / VALUE_HEAD)
    assert "summary.weight" in names and "branch.blocks.0.self_attn.q_proj.weight" in names
    assert "branch.between.0.weight" in names and len(names) == 2 + 9 + 1
    for asked in (None, 1):
        found = Valued.from_pretrained(tmp_path, num_value_layers_unfrozen=asked)
        assert torch.equal(found(IDS)[2], model(IDS)[2])
    for asked in (0, 2):
        with pytest.raises(
            ValueError, match=rf"num_value_layers_unfrozen is {asked}; .* a value branch of 1"
        ):
            Valued.from_pretrained(tmp_path, num_value_layers_unfrozen=asked)
    del names["branch.between.0.weight"]
    save_file(names, tmp_path / VALUE_HEAD)
    with pytest.raises(ValueError, match=r"(?s)saved value head does not fit.*branch\.between\.0\.weight"):
        Valued.from_pretrained(tmp_path)
    plain = valued(tiny.causal())
    plain.save_pretrained(tmp_path)
    found = Valued.from_pretrained(tmp_path, num_value_layers_unfrozen=2)
    assert tiny.far(found(IDS)[2], plain(IDS)[2]) <= 1e-6, "a saved head goes on with blocks of its own"


@torch.no_grad()
def test_in_half_precision():
    plain, own = (valued(tiny.causal().bfloat16(), k) for k in (0, 1))
    assert {p.dtype for p in own.v_head.branch.parameters()} == {torch.bfloat16}
    assert torch.equal(own(IDS)[2], plain(IDS)[2]) and own(IDS)[2].dtype == torch.float32
    with torch.autocast("cpu", torch.bfloat16):
        mixed = valued(tiny.causal(), 1)
        assert tiny.far(mixed(IDS)[2], valued(tiny.causal(), 1)(IDS)[2]) <= 5e-2


@pytest.mark.parametrize("k", [-1, 0, 3])
def test_more_blocks_than_there_are(k):
    for door in (ValueBranch, lambda model, k: Valued(model, num_value_layers_unfrozen=k)):
        if k or door is ValueBranch:
            with pytest.raises(
                ValueError, match=rf"num_value_layers_unfrozen is {k}; the model has 2 blocks"
            ):
                door(tiny.causal(), k)


def test_what_copies_cannot_repeat_is_refused(monkeypatch):
    """Here the states are scaled behind the last norm, by no module."""
    model = tiny.causal()
    forward = model.model.forward

    def scaled(*args, **keys):
        out = forward(*args, **keys)
        out.last_hidden_state = 1.01 * out.last_hidden_state
        return out

    monkeypatch.setattr(model.model, "forward", scaled)
    with pytest.raises(ValueError, match="copies do not say what LlamaForCausalLM says"):
        Valued(model, num_value_layers_unfrozen=1)


def test_a_quantised_model_is_refused():
    model = tiny.causal()
    whole = torch.zeros(16, 16, dtype=torch.int8)
    model.model.layers[1].self_attn.q_proj.weight_codes = torch.nn.Parameter(whole, requires_grad=False)
    with pytest.raises(ValueError, match="LlamaForCausalLM is quantised"):
        Valued(model, num_value_layers_unfrozen=1)


def test_a_cache_is_refused():
    model = valued(tiny.causal(), 1)
    with pytest.raises(ValueError, match="past_key_values: a value branch keeps no cache"):
        model(IDS, return_past_key_values=True)
    assert model.generate(IDS, max_new_tokens=2, do_sample=False).shape == (2, 6)


def test_the_trial_leaves_no_trace():
    """No hook, no other mode, no random number; the policy shares nothing but its configuration."""
    model = tiny.causal("gpt2", resid_pdrop=0.5).train()
    model.transformer.h[0].eval()
    modes, state = [m.training for m in model.modules()], torch.get_rng_state()
    branch = ValueBranch(model, 1)
    assert torch.equal(torch.get_rng_state(), state) and [m.training for m in model.modules()] == modes
    assert not any(m._forward_pre_hooks or m._forward_hooks for m in [*model.modules(), *branch.modules()])
    assert not {p.data_ptr() for p in branch.parameters()} & {p.data_ptr() for p in model.parameters()}
    assert branch.blocks[0].attn.config is model.transformer.h[1].attn.config


def test_a_reference_of_it_follows_its_own_configuration():
    """A copy of the whole is one that is planted by itself."""
    model = valued(tiny.causal(), 1)
    loud(model.v_head.branch)
    reference = create_reference_model(model)
    assert serve_forest(reference.pretrained_model)
    found, wanted = (read_responses(each, laid_out(), 0.7)[2] for each in (reference, model))
    assert tiny.far(found, wanted) <= 1e-5

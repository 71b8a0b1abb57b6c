"""Which weights Muon takes, and that both parts are torch's own."""

from __future__ import annotations

import copy
import re

import pytest
import tiny
import torch
from torch.optim import SGD, Adam, AdamW, Muon
from torch.optim.lr_scheduler import LambdaLR

from tasks.lm import AutoModelForCausalLMWithValueHead
from tasks.lm.numerics import optimizer as optimizers
from tasks.lm.numerics.optimizer import BETAS, MuonAdamW, make_optimizer, newton_schulz


def names(model, parameters) -> set[str]:
    known = {id(p): n for n, p in model.named_parameters()}
    return {known[id(p)] for p in parameters}


def taken(model, part) -> set[str]:
    return names(model, [p for group in part.param_groups for p in group["params"]])


@pytest.mark.parametrize("make", [tiny.causal, tiny.scorer])
@pytest.mark.parametrize("kind", ["llama", "gpt2", "opt", "gpt_neox", "gemma"])
def test_muon_takes_the_hidden_matrices_alone(make, kind):
    """Embeddings (of positions too), heads, norms and biases stay with AdamW."""
    model = make(kind)
    muon, adamw = make_optimizer(model, "muon", 1e-3, 0.1).parts.values()
    inner, outer = taken(model, muon), taken(model, adamw)
    layers = r"(layers|h)\.\d+\.(.*(attn|attention|mlp).*|fc[12])"
    assert inner == {n for n, p in model.named_parameters() if p.ndim == 2 and re.search(layers, n)}, (
        "matrices of the layers"
    )
    assert not inner & outer and inner | outer == {n for n, _ in model.named_parameters()}
    assert any("emb" in n or "wte" in n for n in outer)


@pytest.mark.parametrize("name", ["muon", "adamw"])
def test_frozen_weights_are_left_out(name):
    model = tiny.causal()
    model.model.layers[0].requires_grad_(False)
    optimizer = make_optimizer(model, name, 1e-3, 0.1)
    found = names(model, [p for group in optimizer.param_groups for p in group["params"]])
    assert found == {n for n, _ in model.named_parameters() if "layers.0." not in n}


def test_adamw_decays_matrices_alone():
    model = tiny.causal("gpt2")
    optimizer = make_optimizer(model, "adamw", 1e-3, 0.1)
    for group in optimizer.param_groups:
        assert group["betas"] == BETAS and group["lr"] == 1e-3
        assert {p.ndim >= 2 for p in group["params"]} == {group["weight_decay"] == 0.1}


def step(model, seed) -> None:
    draw = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        parameter.grad = torch.randn(parameter.shape, generator=draw)


@pytest.mark.parametrize("shape", [(3, 16, 16), (2, 24, 8), (2, 8, 24)])
def test_products_in_float32_are_as_near_as_those_in_bfloat16(monkeypatch, shape):
    """Of the same bfloat16 factors, for processors that cannot multiply them; float64 is the truth."""
    group = {"ns_coefficients": (3.4445, -4.775, 2.0315), "ns_steps": 5, "eps": 1e-7}
    matrices = torch.randn(shape, generator=torch.Generator().manual_seed(0)).bfloat16()
    exact, far = newton_schulz(matrices.double(), group), []
    for has_instructions in (True, False):
        monkeypatch.setattr(optimizers, "multiplies_bfloat16", lambda device, has=has_instructions: has)
        found = newton_schulz(matrices, group)
        assert found.dtype == torch.bfloat16 and found.shape == matrices.shape
        far.append((found.double() - exact).abs().mean().item())
    assert far[1] < 1.5 * far[0] and far[1] < 0.02


def test_a_step_is_torchs_own(monkeypatch):
    monkeypatch.setattr("tasks.lm.numerics.optimizer.multiplies_bfloat16", lambda device: True)
    ours, theirs = tiny.causal(), tiny.causal()
    optimizer = make_optimizer(ours, "muon", 3e-3, 0.1)
    inner = taken(ours, optimizer.parts["muon"])
    named = dict(theirs.named_parameters())
    muon = Muon(
        [p for n, p in named.items() if n in inner], lr=3e-3, weight_decay=0.1, adjust_lr_fn="match_rms_adamw"
    )
    adamw = AdamW(
        [p for n, p in named.items() if n not in inner], lr=3e-3, weight_decay=0.1, betas=(0.9, 0.95)
    )
    for number in range(3):
        step(ours, number)
        step(theirs, number)
        for each in (optimizer, muon, adamw):
            each.step()
            each.zero_grad()
    for (name, found), wanted in zip(ours.named_parameters(), theirs.parameters(), strict=True):
        assert torch.equal(found, wanted), name
        assert found.grad is None
    assert not torch.equal(ours.lm_head.weight, tiny.causal().lm_head.weight)


@pytest.mark.parametrize("name", ["muon", "adamw"])
def test_a_saved_state_goes_on_bit_for_bit(name):
    whole = tiny.causal()
    optimizer = make_optimizer(whole, name, 1e-3, 0.1)
    for number in range(4):
        step(whole, number)
        optimizer.step()
        if number == 1:
            weights = copy.deepcopy(whole.state_dict())
            state = copy.deepcopy(optimizer.state_dict())
    resumed = tiny.causal(seed=5)
    resumed.load_state_dict(weights)
    optimizer = make_optimizer(resumed, name, 1e-3, 0.1)
    optimizer.load_state_dict(state)
    for number in (2, 3):
        step(resumed, number)
        optimizer.step()
    for a, b in zip(resumed.parameters(), whole.parameters(), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("loaded", [False, True])
def test_one_schedule_moves_both_parts(loaded):
    model = tiny.causal()
    optimizer = make_optimizer(model, "muon", 1.0, 0.0)
    schedule = LambdaLR(optimizer, lambda n: 0.5**n)
    step(model, 0)
    optimizer.step()
    if loaded:
        optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    schedule.step()
    rates = [group["lr"] for part in optimizer.parts.values() for group in part.param_groups]
    assert rates == [0.5, 0.5] == [group["lr"] for group in optimizer.param_groups]


def test_both_parts_are_stepped():
    model = tiny.causal()
    optimizer = make_optimizer(model, "muon", 1e-2, 0.0)
    assert isinstance(optimizer, MuonAdamW)
    before = copy.deepcopy(model.state_dict())
    step(model, 0)
    optimizer.step()
    assert all(not torch.equal(v, before[n]) for n, v in model.state_dict().items())


def test_a_part_without_weights_is_left_out():
    """An adapter has matrices alone; a frozen trunk leaves the head and a norm."""
    for keep, name in ((".mlp.", "muon"), ("norm", "adamw")):
        model = tiny.causal()
        for key, weight in model.named_parameters():
            weight.requires_grad_(keep in key)
        optimizer = make_optimizer(model, "muon", 1e-3, 0.0)
        assert list(optimizer.parts) == [name]
        model(input_ids=torch.tensor([[5, 6, 7]])).logits.sum().backward()
        before = [p.clone() for p in model.parameters() if p.requires_grad]
        optimizer.step()
        assert not any(map(torch.equal, before, (p for p in model.parameters() if p.requires_grad)))
        optimizer.load_state_dict(optimizer.state_dict())


def test_adam_and_sgd_are_torchs():
    model = tiny.causal("gpt2")
    adam = make_optimizer(model, "adam", 1e-3, 0.0, (0.9, 0.95))
    assert type(adam) is Adam and adam.param_groups[0]["betas"] == (0.9, 0.95)
    assert taken(model, adam) == {n for n, _ in model.named_parameters()}
    with pytest.raises(ValueError, match=r"^x: adam has no weight decay \(0\.1\); adamw has"):
        make_optimizer(model, "adam", 1e-3, 0.1, key="x")
    sgd = make_optimizer(model, "sgd", 1e-3, 0.1)
    assert type(sgd) is SGD and all(g["momentum"] == 0.9 and g["lr"] == 1e-3 for g in sgd.param_groups)
    assert {(p.ndim >= 2) for g in sgd.param_groups if g["weight_decay"] for p in g["params"]} == {True}
    assert taken(model, sgd) == {n for n, _ in model.named_parameters()}


@pytest.mark.parametrize("layers", [0, 1])
def test_muon_leaves_the_value_head_to_adamw(layers):
    """But takes the matrices of its blocks."""
    model = AutoModelForCausalLMWithValueHead(tiny.causal(), num_value_layers_unfrozen=layers)
    muon, adamw = make_optimizer(model, "muon", 1e-3, 0.1, (0.9, 0.95)).parts.values()
    assert {"v_head.summary.weight", "pretrained_model.lm_head.weight"} <= taken(model, adamw)
    assert len([n for n in taken(model, muon) if n.startswith("v_head.")]) == 7 * layers
    assert adamw.param_groups[0]["betas"] == (0.9, 0.95)

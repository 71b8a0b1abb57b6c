"""The switch to oneDNN: taken only where it is exact and clearly faster, and given back."""

from __future__ import annotations

import pytest
import tiny
import torch

from tasks.lm.numerics import matmul
from tasks.lm.numerics.matmul import ONEDNN, default_products, use_onednn_products

SWITCH = torch.backends.mkldnn.matmul


@pytest.fixture(autouse=True)
def as_before():
    before = SWITCH.fp32_precision
    yield
    SWITCH.fp32_precision = before


@pytest.fixture
def faster(monkeypatch):
    """oneDNN seems to need so much of the default's second, in each of the three products."""

    def pretend(*parts):
        busy = [3.0] + [1.0] * (matmul.TRIALS - 1)
        times = iter([t for part in parts for slow in busy for t in (1.0, slow * part)])
        monkeypatch.setattr(matmul, "_seconds", lambda product, precision: next(times))
        monkeypatch.setattr(matmul, "is_amd", lambda: False)

    return pretend


def state() -> tuple[str, str]:
    return SWITCH.fp32_precision, torch.get_float32_matmul_precision()


def test_where_it_is_exact_and_faster_it_is_on(faster):
    faster(0.5, 0.5, 0.9)
    assert use_onednn_products() and SWITCH.fp32_precision == ONEDNN


@pytest.mark.parametrize("parts", [(1.0, 1.0, 1.0), (0.5, 0.5, 1.1), (1.1, 0.5, 0.5)])
def test_where_they_gain_too_little_nothing_changes(faster, parts):
    before = state()
    faster(*parts)
    assert not use_onednn_products() and state() == before


def test_on_amd_it_need_not_show_a_gain(monkeypatch, faster):
    if not matmul._is_exact():
        pytest.skip("on this CPU oneDNN rounds float32 products")
    faster(1.1, 1.1, 1.1)
    monkeypatch.setattr(matmul, "is_amd", lambda: True)
    assert use_onednn_products() and SWITCH.fp32_precision == ONEDNN


def test_whose_processor_it_is(tmp_path):
    facts = tmp_path / "cpuinfo"
    assert not matmul.is_amd(facts)
    for vendor, wanted in (("GenuineIntel", False), ("AuthenticAMD", True)):
        facts.write_text(f"processor\t: 0\nvendor_id\t: {vendor}\n")
        assert matmul.is_amd(facts) is wanted


@pytest.mark.parametrize("broken", range(3))
def test_where_one_product_is_rounded_nothing_changes(monkeypatch, faster, broken):
    """As on a CPU that has bfloat16 instructions for float32 products."""

    def rounded(*factors):
        found, low = list(linear(*factors)), linear(*(x.bfloat16() for x in factors))
        if SWITCH.fp32_precision == ONEDNN:
            found[broken] = lambda: low[broken]().float()
        return found

    linear, before = matmul._linear, state()
    monkeypatch.setattr(matmul, "_linear", rounded)
    faster(0.1, 0.1, 0.1)
    assert not use_onednn_products() and state() == before


def test_not_a_number_is_not_exact(monkeypatch, faster):
    linear = matmul._linear
    monkeypatch.setattr(matmul, "_linear", lambda *f: [lambda p=p: p() * float("nan") for p in linear(*f)])
    faster(0.1, 0.1, 0.1)
    assert not use_onednn_products()


def test_without_onednn_nothing_changes(monkeypatch, faster):
    monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: False)
    faster(0.1, 0.1, 0.1)
    assert not use_onednn_products() and SWITCH.fp32_precision != ONEDNN


def test_inside_the_default_is_back_and_afterwards_it_is_on_again(faster):
    faster(0.1, 0.1, 0.1)
    before = state()
    assert use_onednn_products()
    with pytest.raises(KeyError), default_products():
        assert state() == before
        raise KeyError
    assert SWITCH.fp32_precision == ONEDNN


@pytest.mark.parametrize("precision", ["none", ONEDNN])
def test_what_is_timed_runs_under_its_precision(precision):
    seen = []
    assert matmul._seconds(lambda: seen.append(SWITCH.fp32_precision), precision) > 0
    assert seen == [precision]


def test_the_self_test_itself():
    """Its verdict differs from machine to machine; what it leaves behind is exact on each."""
    before, is_on = state(), use_onednn_products()
    assert (SWITCH.fp32_precision == ONEDNN) is is_on
    assert is_on or state() == before
    rows, weights = torch.randn(96, 64), torch.randn(80, 64)
    assert tiny.far(rows @ weights.T, rows.double() @ weights.double().T) <= 1e-5


def test_a_models_gradients_are_the_same(faster):
    """Loss and gradients, wherever oneDNN passes for exact."""
    if not matmul._is_exact():
        pytest.skip("on this CPU oneDNN rounds float32 products")
    found = []
    for parts in ((1.0, 1.0, 1.0), (0.1, 0.1, 0.1)):
        faster(*parts)
        assert use_onednn_products() is (parts[0] == 0.1)
        model = tiny.causal(hidden_size=64, intermediate_size=96)
        ids = torch.tensor(tiny.drawn((40, 40)))
        loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        found.append((loss.item(), tiny.gradients(model)))
    assert tiny.far(found[1][0], found[0][0]) <= 1e-5
    assert tiny.far_gradients(found[1][1], found[0][1]) <= 1e-5

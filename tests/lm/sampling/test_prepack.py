"""Packed layers compute what they computed, and nothing of them stays."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from tasks.lm.sampling import prepack
from tasks.lm.sampling.prepack import can_pack, prepacked


class Other(nn.Linear):
    """A linear layer that computes in a way of its own."""


def layers() -> nn.ModuleDict:
    torch.manual_seed(0)
    wrapped = nn.Linear(512, 512)
    wrapped.forward = lambda x: x  # as accelerate does
    made = {
        "plain": nn.Linear(512, 300), "without_bias": nn.Linear(512, 256, bias=False),
        "conv": Conv1D(300, 512), "small": nn.Linear(512, 255), "other": Other(512, 512), "wrapped": wrapped,
    }  # fmt: skip
    return nn.ModuleDict(made).requires_grad_(True)


LARGE = ("plain", "without_bias", "conv")


@pytest.mark.parametrize("dtype", [None, torch.bfloat16])
@pytest.mark.parametrize("rows", [1, 16, 700])
@torch.no_grad()
def test_the_products_are_the_same(dtype, rows):
    made, x = layers(), torch.randn(rows, 1, 512)
    exact = {name: made[name](x).double() for name in LARGE}
    with torch.autocast("cpu", dtype, enabled=dtype is not None):
        usual = {name: made[name](x) for name in LARGE}
        with prepacked(made, dtype):
            assert [name for name in made if "forward" in vars(made[name])] == [*LARGE, "wrapped"]
            found = {name: made[name](x) for name in LARGE}
    for name in LARGE:
        assert found[name].dtype == usual[name].dtype and found[name].shape == usual[name].shape
        far = (found[name].double() - exact[name]).abs().max() / exact[name].abs().max()
        assert far < (1e-6 if dtype is None else 1e-2)
    assert [name for name in made if "forward" in vars(made[name])] == ["wrapped"]


@pytest.mark.skipif(
    not torch.ops.mkldnn._is_mkldnn_bf16_supported(), reason="no instructions for bfloat16 on this processor"
)
def test_weights_of_another_dtype_are_packed_in_their_own():
    made, x = layers().to(torch.bfloat16), torch.randn(5, 512, dtype=torch.bfloat16)
    with torch.no_grad(), prepacked(made):
        assert "forward" in vars(made["plain"]) and made["plain"](x).dtype == torch.bfloat16
    del made["other"], made["wrapped"]
    with prepacked(made.double()):
        assert not any("forward" in vars(layer) for layer in made.values()), "float64 is not packed"


def test_nothing_stays_after_an_error(monkeypatch):
    made = layers()
    with pytest.raises(KeyError), prepacked(made):
        raise KeyError
    assert "forward" not in vars(made["plain"])
    forward, calls = prepack._forward, []

    def fail(*args):
        calls.append(args)
        if len(calls) == 2:
            raise MemoryError
        return forward(*args)

    monkeypatch.setattr(prepack, "_forward", fail)
    with pytest.raises(MemoryError), prepacked(made):
        pass
    assert len(calls) == 2 and "forward" not in vars(made["plain"]), "nor when the packing fails half-way"


def test_without_the_private_operations(monkeypatch):
    """float32 stays as it is; for bfloat16 the weights are cast once."""
    monkeypatch.setattr(prepack, "can_pack", lambda dtype: False)
    made, x = layers(), torch.randn(4, 512)
    with torch.no_grad(), prepacked(made):
        assert "forward" not in vars(made["plain"])
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        wanted = [made[name](x) for name in LARGE]
        with prepacked(made, torch.bfloat16):
            assert all("forward" in vars(made[name]) for name in LARGE)
            found = [made[name](x) for name in LARGE]
    for a, b in zip(found, wanted, strict=True):
        assert a.dtype == b.dtype and (a - b).abs().max() <= 0.01 * b.abs().max()


def test_the_self_test_refuses_what_is_missing_or_wrong(monkeypatch):
    assert can_pack(torch.float32) and not can_pack(torch.float64)

    def again(**operations):
        for name, operation in operations.items():
            monkeypatch.setattr(torch.ops.mkldnn, name, operation)
        can_pack.cache_clear()
        return can_pack(torch.float32)

    def missing(*_):
        raise AttributeError("no such operation")

    right = torch.ops.mkldnn._linear_pointwise
    try:
        assert again(_linear_pointwise=right)
        assert not again(_linear_pointwise=lambda *args: right(*args) * 1.001)
        assert not again(_linear_pointwise=right, _reorder_linear_weight=missing)
    finally:
        monkeypatch.undo()
        can_pack.cache_clear()

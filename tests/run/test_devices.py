"""Seeds, devices, and how a batch is cut."""

from __future__ import annotations

import random
import subprocess
import sys

import numpy
import pytest
import torch

from tasks.run.devices import derive_seed, seed_everything, use_device


def test_a_derived_seed_is_written_out():
    """`printf 0/sft/train | sha256sum` begins with these 16 digits; the second's top bit goes."""
    assert derive_seed(0, "sft", "train") == 0x75A1F900F4DAF9D1
    assert derive_seed(0, "ppo", "models") == 0xAF1FFD3B82847386 - 2**63


def test_every_use_has_a_seed_of_its_own():
    uses = [
        (seed, stage, purpose) for seed in (0, 1, 12) for stage in ("sft", "ppo") for purpose in ("a", "b")
    ]
    found = {derive_seed(*use) for use in uses}
    assert len(found) == len(uses) and all(0 <= seed < 2**63 for seed in found)
    assert any(seed >= 2**62 for seed in found), "the whole range is used"


def draws():
    return random.random(), float(numpy.random.rand()), float(torch.rand(1))


def test_seeding_reaches_python_numpy_and_torch():
    seed_everything(2**62 + 5)
    first = draws()
    seed_everything(2**62 + 5)
    assert draws() == first
    seed_everything(2**62 + 6)
    assert all(a != b for a, b in zip(draws(), first, strict=True))


def test_devices(monkeypatch):
    before = torch.get_num_threads()
    try:
        for there, auto in ((False, "cpu"), (True, "cuda")):
            monkeypatch.setattr(torch.cuda, "is_available", lambda there=there: there)
            assert use_device("auto", 1) == torch.device(auto) and use_device("cpu", 1) == torch.device("cpu")
        assert use_device("cuda", 1) == torch.device("cuda")
        use_device("cpu", 2)
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ValueError, match=r"machine\.device is cuda"):
        use_device("cuda", 1)


def test_freed_memory_is_kept():
    """After some, a tensor of 64 MB costs no page fault, where each cost 16,384 before."""
    script = """
import resource, torch
from tasks.run.devices import keep_freed_memory
faults = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_minflt
def cost():
    before = faults()
    torch.zeros(2**24)
    return faults() - before
before = [cost() for _ in range(16)][-1]
assert keep_freed_memory()
print(before, [cost() for _ in range(16)][-1])
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    before, after = map(int, done.stdout.split())
    assert after < 100 < before

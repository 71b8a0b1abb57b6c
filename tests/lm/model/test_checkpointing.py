"""Blocks that are computed again in the backward, of a model that stays in evaluation mode."""

from __future__ import annotations

import pytest
import tiny
import torch

from tasks.lm.attention.forest import serve_forest
from tasks.lm.attention.padding import lay_out
from tasks.lm.logprobs.responses import read_responses
from tasks.lm.model.freezing import blocks_of
from tasks.lm.model.recompute import recompute_blocks

KINDS = ["llama", "gpt2", "opt", "gpt_neox", "bart", "t5"]


@pytest.mark.parametrize("kind", KINDS)
def test_the_same_numbers_and_gradients(kind):
    """With dropout in the configuration: that of OPT's and BART's blocks asks the blocks themselves."""
    sequences, found = lay_out(tiny.drawn((4, 9, 1), 1), tiny.drawn((5, 1, 3), 2), tiny.PAD, "cpu"), []
    for is_wanted in (False, True):
        make = tiny.seq2seq if kind in ("bart", "t5") else tiny.causal
        model, runs = make(kind, **dict.fromkeys(tiny.DROPOUTS.split(), 0.5)), []
        serve_forest(model)
        inner = next(m for m in blocks_of(model)[0].modules() if not list(m.children()))
        inner.register_forward_hook(lambda *_, runs=runs: runs.append(1))
        read_responses(model, sequences, 1.0)  # the first forward tries the output embeddings
        runs.clear()
        with recompute_blocks(model, is_wanted):
            assert not any(module.training for module in model.modules())
            logprobs, entropy, _ = read_responses(model, sequences, 1.0)
            (logprobs.sum() + entropy.square().sum()).backward()
        assert len(runs) == 1 + is_wanted
        assert all("forward" not in vars(block) for block in blocks_of(model))
        found.append((logprobs.detach(), tiny.gradients(model)))
    assert torch.equal(found[0][0], found[1][0])
    assert tiny.far_gradients(found[1][1], found[0][1]) <= 1e-6


def test_after_an_error_all_is_as_it_was():
    model = tiny.causal()
    with pytest.raises(RuntimeError), recompute_blocks(model):
        raise RuntimeError("out of memory")
    assert all("forward" not in vars(block) for block in blocks_of(model))


def test_a_model_without_such_blocks_is_named():
    refused = pytest.raises(ValueError, match="gradient_checkpointing: Linear does not support it")
    with refused, recompute_blocks(torch.nn.Linear(1, 1)):
        pass

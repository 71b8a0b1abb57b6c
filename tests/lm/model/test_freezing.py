"""Freezing: the trunk's outputs stay to the bit whatever is trained above it."""

from __future__ import annotations

import pytest
import tiny
import torch

from tasks.lm.adapters.lora import add_adapter
from tasks.lm.model.freezing import blocks_of, freeze_layers

KINDS = ("llama", "gpt2", "qwen2", "opt", "gpt_neox", "mistral", "gemma", "bloom", "gptj")


def trunk_output(model, trunk: int) -> torch.Tensor:
    """What block `trunk` gets to read; of a whole trunk, what its last block gives."""
    blocks, seen = blocks_of(model), []
    keep = lambda x: seen.append((x[0] if isinstance(x, tuple) else x).clone())  # noqa: E731
    hook = (
        blocks[trunk].register_forward_pre_hook(lambda _, inputs: keep(inputs))
        if trunk < len(blocks)
        else blocks[-1].register_forward_hook(lambda _m, _i, out: keep(out))
    )
    with torch.no_grad():
        model(input_ids=torch.tensor([[5, 6, 7, 8]]))
    hook.remove()
    return seen[0]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("head", ["causal", "score"])
@pytest.mark.parametrize("k", [0, 1, 2])
def test_training_leaves_the_trunk_to_the_bit(kind, head, k):
    made = tiny.causal if head == "causal" else tiny.scorer
    for tied in (False, True):
        model = made(kind, tie_word_embeddings=tied)
        before = trunk_output(model, 2 - k)
        freeze_layers(model, k)
        trained = {n: p.clone() for n, p in model.named_parameters() if p.requires_grad}
        model(input_ids=torch.tensor([[5, 6, 7, 8]])).logits.square().sum().backward()
        torch.optim.SGD([p for p in model.parameters() if p.requires_grad], 0.1).step()
        assert torch.equal(trunk_output(model, 2 - k), before)
        moved = [n for n, p in model.named_parameters() if n in trained and not torch.equal(p, trained[n])]
        in_blocks = {n.split(".")[2] for n in trained if n.split(".")[1] in ("layers", "h")}
        assert moved and in_blocks <= {str(i) for i in range(2 - k, 2)}
        inputs = model.get_input_embeddings().weight
        assert not inputs.requires_grad
        if head == "score" or not tied:
            assert any(name.split(".")[0] in ("lm_head", "embed_out", "score") for name in trained)


def test_which_parameters_by_hand():
    model = tiny.causal("llama", tie_word_embeddings=True)
    freeze_layers(model, 1)
    names = [n for n, p in model.named_parameters() if p.requires_grad]
    assert {n for n in names if "layers.1." not in n} == {"model.norm.weight"}
    assert sum("layers.1." in n for n in names) == sum("layers.0." in n for n, _ in model.named_parameters())
    whole = tiny.causal()
    freeze_layers(whole, None)
    assert all(p.requires_grad for p in whole.parameters())


def test_an_adapter_is_frozen_below_too():
    model = add_adapter(tiny.causal(), rank=2)
    freeze_layers(model, 1)
    names = [n for n, p in model.named_parameters() if p.requires_grad]
    assert names and all("lora" in n and ".layers.1." in n for n in names)


def test_an_encoder():
    model = tiny.scorer("bert")
    freeze_layers(model, 1)
    frozen = [n for n, p in model.named_parameters() if not p.requires_grad]
    assert frozen and all(".embeddings." in n or ".layer.0." in n for n in frozen)


@pytest.mark.parametrize("k", [-1, 3])
def test_more_layers_than_there_are(k):
    with pytest.raises(ValueError, match=rf"num_layers_unfrozen is {k}; the model has 2 blocks"):
        freeze_layers(tiny.causal(), k)


def test_nothing_left_and_no_one_stack():
    model = tiny.causal()
    model.requires_grad_(False)
    with pytest.raises(ValueError, match="nothing is left to train"):
        freeze_layers(model, 1)


def test_blocks_are_what_runs_in_order():
    """Lists that do not run, or stand in a block, are no stack; without one that runs there is none."""
    model = tiny.causal()
    wanted = blocks_of(model)
    model.unused = torch.nn.ModuleList([torch.nn.Linear(2, 2), torch.nn.Linear(2, 2)])
    wanted[0].mlp.parts = torch.nn.ModuleList([wanted[0].mlp.gate_proj, wanted[0].mlp.up_proj])
    random = torch.get_rng_state()
    assert blocks_of(model) is wanted and torch.equal(torch.get_rng_state(), random)
    freeze_layers(model, 1)
    assert not any(p.requires_grad for p in wanted[0].parameters())
    both = tiny.causal()
    both.model.beside = torch.nn.ModuleList([both.model.rotary_emb, both.model.norm])
    with pytest.raises(ValueError, match="LlamaForCausalLM has no one stack of blocks that run one"):
        blocks_of(both)

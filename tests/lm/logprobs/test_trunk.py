"""A trunk that is run once and read by all that follow: the same numbers as running everything."""

from __future__ import annotations

import pytest
import tiny
import torch
from peft import LoraConfig, get_peft_model

from tasks.lm import AutoModelForCausalLMWithValueHead, create_reference_model
from tasks.lm.attention.forest import serve_forest
from tasks.lm.attention.padding import lay_out
from tasks.lm.logprobs.frozen_layers import Hydra, TrunkStates, frozen_depth, joined, shares_trunk
from tasks.lm.logprobs.responses import read_responses, read_trunk, response_kl, response_logprobs
from tasks.lm.model.freezing import blocks_of, freeze_layers

KINDS = ("llama", "mistral", "qwen3", "gemma", "gpt2", "opt", "gpt_neox", "gptj", "bloom")
PROMPTS = [[5, 6, 7], [9], [5, 6, 7], [4, 3, 8, 2, 6]]
RESPONSES = [[8, 9, 1], [7, 1], [], [3, 4, 5, 6]]
BLOCKS = 3


def deep(kind="llama", **keys):
    """A model of three blocks."""
    name = {"gpt2": "n_layer", "gptj": "n_layer", "bloom": "n_layer"}.get(kind, "num_hidden_layers")
    model = tiny.causal(kind, **{name: BLOCKS, **keys})
    serve_forest(model)
    return model


def rows():
    return lay_out(PROMPTS, RESPONSES, tiny.PAD, "cpu")


def runs(model) -> list[int]:
    """A counter of the forwards of each block that computed something."""
    counts = [0] * BLOCKS

    def count(i):
        def hook(*_):
            counts[i] += 1

        return hook

    for i, block in enumerate(blocks_of(model)):
        next(m for m in block.modules() if m is not block).register_forward_hook(count(i))
    return counts


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("depth", [1, 2, 3])
def test_reading_from_a_trunk_is_reading(kind, depth):
    """Whole rollout, some rows of it in another order, and one row alone."""
    model, sequences = deep(kind), rows()
    with torch.no_grad():
        kept = read_trunk(model, sequences, depth)
        for index in (torch.arange(4), torch.tensor([3, 0, 1]), torch.tensor([2, 0]), torch.tensor([1])):
            part = sequences.rows(index)
            wanted = read_responses(model, part, 0.7)
            found = read_responses(model, part, 0.7, trunk=kept.rows(index))
            for a, b in zip(found[:2], wanted[:2], strict=True):
                assert tiny.far(a, b) < 1e-5


@pytest.mark.parametrize("kind", ["llama", "gptj"])
@pytest.mark.parametrize("depth", [1, 2, 3])
def test_what_runs(kind, depth):
    """A trunk alone runs no block above it, and one that is given none below."""
    model, sequences = deep(kind), rows()
    response_logprobs(model, sequences, 1.0)  # the first forward tries the output embeddings
    counts = runs(model)
    kept = read_trunk(model, sequences, depth)
    assert counts == [1] * depth + [0] * (BLOCKS - depth)
    response_logprobs(model, sequences, 1.0, trunk=kept)
    assert counts == [1] * BLOCKS
    response_logprobs(model, sequences, 1.0)
    assert counts == [2] * BLOCKS  # and afterwards it is as it was
    assert all("forward" not in vars(block) for block in blocks_of(model))


@pytest.mark.parametrize("kind", ["llama", "gpt2", "gptj"])
def test_gradients_above_a_trunk(kind):
    """Those of the blocks above are the same; those below get none."""
    model, sequences = deep(kind), rows()
    freeze_layers(model, 1)

    def gradients(trunk):
        model.zero_grad()
        read_responses(model, sequences, 1.0, trunk=trunk)[0].square().sum().backward()
        return {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}

    wanted = gradients(None)
    found = gradients(read_trunk(model, sequences, 2))
    assert found.keys() == wanted.keys() and len(found) > 5
    assert all(tiny.far(found[n], wanted[n]) < 1e-5 for n in wanted)


def test_states_by_hand():
    """Rows of two and three tokens; the states of a forward of the blocks below, token by token."""
    model = deep("gptj")  # padded rows
    sequences = lay_out([[5, 6], [7]], [[8], [9]], tiny.PAD, "cpu")
    kept = read_trunk(model, sequences, 1)
    seen = []
    hook = blocks_of(model)[0].register_forward_hook(lambda _, i, out: seen.append(out[0][0]))
    with torch.no_grad():
        for ids in ([5, 6, 8], [7, 9]):
            model(torch.tensor([ids]))
    hook.remove()
    assert kept.places.shape == (2, 3)
    assert tiny.far(kept.states[kept.places[0]], seen[0]) < 1e-6
    assert tiny.far(kept.states[kept.places[1, 1:]], seen[1]) < 1e-6
    assert kept.nbytes == kept.states.numel() * 4


def test_laid_and_joined_by_hand():
    one = TrunkStates(1, torch.tensor([[0.0], [1], [2]]), torch.tensor([[0, 1, 2]]))
    two = TrunkStates(1, torch.tensor([[3.0], [4]]), torch.tensor([[0, 0, 1]]))
    both = joined([one, two])
    assert both.states.flatten().tolist() == [0, 1, 2, 3, 4]
    assert both.places.tolist() == [[0, 1, 2], [3, 3, 4]]
    is_real = torch.tensor([[False, True, True]])
    laid = both.rows(torch.tensor([1])).laid(torch.tensor([[0, 1, 0]]), is_real, 2)
    assert laid.flatten().tolist() == [4, 3]


def test_equal_prompts_have_one_state():
    """Rows 0 and 2 ask the same: 3 + 3 + 1 + 2 + 5 + 4 tokens."""
    kept = read_trunk(deep(), rows(), 1)
    assert len(kept.states) == 18
    own = kept.places[rows().is_real].unique()
    assert len(own) == 18


@pytest.mark.parametrize("tied", [False, True])
def test_frozen_depth(tied):
    model = deep(tie_word_embeddings=tied)
    assert frozen_depth(model) == 0
    for k in (3, 2, 1, 0):
        freeze_layers(model, k)
        assert frozen_depth(model) == BLOCKS - k
    model.requires_grad_(False)
    assert frozen_depth(model) == BLOCKS
    blocks_of(model)[1].requires_grad_(True)
    assert frozen_depth(model) == 1
    model.get_input_embeddings().requires_grad_(True)
    assert frozen_depth(model) == 0


def test_who_shares_a_trunk():
    model = deep()
    other = create_reference_model(model, 2)
    assert shares_trunk(model, other, 1) and shares_trunk(model, other, 2)
    assert not shares_trunk(model, other, 3)
    assert not shares_trunk(model, create_reference_model(model), 1)
    assert not shares_trunk(model, tiny.causal(), 2) and not shares_trunk(model, tiny.causal(), 3)
    assert Hydra.of(model, other) == Hydra(2, True)
    assert Hydra.of(model, other, value_layers=2) == Hydra(1, True)
    assert Hydra.of(model, create_reference_model(model)) == Hydra(2, False)
    assert Hydra.of(deep(), deep()) == Hydra(0, False)


@pytest.mark.parametrize("top", [True, False])
def test_a_reference_without_its_adapter(top):
    """It shares a trunk that holds no adapter; one that is frozen below has to be run without it."""
    keys = {"layers_to_transform": [2]} if top else {}
    config = LoraConfig(r=2, target_modules=["q_proj", "up_proj"], init_lora_weights=False, **keys)
    model = get_peft_model(deep(), config)
    freeze_layers(model, 1)
    hydra = Hydra.of(model, None)
    assert hydra == Hydra(2, top)
    wrapped, sequences = AutoModelForCausalLMWithValueHead(model), rows()
    kept = read_trunk(model, sequences, 2)
    with torch.no_grad():
        kl = response_kl(wrapped, None, sequences, 1.0, trunk=kept)
        assert tiny.far(kl, response_kl(wrapped, None, sequences, 1.0)) < 1e-5 and kl.max() > 1e-3
        found = read_responses(wrapped, sequences, 1.0, trunk=kept)[0]
        assert tiny.far(found, read_responses(wrapped, sequences, 1.0)[0]) < 1e-5

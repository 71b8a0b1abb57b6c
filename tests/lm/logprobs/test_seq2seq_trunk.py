"""A frozen encoder and the decoder's first blocks, run once: the same numbers as running everything."""

from __future__ import annotations

import pytest
import tiny
import torch
from peft import LoraConfig, get_peft_model
from seq2seq_models import close, laid_out, model_of, valued

from tasks.lm import create_reference_model
from tasks.lm.attention.forest import serve_forest
from tasks.lm.logprobs.frozen_layers import Hydra, frozen_depth, joined
from tasks.lm.logprobs.responses import read_responses, read_trunk, response_kl, response_logprobs
from tasks.lm.model.freezing import blocks_of, freeze_layers

WAYS = [("t5", True), ("t5 v1.1", True), ("mt5", True), ("t5", False), ("bart", False), ("m2m_100", False)]
FEW = [("t5", True), ("bart", False)]
DEPTHS = [1, 2, 3]


def served(name, planted, **keys):
    """Three blocks in the decoder."""
    layers = {"decoder_layers": 3} if name in ("bart", "m2m_100") else {"num_decoder_layers": 3}
    model = valued(model_of(name, **layers), **keys)
    assert not planted or serve_forest(model.pretrained_model)
    return model


def forwards(model) -> list[int]:
    """A counter of the forwards of the encoder, and of each block that computed something."""
    causal = model.pretrained_model
    parts = [next(m for m in b.modules() if type(m) is torch.nn.Linear) for b in blocks_of(causal)]
    parts = [causal.get_encoder(), *parts]
    counts = [0] * len(parts)

    def count(i):
        def hook(*_):
            counts[i] += 1

        return hook

    for i, part in enumerate(parts):
        part.register_forward_hook(count(i))
    return counts


@pytest.mark.parametrize(("name", "planted"), WAYS)
@pytest.mark.parametrize("depth", DEPTHS)
@torch.no_grad()
def test_reading_from_a_trunk_is_reading(name, planted, depth):
    """The whole rollout; some rows in another order; rows of which one says nothing; that one alone."""
    model, sequences = served(name, planted), laid_out()
    kept = read_trunk(model.pretrained_model, sequences, depth)
    assert kept.depth == depth and not kept.states.requires_grad
    for index in ([0, 1, 2, 3, 4], [3, 1, 0], [4, 2], [2], [4]):
        part, some = sequences.rows(torch.tensor(index)), kept.rows(torch.tensor(index))
        wanted = read_responses(model, part, 0.7)
        found = read_responses(model, part, 0.7, trunk=some)
        assert all(close(a, b) for a, b in zip(found, wanted, strict=True))
        other = model_of(name, 1, **_layers(model))
        assert not planted or serve_forest(other)
        kl = response_kl(model, other, part, 0.7, trunk=some)
        assert close(kl, response_kl(model, other, part, 0.7), 1e-4)


def _layers(model) -> dict:
    config = model.config
    return {k: getattr(config, k) for k in ("decoder_layers", "num_decoder_layers") if hasattr(config, k)}


@pytest.mark.parametrize(("name", "planted"), FEW)
def test_parts_joined_and_split_anew(name, planted):
    model, sequences = served(name, planted), laid_out()
    first, second = (sequences.rows(torch.tensor(i)) for i in ([0, 1], [2, 3, 4]))
    kept = joined([read_trunk(model.pretrained_model, part, 2) for part in (first, second)])
    index = torch.tensor([3, 0, 1])
    found = response_logprobs(model, sequences.rows(index), 1.0, trunk=kept.rows(index))
    assert close(found, response_logprobs(model, sequences.rows(index), 1.0))


@pytest.mark.parametrize(("name", "planted"), [("t5", True), ("t5", False), ("bart", False)])
@pytest.mark.parametrize("depth", DEPTHS)
@torch.no_grad()
def test_what_runs(name, planted, depth):
    """A trunk alone runs no block above it; one that is given neither the encoder nor a block below."""
    model, sequences = served(name, planted), laid_out()
    response_logprobs(model, sequences, 1.0)  # the first forward tries the output embeddings
    counts = forwards(model)
    kept = read_trunk(model.pretrained_model, sequences, depth)
    assert counts == [1] * (1 + depth) + [0] * (3 - depth)
    response_logprobs(model, sequences, 1.0, trunk=kept)
    assert counts == [1] * 4
    response_logprobs(model, sequences, 1.0)
    assert counts == [2] * 4
    assert all("forward" not in vars(block) for block in blocks_of(model.pretrained_model))


@pytest.mark.parametrize("planted", [False, True])
def test_the_bias_of_blocks_that_do_not_run_is_made_once(planted, monkeypatch):
    model, sequences = served("t5", planted), laid_out()
    kept = read_trunk(model.pretrained_model, sequences, 3)
    attention, made = model.pretrained_model.decoder.block[0].layer[0].SelfAttention, []
    compute = attention.compute_bias
    monkeypatch.setattr(attention, "compute_bias", lambda *size: made.append(size) or compute(*size))
    response_logprobs(model, sequences, 1.0, trunk=kept)
    assert set(made) == {(6, 6)} and len(made) <= 2  # of each forward; the first tries the output embeddings


def test_a_state_for_each_distinct_source_token_and_each_response_token():
    """5 + 9 + 1 of the sources, of which two are asked twice; 4 + 1 + 6 + 2 of the responses."""
    kept = read_trunk(served("t5", planted=True).pretrained_model, laid_out(), 1)
    assert kept.states.shape == (15 + 13, 16)
    seen = kept.places[:4][laid_out().is_real[:4]]
    assert sorted(set(seen.tolist())) == list(range(28)) and kept.nbytes == 28 * 16 * 4


@pytest.mark.parametrize(("name", "planted"), WAYS)
def test_gradients_above_a_trunk(name, planted):
    model, sequences = served(name, planted), laid_out()
    freeze_layers(model.pretrained_model, 1)
    assert frozen_depth(model.pretrained_model) == 2
    found = []
    for trunk in (None, read_trunk(model.pretrained_model, sequences, 2)):
        sum(x.square().sum() for x in read_responses(model, sequences, 1.0, trunk=trunk)).backward()
        found.append(tiny.gradients(model))
    assert len(found[0]) > 5 and tiny.far_gradients(found[1], found[0]) <= 1e-5


@pytest.mark.parametrize(("name", "planted"), FEW)
def test_blocks_of_the_value_heads_own(name, planted):
    """They read what enters the first that was copied, which a trunk below it hands on."""
    model, sequences = served(name, planted, num_value_layers_unfrozen=1), laid_out()
    freeze_layers(model.pretrained_model, 1)
    assert Hydra.of(model.pretrained_model, None, value_layers=2).depth == 1
    kept = read_trunk(model.pretrained_model, sequences, 2)
    values = [read_responses(model, sequences, 1.0, trunk=trunk)[2] for trunk in (kept, None)]
    assert close(*values) and values[0].any()


@pytest.mark.parametrize(("name", "planted"), FEW)
def test_who_shares_a_trunk(name, planted):
    model = served(name, planted)
    reference = create_reference_model(model, 2)
    policy, other = model.pretrained_model, reference.pretrained_model
    assert Hydra.of(policy, other) == Hydra(2, True)
    assert Hydra.of(policy, create_reference_model(model).pretrained_model) == Hydra(2, False)
    assert Hydra.of(served(name, planted).pretrained_model, other) == Hydra(0, False)


def test_an_adapter_above_a_trunk():
    keys = {"layers_to_transform": [2], "layers_pattern": "decoder.block"}
    config = LoraConfig(r=2, target_modules=["q", "wo"], init_lora_weights=False, **keys)
    base = served("t5", planted=True).pretrained_model
    model = valued(get_peft_model(base, config))
    hydra = Hydra.of(model.pretrained_model, None)
    assert hydra == Hydra(2, True)
    kept = read_trunk(model.pretrained_model, laid_out(), 2)
    kl = response_kl(model, None, laid_out(), 1.0, trunk=kept)
    assert close(kl, response_kl(model, None, laid_out(), 1.0)) and kl.max() > 1e-4


def test_other_kinds_run_everything():
    """umT5's blocks hand their states on in another way."""
    model = model_of("umt5")
    freeze_layers(model, 1)
    assert frozen_depth(model) == 0

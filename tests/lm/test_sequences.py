"""Padded prompts and responses, and the log-probabilities of their tokens."""

from __future__ import annotations

import pytest
import tiny
import torch

from tasks.lm import logprobs
from tasks.lm.forest import Segment, has_forest, plant, serve_forest
from tasks.lm.sequences import (
    Sequences,
    lay_out,
    left_pad,
    pad_forest,
    plant_sequences,
    positions_of,
    read_responses,
    response_logprobs,
)
from tasks.lm.value_head import AutoModelForCausalLMWithValueHead

T, F = True, False


def test_lay_out_by_hand():
    found = lay_out([[5, 6], [7]], [[8, 1], [9]], 0, "cpu")
    assert found.tokens.tolist() == [[5, 6, 8, 1], [0, 7, 9, 0]]
    assert found.is_real.tolist() == [[T, T, T, T], [F, T, T, F]]
    assert found.is_response.tolist() == [[T, T], [T, F]]
    assert found.responses.tolist() == [[8, 1], [9, 0]]
    some = found.rows(torch.tensor([1]))
    assert some.tokens.tolist() == [[0, 7, 9, 0]] and some.is_response.tolist() == [[T, F]]


def test_left_pad_by_hand():
    tokens, real = left_pad([[1, 2, 3], [4]], 9)
    assert tokens.tolist() == [[1, 2, 3], [9, 9, 4]] and real.tolist() == [[T, T, T], [F, F, T]]


def test_positions_by_hand():
    real = torch.tensor([[F, F, T, T, T, F], [T, T, F, T, F, F]])
    assert positions_of(real).tolist() == [[0, 0, 0, 1, 2, 2], [0, 1, 1, 2, 2, 2]]


@pytest.mark.parametrize(
    ("prompts", "responses", "message"),
    [([[5], []], [[6], [7]], "prompt 1 is empty"), ([[5], [6]], [[], [7]], "response 0 is empty")],
)
def test_an_empty_row_is_named(prompts, responses, message):
    with pytest.raises(ValueError, match=message):
        lay_out(prompts, responses, 0, "cpu")


def alone(model, prompt, response, temperature):
    """Log-probabilities of one unpadded response, by the definition."""
    logits = model(torch.tensor([[*prompt, *response]])).logits[0] / temperature
    chosen = [logits[len(prompt) - 1 + t, token] for t, token in enumerate(response)]
    totals = [logits[len(prompt) - 1 + t].double().exp().sum().log() for t in range(len(response))]
    return torch.stack(chosen) - torch.stack(totals).float()


@pytest.mark.parametrize("kind", ["gpt2", "llama", "opt", "gpt_neox"])
@pytest.mark.parametrize("temperature", [1.0, 0.7])
@torch.no_grad()
def test_padded_is_unpadded(kind, temperature):
    """GPT-2 and OPT have absolute positions: without position ids the left padding would shift them."""
    model = tiny.causal(kind)
    prompts, responses = tiny.drawn((4, 9, 1), 1), tiny.drawn((5, 1, 3), 2)
    found = response_logprobs(model, lay_out(prompts, responses, tiny.PAD, "cpu"), temperature)
    assert found.shape == (3, 5) and found.dtype == torch.float32
    for row, prompt, response in zip(found, prompts, responses, strict=True):
        assert tiny.far(row[: len(response)], alone(model, prompt, response, temperature)) <= 1e-5


def test_planted_by_hand():
    """Rows of 4 and 2 real tokens, with 2 and 1 response tokens: places 1, 2 and 4 predict them."""
    forest, places = plant_sequences(lay_out([[5, 6], [7]], [[8, 1], [9]], 0, "cpu"))
    assert forest.tokens.tolist() == [5, 6, 8, 1, 7, 9] and forest.starts == (0, 4)
    assert places.tolist() == [1, 2, 4]


def test_a_forest_in_padded_rows_by_hand():
    """Root 5 6 with children 7 and 8 9, and root 2: three rows; the shared root stands in the first."""
    forest = plant([Segment((5, 6)), Segment((7,), 0), Segment((2,)), Segment((8, 9), 0)])
    tokens, where = pad_forest(forest)
    assert tokens.tolist() == [[5, 6, 7, 0], [2, 0, 0, 0], [5, 6, 8, 9]]
    assert where.tolist() == [0, 1, 2, 4, 10, 11]
    assert tokens.flatten()[where].tolist() == forest.tokens.tolist()


@pytest.mark.parametrize("kind", ["gpt2", "llama", "opt", "gpt_neox"])
@pytest.mark.parametrize("valued", [False, True])
def test_the_forest_is_the_padded_rows(kind, valued):
    """Log-probabilities, entropies, values and every gradient, with and without a value head."""
    sequences = lay_out(tiny.drawn((4, 9, 1), 1), tiny.drawn((5, 1, 3), 2), tiny.PAD, "cpu")
    found = {}
    for planted in (False, True):
        model = causal = tiny.causal(kind)
        if valued:
            model = AutoModelForCausalLMWithValueHead(causal)
            model.v_head.summary.weight.data.normal_(generator=torch.Generator().manual_seed(3))
        if planted:
            assert serve_forest(causal) and has_forest(model)
        read = read_responses(model, sequences, 0.7)
        assert (read[2] is None) is not valued
        read = [x for x in read if x is not None]
        assert all(x.shape == (3, 5) and not x[~sequences.is_response].any() for x in read)
        sum((n + 1) * x.square().sum() for n, x in enumerate(read)).backward()
        found[planted] = read, tiny.gradients(model)
    for one, other in zip(found[True][0], found[False][0], strict=True):
        assert tiny.far(one.detach(), other.detach()) <= 1e-5
    assert tiny.far_gradients(found[True][1], found[False][1]) <= 1e-5


@pytest.mark.parametrize("planted", [False, True])
@pytest.mark.parametrize("kind", ["gpt2", "llama", "opt", "gpt_neox"])
@torch.no_grad()
def test_values_and_entropies_are_those_of_each_row_alone(kind, planted):
    """Through the value head's own forward, row by row; the value before a token stands with it."""
    model = AutoModelForCausalLMWithValueHead(tiny.causal(kind))
    model.v_head.summary.weight.normal_(generator=torch.Generator().manual_seed(3))
    prompts, responses = tiny.drawn((4, 9, 1), 1), tiny.drawn((5, 1, 3), 2)
    wanted = [model(torch.tensor([[*p, *r]])) for p, r in zip(prompts, responses, strict=True)]
    assert serve_forest(model.pretrained_model) or not planted
    if not planted:
        model.pretrained_model.set_attn_implementation("sdpa")
    _, entropies, values = read_responses(model, lay_out(prompts, responses, tiny.PAD, "cpu"), 0.7)
    for i, (logits, _, of_tokens) in enumerate(wanted):
        before = slice(len(prompts[i]) - 1, -1)
        spread = torch.distributions.Categorical(logits=logits[0, before] / 0.7).entropy()
        assert tiny.far(values[i, : len(responses[i])], of_tokens[0, before]) <= 1e-5
        assert tiny.far(entropies[i, : len(responses[i])], spread) <= 1e-5
    assert read_responses(model, lay_out(prompts, responses, tiny.PAD, "cpu"), 0.7, entropy=False)[1] is None


@pytest.mark.parametrize("planted", [False, True])
def test_the_whole_logits_are_never_made(monkeypatch, planted):
    """12 response tokens among 26 real ones, 400 in the vocabulary, 3 places at a time."""
    for name, value in (("LEAST_PLACES", 3), ("CHUNK_LOGITS", {}), ("KEPT_LOGITS", {})):
        monkeypatch.setattr(logprobs, name, value)
    model = AutoModelForCausalLMWithValueHead(tiny.causal(vocab_size=400, hidden_size=4, head_dim=2))
    assert not planted or serve_forest(model.pretrained_model)
    sequences = lay_out(tiny.drawn((4, 9, 1), 1), tiny.drawn((6, 1, 5), 2), tiny.PAD, "cpu")
    with tiny.Largest() as seen:
        read, entropy, values = read_responses(model, sequences, 0.7)
        (read.sum() + entropy.sum() + values.sum()).backward()
    assert seen.elements == 400 * 4  # the embeddings; a chunk has 1200


@pytest.mark.parametrize("kind", ["gptj", "bloom", "gemma2", "mamba"])
@torch.no_grad()
def test_a_model_the_forest_cannot_serve_takes_padded_rows(kind):
    """Attention of its own, alibi, a cap and a window, no attention at all: the numbers of each row alone."""
    model = tiny.causal(kind)
    assert not serve_forest(model) and not has_forest(model)
    prompts, responses = tiny.drawn((4, 9, 1), 1), tiny.drawn((5, 1, 3), 2)
    found = response_logprobs(model, lay_out(prompts, responses, tiny.PAD, "cpu"), 0.7)
    for row, prompt, response in zip(found, prompts, responses, strict=True):
        assert tiny.far(row[: len(response)], alone(model, prompt, response, 0.7)) <= 1e-5


@pytest.mark.parametrize("kind", ["gpt2", "llama"])
@torch.no_grad()
def test_more_padding_and_other_padding_change_nothing(kind):
    model, own = tiny.causal(kind), lay_out(tiny.drawn((4, 6)), tiny.drawn((5, 2), 1), tiny.PAD, "cpu")
    wanted = response_logprobs(model, own, 1.0) * own.is_response
    for junk in (tiny.PAD, 17):
        two = torch.full((2, 2), junk)
        none = torch.zeros(2, 2, dtype=torch.bool)
        wide = Sequences(
            torch.where(torch.cat([none, own.is_real, none], 1), torch.cat([two, own.tokens, two], 1), junk),
            torch.cat([none, own.is_real, none], 1),
            torch.cat([own.is_response, none], 1),
        )
        found = response_logprobs(model, wide, 1.0) * wide.is_response
        assert tiny.far(found[:, :5], wanted) <= 1e-5 and not found[:, 5:].any()

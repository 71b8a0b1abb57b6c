"""Padded prompts and responses, and the log-probabilities of their tokens."""

from __future__ import annotations

import pytest
import tiny
import torch
from peft import LoraConfig, get_peft_model

from tasks.lm.attention.forest import Segment, has_forest, plant, serve_forest
from tasks.lm.attention.padding import (
    Sequences,
    flush_left,
    lay_out,
    left_pad,
    pad_forest,
    plant_sequences,
    positions_of,
)
from tasks.lm.heads.value_head import AutoModelForCausalLMWithValueHead
from tasks.lm.logprobs import chunked as logprobs
from tasks.lm.logprobs.responses import _at, read_responses, response_kl, response_logprobs
from tasks.lm.logprobs.roads import check_road, take_road

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


def test_flush_left_by_hand():
    """Padding on either side goes behind; as wide as the longest row; 0 where nothing stands."""
    real = torch.tensor([[F, T, T, F], [F, F, T, T], [F, F, F, F]])
    tokens, where = flush_left(torch.tensor([[0, 5, 6, 0], [0, 0, 7, 8], [0, 0, 0, 0]]), real)
    assert tokens.tolist() == [[5, 6], [7, 8], [0, 0]]
    assert where.tolist() == [[0, 0, 1, 0], [0, 0, 2, 3], [0, 0, 0, 0]]


@pytest.mark.parametrize("kind", [list, torch.tensor])
def test_empty_responses_by_hand(kind):
    """Their rows have no response token; one column of padding stands where all are empty."""
    prompts = [kind([5, 6]), kind([7])]
    found = lay_out(prompts, [kind([]), kind([9])], 0, "cpu")
    assert found.tokens.tolist() == [[5, 6, 0], [0, 7, 9]] and found.tokens.dtype == torch.int64
    assert found.is_real.tolist() == [[T, T, F], [F, T, T]] and found.is_response.tolist() == [[F], [T]]
    found = lay_out(prompts, [kind([]), kind([])], 3, "cpu")
    assert found.tokens.tolist() == [[5, 6, 3], [3, 7, 3]]
    assert found.is_real.tolist() == [[T, T, F], [F, T, F]] and found.is_response.tolist() == [[F], [F]]


@pytest.mark.parametrize(
    ("prompts", "responses", "message"),
    [
        ([[5], []], [[6], [7]], "prompt 1 is empty"),
        ([torch.tensor([5]), torch.zeros(0)], [[6], [7]], "prompt 1 is empty"),
        ([torch.tensor([[5, 6]])], [[7]], r"prompt 0 has shape \(1, 2\)"),
        ([[5], [6]], [[7], torch.tensor(8)], r"response 1 has shape \(\)"),
        ([[5], [6]], [[7]], "2 prompts and 1 responses"),
        ([], [], "0 prompts"),
    ],
)
def test_what_cannot_be_laid_out_is_named(prompts, responses, message):
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
    forest, places, _ = plant_sequences(lay_out([[5, 6], [7]], [[8, 1], [9]], 0, "cpu"))
    assert forest.tokens.tolist() == [5, 6, 8, 1, 7, 9] and forest.starts == (0, 4)
    assert places.tolist() == [1, 2, 4]


def test_a_shared_prompt_by_hand():
    """5 6 twice, 7 once, 5 6 with nothing to say, 4 twice with nothing to say."""
    prompts = [[5, 6], [7], [5, 6], [5, 6], [4], [4]]
    forest, places, _ = plant_sequences(lay_out(prompts, [[8, 1], [9], [3], [], [], []], 0, "cpu"))
    assert forest.tokens.tolist() == [5, 6, 8, 1, 7, 9, 3, 4]
    assert forest.parents == (-1, 0, -1, 0, -1) and forest.positions.tolist() == [0, 1, 2, 3, 0, 1, 2, 0]
    assert places.tolist() == [1, 2, 4, 1]  # 8 after the 6, 1 after the 8, 9 after the 7, 3 after the 6


def test_a_forest_in_padded_rows_by_hand():
    """Root 5 6 with children 7 and 8 9, and root 2: three rows; the shared root stands in the first."""
    forest = plant([Segment((5, 6)), Segment((7,), 0), Segment((2,)), Segment((8, 9), 0)])
    tokens, where = pad_forest(forest)
    assert tokens.tolist() == [[5, 6, 7, 0], [2, 0, 0, 0], [5, 6, 8, 9]]
    assert where.tolist() == [0, 1, 2, 4, 10, 11]
    assert tokens.flatten()[where].tolist() == forest.tokens.tolist()


def valued(kind: str = "llama", **keys) -> AutoModelForCausalLMWithValueHead:
    """A policy whose value head is not zero."""
    model = AutoModelForCausalLMWithValueHead(tiny.causal(kind, **keys))
    model.v_head.summary.weight.data.normal_(generator=torch.Generator().manual_seed(3))
    return model


def learnt(model, parts, **keys):
    """Readings of the parts one after the other, and the gradients of a loss of all of them."""
    read = [[x for x in read_responses(model, part, 0.7, **keys) if x is not None] for part in parts]
    sum((n + 1) * x.square().sum() for each in read for n, x in enumerate(each)).backward()
    assert all(not x[~part.is_response].any() for each, part in zip(read, parts, strict=True) for x in each)
    return [torch.cat([x.detach() for x in each]) for each in zip(*read, strict=True)], tiny.gradients(model)


def agree(found, wanted) -> bool:
    same = [tiny.far(a, b) <= 1e-5 for a, b in zip(found[0], wanted[0], strict=True)]
    return all(same) and tiny.far_gradients(found[1], wanted[1]) <= 1e-5


@pytest.mark.parametrize("kind", ["gpt2", "llama", "opt", "gpt_neox"])
@pytest.mark.parametrize("made", [tiny.causal, valued])
def test_the_forest_is_the_padded_rows(kind, made):
    """Log-probabilities, entropies, values and every gradient, with and without a value head."""
    sequences = lay_out(tiny.drawn((4, 9, 1), 1), tiny.drawn((5, 1, 3), 2), tiny.PAD, "cpu")
    found = {}
    for planted in (False, True):
        model = made(kind)
        if planted:
            assert serve_forest(getattr(model, "pretrained_model", model)) and has_forest(model)
        found[planted] = learnt(model, [sequences])
        assert len(found[planted][0]) == 2 + (made is valued)
        assert all(x.shape == (3, 5) for x in found[planted][0])
    assert agree(found[True], found[False])


@pytest.mark.parametrize("kind", ["gpt2", "llama", "opt"])
def test_rows_that_share_a_prompt_are_rows_of_their_own(kind):
    """Four responses to a prompt, two to another, an empty one among each; and a prompt that comes once."""
    a, b, c = tiny.drawn((6, 1, 4), 1)
    prompts, lengths = [a, b, a, c, b, a, a], (5, 2, 1, 3, 0, 0, 4)
    sequences = lay_out(prompts, tiny.drawn(lengths, 2), tiny.PAD, "cpu")
    model = valued(kind)
    assert serve_forest(model.pretrained_model)
    assert len(plant_sequences(sequences)[0].tokens) == 6 + 1 + 4 + sum(lengths)
    found = learnt(model, [sequences])
    alone = [sequences.rows(torch.tensor([i])) for i in range(len(prompts))]
    assert agree(found, learnt(model, alone))


@pytest.mark.parametrize("planted", [False, True])
@pytest.mark.parametrize("kind", ["llama", "gpt2", "gemma2"])
def test_empty_responses_say_nothing(planted, kind):
    """One among others changes nothing; where all are empty, nothing learns."""
    model = valued(kind)
    assert not planted or serve_forest(model.pretrained_model) or kind == "gemma2"
    prompts = tiny.drawn((4, 9, 1), 1)
    some = lay_out(prompts, [[5, 6], [], [7]], tiny.PAD, "cpu")
    none = lay_out(prompts, [[], [], []], tiny.PAD, "cpu")
    found, gradients = learnt(model, [none])
    assert all(x.shape == (3, 1) and not x.any() for x in found)
    assert not any(g.any() for g in gradients.values())
    assert not response_kl(model, tiny.causal(kind, 1), none, 0.7).any()
    wanted = learnt(model, [some.rows(torch.tensor([0, 2]))])
    found = learnt(model, [some])
    assert agree(([x[[0, 2]] for x in found[0]], found[1]), wanted)


@pytest.mark.parametrize("planted", [False, True])
def test_a_frozen_trunk_leaves_the_value_head_to_learn(planted):
    """The numbers and the head's gradients are the same; nothing else gets one, in the backward or before."""
    sequences = lay_out(tiny.drawn((4, 9, 1), 1), tiny.drawn((5, 1, 3), 2), tiny.PAD, "cpu")
    model = valued()
    assert not planted or serve_forest(model.pretrained_model)
    whole, gradients = learnt(model, [sequences])
    frozen, found = learnt(model, [sequences], freeze_trunk=True)
    assert all(torch.equal(a, b) for a, b in zip(whole, frozen, strict=True))
    assert set(found) == {"v_head.summary.weight", "v_head.summary.bias"}
    assert tiny.far_gradients(found, {n: gradients[n] for n in found}) <= 1e-6
    logprobs, entropy, values = read_responses(model, sequences, 0.7, freeze_trunk=True)
    assert not logprobs.requires_grad and not entropy.requires_grad and values.requires_grad
    seen = []
    model.pretrained_model.register_forward_hook(lambda *_: seen.append(torch.is_grad_enabled()))
    with torch.no_grad():
        for freeze in (True, False):
            read = read_responses(model, sequences, 0.7, freeze_trunk=freeze)
            assert not any(x.requires_grad for x in read)
    assert seen == [False, False], "no graph is made, which memory would be spent on"


@pytest.mark.parametrize("planted", [False, True])
@pytest.mark.parametrize("kind", ["gpt2", "llama", "opt", "gpt_neox"])
@torch.no_grad()
def test_values_and_entropies_are_those_of_each_row_alone(kind, planted):
    """Through the value head's own forward, row by row; the value before a token stands with it."""
    model = valued(kind)
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
    check_road(model.pretrained_model)  # whose trial makes those of its few tokens
    sequences = lay_out(tiny.drawn((4, 9, 1), 1), tiny.drawn((6, 1, 5), 2), tiny.PAD, "cpu")
    with tiny.Largest() as seen:
        read, entropy, values = read_responses(model, sequences, 0.7)
        (read.sum() + entropy.sum() + values.sum()).backward()
    assert seen.elements == 400 * 4  # the embeddings; a chunk has 1200


def kl_alone(policy, reference, prompt, response, temperature):
    """Σ p (log p − log q) before each token of one unpadded response."""
    ids, before = torch.tensor([[*prompt, *response]]), slice(len(prompt) - 1, -1)
    p, q = (torch.softmax(m(ids).logits[0, before].double() / temperature, -1) for m in (policy, reference))
    return (p * (p / q).log()).sum(-1)


@pytest.mark.parametrize("planted", [False, True])
@pytest.mark.parametrize("kind", ["llama", "gpt2", "gemma2"])
def test_the_exact_kl_is_its_definition(planted, kind):
    """Of a policy with a value head and a bare reference; through its own logits where it caps them."""
    policy, reference = valued(kind), tiny.causal(kind, seed=1)
    for model in (policy.pretrained_model, reference) if planted else ():
        assert serve_forest(model) or kind == "gemma2"
    prompts, responses = tiny.drawn((4, 9, 1), 1), [*tiny.drawn((5, 1), 2), []]
    prompts, responses = [*prompts, prompts[0]], [*responses, [3, 4]]
    sequences, seen = lay_out(prompts, responses, tiny.PAD, "cpu"), []
    for model in (policy.pretrained_model, reference):
        model.register_forward_hook(lambda *_: seen.append(torch.is_grad_enabled()))
    found = response_kl(policy, reference, sequences, 0.7)
    assert len(seen) in (2, 4) and not any(seen)
    assert found.shape == (4, 5) and found.dtype == torch.float32 and not found.requires_grad
    assert not found[~sequences.is_response].any() and (found >= 0).all() and found.max() > 0.1
    for row, prompt, response in zip(found, prompts, responses, strict=True):
        wanted = kl_alone(policy.pretrained_model, reference, prompt, response, 0.7)
        assert not response or tiny.far(row[: len(response)], wanted) <= 1e-5
    assert not response_kl(policy, policy, sequences, 0.7).any()


def test_the_kl_to_a_policy_without_its_adapter():
    base = tiny.causal()
    reference = tiny.causal()
    config = LoraConfig(target_modules="all-linear", init_lora_weights=False)
    policy = AutoModelForCausalLMWithValueHead(get_peft_model(base, config))
    sequences = lay_out(tiny.drawn((4, 9), 1), tiny.drawn((5, 1), 2), tiny.PAD, "cpu")
    found = response_kl(policy, None, sequences, 0.7)
    assert found.max() > 0.01 and tiny.far(found, response_kl(policy, reference, sequences, 0.7)) <= 1e-5


def test_the_same_bits_of_a_place_that_is_read_often():
    """On several threads: the state before the responses to a prompt that many rows share."""
    draw = torch.Generator().manual_seed(0)
    hidden = torch.randn(500, 64, generator=draw).requires_grad_()
    places, up = torch.randint(0, 3, (40_000,), generator=draw), torch.randn(40_000, 64, generator=draw)
    threads, found = torch.get_num_threads(), []
    torch.set_num_threads(2)
    try:
        for _ in range(4):
            found += torch.autograd.grad(_at(hidden, places), hidden, up)
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(each, found[0]) for each in found[1:])


@torch.no_grad()
def test_positions_that_begin_behind_the_padding_index():
    """RoBERTa's, as a decoder: padded and planted."""
    model = tiny.causal("roberta", is_decoder=True)
    prompts, responses = tiny.drawn((4, 9, 1), 1), tiny.drawn((5, 1, 3), 2)
    for planted in (False, True):
        assert not planted or serve_forest(model)
        found = response_logprobs(model, lay_out(prompts, responses, tiny.PAD, "cpu"), 0.7)
        for row, prompt, response in zip(found, prompts, responses, strict=True):
            assert tiny.far(row[: len(response)], alone(model, prompt, response, 0.7)) <= 1e-5


@pytest.mark.parametrize("kind", ["gptj", "bloom", "bart", "mamba"])
@torch.no_grad()
def test_a_model_the_forest_cannot_serve_takes_padded_rows(kind):
    """Attention of its own, alibi, positions that count padding, no attention: the numbers of each row."""
    model = tiny.causal(kind)
    take_road(model)
    assert not has_forest(model)
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

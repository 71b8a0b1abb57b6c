"""Sampling: transformers' own greedy tokens, softmax's own frequencies, each row for itself."""

from __future__ import annotations

import pytest
import tiny
import torch

from tasks.lm.generation import Responses, draw_uniforms, generate, sample

SPECIAL = {"eos_id": tiny.EOS, "pad_id": tiny.PAD}


def ragged(seed=4):
    return tiny.drawn((5, 1, 9, 3, 9, 2, 7), seed)


@pytest.mark.parametrize("kind", ["llama", "gpt2", "opt", "gemma"])
def test_greedy_is_transformers_greedy(kind):
    model, prompts = tiny.causal(kind, seed=3), ragged()
    width = max(map(len, prompts))
    ids = torch.tensor([[tiny.PAD] * (width - len(p)) + p for p in prompts])
    mask = torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in prompts])
    wanted = model.generate(
        input_ids=ids, attention_mask=mask, do_sample=False, max_new_tokens=12, pad_token_id=tiny.PAD,
        eos_token_id=tiny.EOS,
    )[:, width:]  # fmt: skip
    found = generate(model, prompts, max_tokens=12, **SPECIAL)
    assert found.tokens[:, : wanted.shape[1]].tolist() == wanted.tolist()
    assert len({tuple(row) for row in wanted.tolist()}) > 3, "the prompts lead to different answers"


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_a_row_depends_on_its_prompt_and_its_numbers_alone(kind):
    model, prompts = tiny.causal(kind), ragged()
    uniforms = draw_uniforms(len(prompts), 10, seed=8)

    def sampled(index, rows=512):
        own = [prompts[i] for i in index]
        return generate(model, own, max_tokens=10, uniforms=uniforms[index], rows=rows, **SPECIAL).lists()

    everything = list(range(len(prompts)))
    together = sampled(everything)
    assert [sampled([i])[0] for i in everything] == together
    assert sampled(everything, rows=1) == sampled(everything, rows=3) == together
    assert sampled(everything[::-1]) == together[::-1]
    assert len({tuple(r) for r in together}) == len(prompts)


def test_the_same_seed_draws_the_same():
    assert torch.equal(draw_uniforms(3, 4, 7), draw_uniforms(3, 4, 7))
    assert not torch.equal(draw_uniforms(3, 4, 7), draw_uniforms(3, 4, 8))
    assert draw_uniforms(3, 4, 7).shape == (3, 4)


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
def test_frequencies_are_softmax(temperature):
    """A chi-square test on 8 tokens; the bar's false-alarm probability is 1e-4, the seed fixed."""
    model, prompt = tiny.causal("gpt2", vocab_size=8), [3, 5, 2]
    with torch.no_grad():
        logits = model(torch.tensor([prompt])).logits[0, -1]
        logits = logits / logits.std()
        model.lm_head.weight.div_(model(torch.tensor([prompt])).logits[0, -1].std())
    count = 6000
    found = generate(
        model, [prompt] * count, max_tokens=1, uniforms=draw_uniforms(count, 1, seed=1), rows=2000,
        temperature=temperature, **SPECIAL,
    )  # fmt: skip
    wanted = (logits / temperature).softmax(-1) * count
    assert wanted.min() > 5
    seen = torch.bincount(found.tokens[:, 0], minlength=8)
    assert ((seen - wanted) ** 2 / wanted).sum() < 29.9


def test_sample_by_hand():
    """Probabilities 0, 1/4, 1/2, 1/4, 0: the cumulative sums are 0, .25, .75, 1, 1."""
    logits = torch.tensor([0.0, 0.25, 0.5, 0.25, 0.0]).log()
    uniforms = torch.tensor([0.0, 0.2499, 0.25, 0.5, 0.7499, 0.75, 0.9999, 1 - 2**-24])
    found = sample(logits.expand(8, 5), uniforms).tolist()
    assert found == [1, 1, 2, 2, 2, 3, 3, 3], "a token of probability 0 is never drawn"


def test_rounding_draws_no_impossible_token():
    """Float32 sums of 40,000 probabilities miss 1 by more than the largest uniform number does."""
    logits = torch.randn(64, 40_000, generator=torch.Generator().manual_seed(0)) * 0.1
    logits[:, -1] = -torch.inf
    assert logits.softmax(-1).cumsum(-1)[:, -1].min() < 1 - 2**-22
    assert sample(logits, torch.full((64,), 1 - 2**-24)).max() < 39_999


def test_sampling_inverts_the_same_uniform_whatever_the_shift():
    logits, uniforms = torch.randn(50, 9, generator=torch.Generator().manual_seed(0)), draw_uniforms(50, 1, 0)
    assert torch.equal(sample(logits, uniforms[:, 0]), sample(logits + 7, uniforms[:, 0]))


def test_eos_is_kept_and_padding_follows():
    model, prompts = tiny.causal(vocab_size=6, seed=2), [[4], [3, 5]] * 40
    found = generate(model, prompts, max_tokens=5, uniforms=draw_uniforms(80, 5, seed=3), **SPECIAL)
    assert found.tokens.shape == found.is_response.shape == (80, 5)
    for tokens, real, row in zip(
        found.tokens.tolist(), found.is_response.tolist(), found.lists(), strict=True
    ):
        wanted = tokens.index(tiny.EOS) + 1 if tiny.EOS in tokens else 5
        assert real == [True] * wanted + [False] * (5 - wanted), "a prefix that ends with eos or at R"
        assert row == tokens[:wanted] and row.count(tiny.EOS) <= 1
        assert tokens[wanted:] == [tiny.PAD] * (5 - wanted)
    lengths = [len(row) for row in found.lists()]
    assert {1, 3, 5} <= set(lengths)
    assert any(tiny.PAD in row for row in found.lists()), "a sampled pad token is a token like any other"


def test_lists_by_hand():
    tokens, real = torch.tensor([[7, 8, 1], [9, 1, 0]]), torch.tensor([[True] * 3, [True, True, False]])
    assert Responses(tokens, real).lists() == [[7, 8, 1], [9, 1]]


def test_decoding_stops_when_every_row_has_ended():
    model, forwards = tiny.causal("gpt2"), []
    model.register_forward_hook(lambda *_: forwards.append(1))
    with torch.no_grad():
        model.lm_head.weight[tiny.EOS] = 0
    free = generate(model, [[5]], max_tokens=30, **SPECIAL)
    assert len(forwards) == len(free.lists()[0]) == 30
    forwards.clear()
    uniforms = torch.zeros(2, 30)  # the first token with any probability
    with torch.no_grad():
        model.lm_head.weight[tiny.PAD] = 0
    found = generate(model, [[5], [6, 7]], max_tokens=30, uniforms=uniforms, eos_id=tiny.PAD, pad_id=tiny.EOS)
    assert found.lists() == [[tiny.PAD], [tiny.PAD]] and len(forwards) == 1


def test_no_prompt_no_response():
    assert generate(tiny.causal(), [], max_tokens=3, **SPECIAL).lists() == []


def test_the_model_is_left_in_evaluation_mode_and_without_gradients():
    model = tiny.causal(attention_dropout=0.5).train()
    first, second = (generate(model, ragged(), max_tokens=6, **SPECIAL) for _ in range(2))
    assert first.lists() == second.lists() and not model.training and not first.tokens.requires_grad

"""Sampling from encoder-decoders: greedy is transformers' own, and a row depends on itself alone."""

from __future__ import annotations

import pytest
import tiny
import torch
from peft import LoraConfig, get_peft_model
from seq2seq_models import KINDS, logits_of_row, model_of

from tasks.lm.sampling import seq2seq_decoder
from tasks.lm.sampling.generation import draw_uniforms, generate, row_seeds
from tasks.lm.sampling.seq2seq_decoder import TargetDecoder

SPECIAL = {"eos_id": tiny.EOS, "pad_id": tiny.PAD}
ENDLESS = {"eos_id": None, "pad_id": tiny.PAD}
FEW = ["t5", "t5 v1.1", "bart"]
SOURCES = [[*tiny.drawn([5])[0]], *tiny.drawn((9, 1, 5), 3), tiny.drawn([5])[0]]  # the last is the first


def greedy_of(model, prompt, most: int, eos):
    """transformers' own, without the start token; behind eos it stops."""
    asked = {"do_sample": False, "num_beams": 1, "max_new_tokens": most, "eos_token_id": eos}
    plain = {"forced_bos_token_id": None, "forced_eos_token_id": None}
    mask = torch.ones(1, len(prompt), dtype=torch.long)
    return model.generate(torch.tensor([prompt]), attention_mask=mask, **asked, **plain)[0, 1:].tolist()


@pytest.mark.parametrize("name", KINDS)
@pytest.mark.parametrize("ends", [False, True])
def test_greedy_is_that_of_transformers(name, ends):
    model = model_of(name)
    before = model.config._attn_implementation
    eos = None
    if ends:  # a token that some rows say early, and others do not
        said = generate(model, SOURCES, max_tokens=9, **ENDLESS).lists()
        eos = said[0][2]
    found = generate(model, SOURCES, max_tokens=9, eos_id=eos, pad_id=tiny.PAD).lists()
    for prompt, row in zip(SOURCES, found, strict=True):
        wanted = greedy_of(model_of(name), prompt, 9, -1 if eos is None else eos)
        assert row == wanted
        assert row[-1] == eos or len(row) == 9
    assert found[0] == found[-1] and (not ends or min(map(len, found)) <= 3)
    assert model.config._attn_implementation == before and not model.training


@pytest.mark.parametrize("name", FEW)
def test_a_row_depends_on_its_own_uniforms_alone(name):
    """Whatever stands beside it, in any order, however many at once."""
    model, uniforms = model_of(name), draw_uniforms(row_seeds(5, 5), 8)
    asked = {"max_tokens": 8, "temperature": 0.8, "rows": 2, **SPECIAL}
    wanted = generate(model, SOURCES, uniforms=uniforms, **{**asked, "rows": 512}).lists()
    assert wanted[0] != wanted[-1]  # one source, other numbers
    for order in ([4, 2, 0, 3, 1], [1, 1, 3], [2]):
        found = generate(model, [SOURCES[i] for i in order], uniforms=uniforms[order], **asked).lists()
        assert found == [wanted[i] for i in order]


@pytest.mark.parametrize("name", FEW)
@torch.no_grad()
def test_tokens_are_drawn_from_what_is_trained(name):
    """The same numbers choose the same tokens from the probabilities of a plain forward."""
    model, uniforms = model_of(name), draw_uniforms(row_seeds(5, 5), 8)
    found = generate(model, SOURCES, max_tokens=8, uniforms=uniforms, temperature=0.7, **SPECIAL).lists()
    for prompt, response, drawn in zip(SOURCES, found, uniforms, strict=True):
        upto = (logits_of_row(model, prompt, response) / 0.7).softmax(-1).cumsum(-1)
        again = torch.searchsorted(upto, drawn[: len(response), None], right=True)[:, 0]
        assert again.tolist() == response


@pytest.mark.parametrize("name", FEW)
def test_sources_are_read_once_and_in_parts(name, monkeypatch):
    model, seen, asked = model_of(name), [], {"max_tokens": 4, **ENDLESS}
    wanted = generate(model, SOURCES, **asked).lists()
    encoder = model.get_encoder()
    encoder.register_forward_pre_hook(
        lambda _, args, keys: seen.append(keys["input_ids"].shape), with_kwargs=True
    )
    assert generate(model, SOURCES, **asked).lists() == wanted
    is_packed = name != "bart"
    assert seen == ([(1, 20)] if is_packed else [(4, 9)])  # 9 + 5 + 5 + 1
    monkeypatch.setattr(seq2seq_decoder, "PREFILL_TOKENS", 10)
    seen.clear()
    assert generate(model, SOURCES, **asked).lists() == wanted
    assert seen == ([(1, 9), (1, 10), (1, 1)] if is_packed else [(1, 9), (2, 5), (1, 1)])


@pytest.mark.parametrize("name", FEW)
def test_each_row_has_its_limit_and_rows_leave(name, monkeypatch):
    model, widths = model_of(name), []
    step = TargetDecoder.step
    monkeypatch.setattr(TargetDecoder, "step", lambda self, t: widths.append(len(t)) or step(self, t))
    limits = [1, 7, 2, 3, 5]
    found = generate(model, SOURCES, max_tokens=limits, **ENDLESS).lists()
    whole = generate(model, SOURCES, max_tokens=7, **ENDLESS).lists()
    assert found == [row[:n] for row, n in zip(whole, limits, strict=True)]
    assert widths[0] == 4 and widths[1] == 5 and widths[6] == 1  # of sources; 4 of 5 rows are not few


def test_no_eos_before_so_many_tokens():
    model = model_of()
    model.lm_head.weight.data[tiny.EOS] = 50 * model.lm_head.weight.data.abs().sum(0)
    uniforms = draw_uniforms(row_seeds(5, 5), 6)
    found = generate(model, SOURCES, max_tokens=6, min_tokens=4, uniforms=uniforms, **SPECIAL).lists()
    assert all(tiny.EOS not in row[:4] for row in found)


@pytest.mark.parametrize("name", FEW)
def test_an_adapter_is_sampled_with(name):
    lora = {"target_modules": "all-linear", "init_lora_weights": False, "task_type": "SEQ_2_SEQ_LM"}
    model = get_peft_model(model_of(name), LoraConfig(**lora))
    found = generate(model, SOURCES, max_tokens=6, **ENDLESS).lists()
    assert found != generate(model_of(name), SOURCES, max_tokens=6, **ENDLESS).lists()
    assert found == [greedy_of(model.merge_and_unload(), prompt, 6, -1) for prompt in SOURCES]


@pytest.mark.parametrize("name", FEW)
def test_in_bfloat16(name):
    """Greedy tokens are, at each place, among the best of a plain forward, to rounding."""
    model = model_of(name)
    found = generate(model, SOURCES, max_tokens=8, dtype="bfloat16", **ENDLESS).lists()
    with torch.no_grad():
        for prompt, response in zip(SOURCES, found, strict=True):
            logits = logits_of_row(model, prompt, response)
            best, own = logits.max(-1).values, logits[range(len(response)), response]
            assert (best - own).max() <= 0.1 * (best.abs().max())


def test_places_for_prompt_and_response_apart():
    model = model_of("bart")
    assert len(generate(model, [[5] * 64], max_tokens=64, **ENDLESS).lists()[0]) == 64
    model.register_forward_hook(lambda *_: pytest.fail("computed"))
    for prompt, most in (([5] * 65, 1), ([5], 65)):
        with pytest.raises(ValueError, match=r"row 0 has .* too many for the model's 64 positions"):
            generate(model, [prompt], max_tokens=most, **ENDLESS)
    assert len(generate(model_of("t5"), [[5] * 90], max_tokens=70, **ENDLESS).lists()[0]) == 70


def test_a_model_without_cache_is_named(monkeypatch):
    model = model_of()
    forward = model.forward
    monkeypatch.setattr(model, "forward", lambda **keys: forward(**{**keys, "use_cache": False}))
    with pytest.raises(ValueError, match="T5ForConditionalGeneration keeps no cache"):
        generate(model, [[5]], max_tokens=2, **SPECIAL)

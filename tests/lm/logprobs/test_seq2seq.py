"""Responses of encoder-decoders: what is read of each token is what a plain forward of its row says."""

from __future__ import annotations

import re

import pytest
import tiny
import torch
from peft import LoraConfig, get_peft_model
from seq2seq_models import KINDS, PACKED, alone, close, laid_out, model_of, rows, valued
from transformers import (
    AutoConfig,
    AutoModelForSeq2SeqLM,
    EncoderDecoderConfig,
    EncoderDecoderModel,
    T5ForSequenceClassification,
    T5GemmaConfig,
    T5GemmaForConditionalGeneration,
    T5GemmaModuleConfig,
)

from tasks.lm import create_reference_model
from tasks.lm.adapters.lora import add_adapter, merge_checked
from tasks.lm.attention.forest import serve_forest
from tasks.lm.logprobs.responses import read_responses, response_kl, response_logprobs
from tasks.lm.logprobs.seq2seq import check_seq2seq, distinct_of, encode, logits_alone, split
from tasks.lm.model.context import Room, speaking_room
from tasks.lm.model.freezing import blocks_of, freeze_layers
from tasks.lm.model.kinds import start_of
from tasks.lm.model.recompute import recompute_blocks

WAYS = [(name, False) for name in KINDS] + [(name, True) for name in PACKED]
FEW = [("t5", True), ("t5 v1.1", True), ("t5", False), ("bart", False)]


def served(name, planted, **keys):
    """With a value head; in the forest where it is planted."""
    model = valued(model_of(name, **keys))
    assert not planted or serve_forest(model.pretrained_model)
    return model


def losses(read):
    """Something of each of the three, every token with a weight of its own."""
    return sum(((n + 1) * x * torch.linspace(0.5, 1.5, len(x))).sum() for n, x in enumerate(read))


@pytest.mark.parametrize(("name", "planted"), WAYS)
@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_each_token_is_read_as_in_its_row_alone(name, planted, temperature):
    """Short, one-token and empty responses, and two that share a source; the numbers and all gradients."""
    model, (prompts, responses) = served(name, planted), rows()
    read = read_responses(model, laid_out(), temperature)
    assert all(x.shape == (5, 6) and x.dtype == torch.float32 for x in read)
    assert not any(x[row, len(response) :].any() for x in read for row, response in enumerate(responses))
    wanted = [alone(model, *row, temperature) for row in zip(prompts, responses, strict=True) if row[1]]
    found = [[x[i, : len(r)] for x in read] for i, r in enumerate(responses) if r]
    for mine, right in zip(found, wanted, strict=True):
        assert all(close(a, b) for a, b in zip(mine, right, strict=True))
    sum(map(losses, found)).backward()
    gradients = tiny.gradients(model)
    sum(map(losses, wanted)).backward()
    assert tiny.far_gradients(gradients, tiny.gradients(model)) <= 1e-5
    parts = ("encoder.", "decoder.", "v_head.summary.weight")
    assert all(any(part in name and g.any() for name, g in gradients.items()) for part in parts)


@pytest.mark.parametrize(("name", "planted"), FEW)
@torch.no_grad()
def test_neither_neighbours_nor_padding_change_a_row(name, planted):
    model, (prompts, responses) = served(name, planted), rows()
    whole = read_responses(model, laid_out(), 0.7)
    long = [*prompts, *tiny.drawn([20], 5)], [*responses, *tiny.drawn([11], 6)]
    padded = read_responses(model, laid_out(*long), 0.7)
    for i, (prompt, response) in enumerate(zip(prompts, responses, strict=True)):
        single, n = read_responses(model, laid_out([prompt], [response]), 0.7), len(response)
        for a, b, c in zip(whole, padded, single, strict=True):
            assert close(b[i, :n], a[i, :n]) and close(c[0, :n], a[i, :n])


@pytest.mark.parametrize(("name", "planted"), FEW)
def test_the_first_token_is_learnt(name, planted):
    """TRL 0.11 leaves it out, and fails where there is no other."""
    model = served(name, planted)
    logprobs, entropy, values = read_responses(model, laid_out([[5, 6], [7]], [[8], [tiny.EOS]]), 1.0)
    assert logprobs.shape == (2, 1) and (logprobs < 0).all() and entropy.all() and values.all()
    for read in (logprobs, values):
        read[0].sum().backward(retain_graph=True)
        moved = {name for name, g in tiny.gradients(model).items() if g.any()}
        assert any("encoder." in name for name in moved) and any("decoder." in name for name in moved)


@pytest.mark.parametrize(("name", "planted"), FEW)
def test_empty_responses_say_nothing(name, planted):
    model = served(name, planted)
    none = laid_out([[5, 6], [7], [5, 6]], [[], [], []])
    read = read_responses(model, none, 0.7)
    assert all(x.shape == (3, 1) and not x.any() for x in read)
    sum(x.sum() for x in read).backward()
    assert not any(g.any() for g in tiny.gradients(model).values())
    assert not response_kl(model, model_of(name, 1), none, 0.7).any()


@pytest.mark.parametrize(("name", "planted"), FEW)
@torch.no_grad()
def test_kl_by_the_definition(name, planted):
    model, other, (prompts, responses) = served(name, planted), model_of(name, seed=1), rows()
    assert not planted or serve_forest(other)
    found = response_kl(model, other, laid_out(), 0.7)
    for row, prompt, response in zip(found, prompts, responses, strict=True):
        if response:
            p, q = (
                (logits_alone(m, prompt, response) / 0.7).log_softmax(-1)
                for m in (model.pretrained_model, other)
            )
            assert tiny.far(row[: len(response)], (p.exp() * (p - q)).sum(-1)) <= 1e-4
    assert (found[responses.index([]) :] == 0).all()


@pytest.mark.parametrize(("name", "planted"), FEW)
@torch.no_grad()
def test_a_source_that_rows_share_is_read_once(name, planted):
    model, seen = served(name, planted), []
    encoder = model.pretrained_model.get_encoder()
    encoder.register_forward_pre_hook(
        lambda _, args, keys: seen.append(keys["input_ids"].shape), with_kwargs=True
    )
    read_responses(model, laid_out(), 0.7)
    assert seen[-1] == ((1, 15) if planted else (3, 9))  # 5 + 9 + 1 tokens; three rows of at most 9


@pytest.mark.parametrize(("name", "planted"), FEW)
def test_blocks_are_computed_again_in_the_backward(name, planted):
    """With dropout in the configuration, which stays off."""
    found = []
    for is_wanted in (False, True):
        model = served(name, planted, **{"dropout" if name == "bart" else "dropout_rate": 0.5})
        with recompute_blocks(model, is_wanted):
            read = [x[:4] for x in read_responses(model, laid_out(), 0.7)]
            sum(losses(x.flatten()[None]) for x in read).backward()
        found.append((torch.stack(read), tiny.gradients(model)))
    assert tiny.far(found[1][0], found[0][0]) <= 1e-6
    assert tiny.far_gradients(found[1][1], found[0][1]) <= 1e-5


@pytest.mark.parametrize(("name", "planted"), FEW)
def test_an_adapter_and_the_model_below_it(name, planted):
    base = model_of(name)
    wanted = response_logprobs(base, laid_out(), 0.7)
    adapted = get_peft_model(base, LoraConfig(target_modules="all-linear", init_lora_weights=False))
    model = valued(adapted)
    assert not planted or serve_forest(adapted)
    with torch.no_grad():
        found = read_responses(model, laid_out(), 0.7)
        for i, row in enumerate(zip(*rows(), strict=True)):
            if row[1]:
                right = alone(model, *row, 0.7)
                assert all(close(a[i, : len(row[1])], b) for a, b in zip(found, right, strict=True))
        with adapted.disable_adapter():
            below = response_logprobs(adapted, laid_out(), 0.7)
        assert tiny.far(below, wanted) <= 1e-5 and tiny.far(found[0], wanted) > 1e-2
        kl = response_kl(model, None, laid_out(), 0.7)
        assert tiny.far(kl, response_kl(model, model_of(name), laid_out(), 0.7)) <= 1e-4 and kl.any()


def test_an_adapter_is_one_of_its_kind_and_merges():
    adapted = add_adapter(model_of(), rank=2)
    assert adapted.active_peft_config.task_type == "SEQ_2_SEQ_LM"
    for name, parameter in adapted.named_parameters():
        if "lora_B" in name:
            parameter.data.normal_(std=0.3)
    wanted = response_logprobs(adapted, laid_out(), 1.0)
    assert tiny.far(wanted, response_logprobs(model_of(), laid_out(), 1.0)) > 1e-2
    merged = merge_checked(adapted, tiny.drawn((4, 7)))
    assert tiny.far(response_logprobs(merged, laid_out(), 1.0), wanted) <= 1e-5


@pytest.mark.parametrize(("name", "planted"), FEW)
@torch.no_grad()
def test_under_autocast(name, planted):
    model = served(name, planted)
    wanted = read_responses(model, laid_out(), 0.7)
    with torch.autocast("cpu", torch.bfloat16):
        found = read_responses(model, laid_out(), 0.7)
    for a, b in zip(found, wanted, strict=True):
        assert a.dtype == torch.float32 and 0 < tiny.far(a, b) <= 5e-2


@pytest.mark.parametrize(("name", "planted"), FEW)
@torch.no_grad()
def test_in_half_precision(name, planted):
    wanted = read_responses(served(name, planted), laid_out(), 0.7)
    model = served(name, planted)
    model.pretrained_model.bfloat16()
    for a, b in zip(read_responses(model, laid_out(), 0.7), wanted, strict=True):
        assert a.dtype == torch.float32 and tiny.far(a, b) <= 5e-2


# ---- which layers are whose


@pytest.mark.parametrize("name", ["t5", "t5 v1.1", "bart"])
def test_the_last_blocks_are_the_decoders(name):
    model = model_of(name)
    freeze_layers(model, 1)
    last = len(blocks_of(model)) - 1
    learns = {n for n, p in model.named_parameters() if p.requires_grad}
    own = {n for n in learns if f"decoder.block.{last}." in n or f"decoder.layers.{last}." in n}
    assert (
        own
        and learns - own
        == {
            "t5": {"decoder.final_layer_norm.weight"},
            "t5 v1.1": {"decoder.final_layer_norm.weight", "lm_head.weight"},
            "bart": set(),
        }[name]
    )


@pytest.mark.parametrize("name", ["t5", "t5 v1.1", "bart"])
@pytest.mark.parametrize("n", [0, 1, 2])
def test_a_reference_shares_the_encoder_and_the_first_blocks(name, n):
    model = valued(model_of(name))
    reference = create_reference_model(model, n)
    own, other = ({k: p.data_ptr() for k, p in m.named_parameters()} for m in (model, reference))
    shared = {k for k in own if own[k] == other[k]}
    assert shared == {k for k, p in model.named_parameters() if not p.requires_grad}
    assert {k for k in own if ".encoder." in k or ".shared." in k} <= shared
    in_decoder = [re.search(r"\.decoder\.\w+\.(\d+)\.", name) for name in shared]
    blocks = {int(found[1]) for found in in_decoder if found}
    assert blocks == set(range(n))
    before = response_logprobs(reference, laid_out(), 1.0)
    response_logprobs(model, laid_out(), 1.0).sum().backward()
    torch.optim.SGD([p for p in model.parameters() if p.requires_grad], 0.1).step()
    assert torch.equal(response_logprobs(reference, laid_out(), 1.0), before)
    assert tiny.far(response_logprobs(model, laid_out(), 1.0), before) > 1e-3


def test_a_reward_model_with_an_encoder_freezes_too():
    model = T5ForSequenceClassification(tiny.config_of("t5", num_labels=1))
    freeze_layers(model, 1)
    learns = {n for n, p in model.named_parameters() if p.requires_grad}
    assert any("decoder.block.1" in n for n in learns) and any("classification_head" in n for n in learns)
    assert not any("encoder." in n or "decoder.block.0" in n or "shared" in n for n in learns)


def coupled():
    """Two models of the Hub made one: BERT reads, BERT answers."""
    parts = tiny.config_of("bert"), tiny.config_of("bert", is_decoder=True, add_cross_attention=True)
    config = EncoderDecoderConfig.from_encoder_decoder_configs(*parts)
    config.decoder_start_token_id, config.pad_token_id = 2, tiny.PAD
    torch.manual_seed(0)
    return EncoderDecoderModel(config=config).eval()


@torch.no_grad()
def test_two_models_coupled():
    model, (prompts, responses) = valued(coupled()), rows()
    found = read_responses(model, laid_out(), 0.7)
    for i, row in enumerate(zip(prompts, responses, strict=True)):
        if row[1]:
            logp = (logits_alone(model.pretrained_model, *row) / 0.7).log_softmax(-1)
            assert tiny.far(found[0][i, : len(row[1])], logp[range(len(row[1])), row[1]]) <= 1e-5
    with pytest.raises(ValueError, match="EncoderDecoderModel has no one stack of blocks in a decoder"):
        blocks_of(model.pretrained_model)


@pytest.mark.parametrize("layers", [(2, 2), (3, 2)])
@torch.no_grad()
def test_the_decoders_last_mlp_is_computed_where_it_is_read(layers):
    """T5Gemma's encoder has blocks of the same form."""
    keys = {**tiny.LLAMA, "head_dim": 8, "vocab_size": 32, "pad_token_id": tiny.PAD, "eos_token_id": tiny.EOS}
    parts = [T5GemmaModuleConfig(**{**keys, "num_hidden_layers": n}) for n in layers]
    torch.manual_seed(0)
    config = T5GemmaConfig(encoder=parts[0], decoder=parts[1], vocab_size=32, decoder_start_token_id=2)
    model, (prompts, responses) = valued(T5GemmaForConditionalGeneration(config).eval()), rows()
    seen = []
    blocks_of(model.pretrained_model)[-1].mlp.register_forward_hook(lambda _, i, out: seen.append(out.shape))
    found = read_responses(model, laid_out(), 0.7)
    assert set(seen) == {(1, 13, 16)}  # of 5 · 6 places
    for i, row in enumerate(zip(prompts, responses, strict=True)):
        if row[1]:
            right = alone(model, *row, 0.7)
            assert all(close(a[i, : len(row[1])], b) for a, b in zip(found, right, strict=True))


# ---- by hand


def test_split_and_distinct_by_hand():
    assert split(laid_out([[5, 6], [7]], [[8, 1], []])) == ([[5, 6], [7]], [[8, 1], []])
    assert distinct_of([[5, 6], [7], [5, 6]]) == ([(5, 6), (7,)], [0, 1, 0])


@pytest.mark.parametrize(("name", "planted"), FEW)
@torch.no_grad()
def test_sources_encoded_by_hand(name, planted):
    model = model_of(name)
    sources = tiny.drawn((5, 9, 1))
    wanted = [model.get_encoder()(input_ids=torch.tensor([s]))[0][0] for s in sources]
    assert not planted or serve_forest(model)
    states, is_real = encode(model, sources)
    assert states.shape[:2] == (3, 9) and is_real.sum(1).tolist() == [5, 9, 1] and is_real[2, 0]
    for mine, right in zip(states, wanted, strict=True):
        assert tiny.far(mine[: len(right)], right) <= 1e-5


def test_rooms_by_hand():
    assert Room(8).holds(5, 3) and not Room(8).holds(5, 4) and Room(8).of_prompt(3) == 5
    each = Room(8, is_apart=True)
    assert each.holds(8, 8) and not each.holds(9, 1) and not each.holds(1, 9) and each.of_prompt(3) == 8
    assert Room().holds(10**9, 10**9) and Room().of_prompt(3) is None
    assert (str(Room(8)), str(each)) == ("8", "8 each")
    assert speaking_room(model_of("bart")) == Room(64, is_apart=True)
    assert speaking_room(model_of("t5")) == Room(None, is_apart=True)
    assert speaking_room(tiny.causal()) == Room(64)


def test_where_the_start_token_stands():
    model = model_of("bart")
    assert start_of(model) == tiny.EOS
    model.config.decoder_start_token_id = None
    model.generation_config.decoder_start_token_id = 5
    assert start_of(model) == 5
    model.config.decoder_start_token_id = 0
    assert start_of(model) == 0
    model.config.decoder_start_token_id = model.generation_config.decoder_start_token_id = None
    with pytest.raises(ValueError, match=r"BartForConditionalGeneration: .* has no decoder_start_token_id"):
        check_seq2seq(model)


def test_what_is_no_encoder_decoder_is_refused():
    for model in (tiny.causal(), T5ForSequenceClassification(tiny.config_of("t5"))):
        with pytest.raises(ValueError, match=rf"{type(model).__name__} is no encoder-decoder with a"):
            check_seq2seq(model)
    experts = AutoConfig.for_model("switch_transformers", **tiny.T5, vocab_size=32, num_experts=2)
    with pytest.raises(ValueError, match="SwitchTransformersForConditionalGeneration has experts"):
        check_seq2seq(AutoModelForSeq2SeqLM.from_config(experts))

"""Models and tokenizers from folders and from nothing; what is wrong with one is said in one line."""

from __future__ import annotations

import json
import shutil

import pytest
import tiny
import torch
from tokenizers import Tokenizer, models
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

from tasks.lm.model.loading import (
    create_causal,
    create_reward,
    fit_embeddings,
    load_causal,
    load_reward,
    load_tokenizer,
    save_model,
    train_tokenizer,
)


def words(folder, **special):
    """Save a tokenizer of five words with these special tokens."""
    raw = Tokenizer(models.WordLevel({"<u>": 0, "<b>": 1, "<e>": 2, "a": 3, "b": 4}, unk_token="<u>"))
    PreTrainedTokenizerFast(tokenizer_object=raw, **special).save_pretrained(folder)
    return folder


@pytest.mark.parametrize(
    ("special", "pad"),
    [
        ({"pad_token": "a"}, "a"),
        ({"unk_token": "<u>", "bos_token": "<b>"}, "<u>"),
        ({"bos_token": "<b>"}, "<b>"),
        ({"unk_token": "<e>", "bos_token": "<b>"}, "<b>"),
        ({"unk_token": "<e>", "bos_token": "<e>"}, "<|pad|>"),  # GPT-2
        ({}, "<|pad|>"),
        ({"pad_token": "<e>", "unk_token": "<u>"}, "<u>"),
        ({"pad_token": "<e>"}, "<|pad|>"),
    ],
)
def test_pad_is_never_eos(tmp_path, special, pad):
    found = load_tokenizer(words(tmp_path, eos_token="<e>", **special))
    assert found.pad_token == pad and found.eos_token == "<e>"
    assert found.pad_token_id not in (None, found.eos_token_id)
    assert len(found) == 5 + (pad == "<|pad|>")


def test_a_tokenizer_without_eos_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"model\.base: the tokenizer of .* has no eos token"):
        load_tokenizer(words(tmp_path, pad_token="<u>"))


def test_the_trained_tokenizer(tmp_path):
    texts = [f"Question: what is {i} + {i}?\n\nAnswer: It is `{2 * i}`." for i in range(60)]
    first, second = train_tokenizer(iter(texts), 270), train_tokenizer(texts, 270)
    for name, made in (("a", first), ("b", second)):
        made.save_pretrained(tmp_path / name)
    assert tiny.digests(tmp_path / "a") == tiny.digests(tmp_path / "b")
    assert (first.pad_token_id, first.eos_token_id, len(first)) == (0, 1, 270)
    assert first.decode(first("é 日本 🙂\x00")["input_ids"]) == "é 日本 🙂\x00", "every byte has a token"
    dates = train_tokenizer(["2024"] * 50, 300)
    assert len(dates("2024")["input_ids"]) == 4, "digits stand alone"
    reloaded = load_tokenizer(tmp_path / "a")
    assert reloaded("It is `7`.")["input_ids"] == first("It is `7`.")["input_ids"]
    assert (reloaded.pad_token_id, reloaded.eos_token_id) == (0, 1)


def test_little_text_gives_a_small_tokenizer():
    assert len(train_tokenizer(["ab ab"], 1000)) < 265


def made(**keys):
    config = {"model_type": "llama", **tiny.LLAMA, **keys}
    return create_causal(config, tiny.tokenizer())


def test_a_model_from_nothing_fits_its_tokenizer():
    model = made(vocab_size=7)
    assert model.config.vocab_size == model.get_input_embeddings().num_embeddings == len(tiny.tokenizer())
    assert (model.config.pad_token_id, model.config.eos_token_id) == (0, 1)
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    assert len(model.model.layers) == tiny.LLAMA["num_hidden_layers"]


@pytest.mark.parametrize(
    ("keys", "says"),
    [
        ({"model_type": "lama"}, "lama"),
        ({"model_type": "t5"}, "T5Config"),
        ({"hidden_size": 30, "num_attention_heads": 4}, "30"),
    ],
)
def test_a_configuration_that_is_refused_is_one_short_line(keys, says):
    with pytest.raises(ValueError, match=r"^model\.config: ") as error:
        made(**keys)
    assert says in str(error.value) and len(str(error.value)) < 300 and "\n" not in str(error.value)


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    return tiny.save(made(), tmp_path_factory.mktemp("models") / "base")


@pytest.fixture
def folder(saved, tmp_path):
    return shutil.copytree(saved, tmp_path / "base")


def test_what_is_saved_is_loaded(saved):
    model, ids = load_causal(saved), torch.tensor([[5, 6]])
    assert torch.equal(model(ids).logits, AutoModelForCausalLM.from_pretrained(saved)(ids).logits)
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    assert not [path for path in saved.iterdir() if path.suffix in (".bin", ".pt")]


def test_half_precision_weights_become_float32(tmp_path):
    tiny.save(made().bfloat16(), tmp_path / "half")
    assert {p.dtype for p in load_causal(tmp_path / "half").parameters()} == {torch.float32}


def break_weights(folder):
    (folder / "model.safetensors").unlink()


def pickle_weights(folder):
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")


def cut_weights(folder):
    whole = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(whole[:-1000])


def break_config(folder):
    (folder / "config.json").write_text("{")


def unknown_type(folder):
    (folder / "config.json").write_text(json.dumps({"model_type": "lama"}))


def remove(folder):
    shutil.rmtree(folder)


HARMS = [break_weights, pickle_weights, cut_weights, break_config, unknown_type, remove]


@pytest.mark.parametrize("harm", HARMS)
@pytest.mark.parametrize("load", [load_causal, load_reward])
def test_a_folder_that_does_not_load_is_one_line(folder, harm, load):
    harm(folder)
    with pytest.raises(ValueError, match=r"^model\.base: ") as error:
        load(folder)
    assert str(folder) in str(error.value) and "\n" not in str(error.value) and len(str(error.value)) < 600


@pytest.mark.parametrize("harm", [remove, lambda folder: (folder / "tokenizer.json").write_text("{")])
def test_a_tokenizer_that_does_not_load_is_one_line(folder, harm):
    harm(folder)
    with pytest.raises(ValueError, match=r"^model\.base: no tokenizer in ") as error:
        load_tokenizer(folder)
    assert str(folder) in str(error.value) and "\n" not in str(error.value)


def test_a_reward_model_starts_from_a_causal_one(saved):
    model = load_reward(saved)
    assert model.score.weight.shape == (1, tiny.LLAMA["hidden_size"]) and model.config.num_labels == 1
    assert torch.equal(model.model.embed_tokens.weight, load_causal(saved).model.embed_tokens.weight)


def test_a_reward_model_of_the_same_shape_with_new_weights(tmp_path):
    saved = tiny.save(made().bfloat16(), tmp_path / "half")
    old, new = load_reward(saved), create_reward(saved)
    assert {n: p.shape for n, p in new.named_parameters()} == {n: p.shape for n, p in old.named_parameters()}
    assert {p.dtype for p in new.parameters()} == {torch.float32}
    sides = (model.model.layers[0].mlp.up_proj.weight.flatten() for model in (old, new))
    assert abs(torch.cosine_similarity(*sides, 0)) < 0.5
    remove(saved)
    with pytest.raises(ValueError, match=r"^reward\.judge: cannot make a model like ") as error:
        create_reward(saved, "reward.judge")
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("tied", [True, False])
def test_embeddings_grow_to_the_tokenizer(tied, tmp_path):
    model, tokenizer = tiny.causal(vocab_size=200, tie_word_embeddings=tied, pad_token_id=7), tiny.tokenizer()
    model.config.eos_token_id = model.generation_config.eos_token_id = 9
    before = model(torch.tensor([[5, 6, 7]])).logits
    fit_embeddings(model, tokenizer)
    assert model.get_input_embeddings().num_embeddings == model.config.vocab_size == len(tokenizer)
    assert tiny.far(model(torch.tensor([[5, 6, 7]])).logits[..., :200], before) <= 1e-6
    assert (model.config.pad_token_id, model.config.eos_token_id) == (7, 1)
    assert (model.generation_config.pad_token_id, model.generation_config.eos_token_id) == (7, [9, 1])
    save_model(model, tokenizer, tmp_path)
    assert load_causal(tmp_path).config.vocab_size == len(tokenizer)


def test_embeddings_never_shrink():
    model = tiny.causal(vocab_size=400)
    fit_embeddings(model, tiny.tokenizer())
    assert model.get_input_embeddings().num_embeddings == 400

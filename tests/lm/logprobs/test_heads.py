"""Hidden states and embeddings say what the model itself says; a model with more to it is found out."""

from __future__ import annotations

import pytest
import tiny
import torch
from peft import LoraConfig, get_peft_model
from transformers import Trainer, TrainingArguments

from tasks.lm.logprobs import lm_head
from tasks.lm.logprobs.lm_head import check_causal, predict

PLAIN = ["llama", "mistral", "qwen2", "qwen3", "gemma", "phi3", "gpt2", "gpt_neox", "opt", "bloom", "gptj"]
TOKENS = torch.tensor(tiny.drawn((9, 9)))
PLACES, WANTED = torch.tensor([2, 2, 7, 0, 12, 17]), torch.tensor([5, 6, 5, 30, 0, 1])
OWN = {
    "gemma2": {"final_logit_softcapping": 30.0},
    "cohere": {"logit_scale": 0.0625},
    "granite": {"logits_scaling": 8.0},
}


class Runs:
    def __init__(self) -> None:
        self.count = 0

    def __call__(self, model):
        self.count += 1
        return model(TOKENS, use_cache=False)


def by_the_model(model, up):
    """Log-probabilities and gradients through the model's own logits."""
    logits = model(TOKENS).logits.flatten(0, 1)[PLACES].float().log_softmax(-1)
    logp = logits.gather(1, WANTED[:, None])[:, 0]
    (logp @ up).backward()
    return logp.detach(), tiny.gradients(model)


def held_to_the_model(model) -> int:
    """Predictions and gradients are the model's; how many forwards the first and the second time took."""
    up, runs = torch.randn(6, generator=torch.Generator().manual_seed(0)), Runs()
    wanted, gradients = by_the_model(model, up)
    for _ in range(2):
        found = predict(model, runs, PLACES)
        said = found.read(WANTED)
        assert tiny.far(said.logprobs, wanted) <= 1e-5
        assert tiny.far(found.summed_nll(WANTED), -wanted.sum()) <= 1e-5
        (said.logprobs @ up).backward()
        assert tiny.far_gradients(tiny.gradients(model), gradients) <= 1e-5
    return runs.count


@pytest.mark.parametrize("kind", PLAIN)
def test_states_and_embeddings_are_enough(kind):
    model = tiny.causal(kind)
    assert held_to_the_model(model) == 2
    found = predict(model, Runs(), PLACES)
    assert found.weight is model.get_output_embeddings().weight and found.states is found.hidden
    hidden = model(TOKENS, output_hidden_states=True).hidden_states[-1]
    assert tiny.far(found.hidden[PLACES], hidden.flatten(0, 1)[PLACES]) <= 1e-6


@pytest.mark.parametrize("kind", OWN)
@pytest.mark.parametrize("loudness", [1.0, 1e-3])
def test_logits_that_are_more_than_that_are_the_models_own(kind, loudness):
    """A cap does nothing to the small logits of a fresh model: it has to be tried with loud ones."""
    model = tiny.causal(kind, tie_word_embeddings=False, **OWN[kind])
    model.lm_head.weight.data.mul_(loudness)
    assert held_to_the_model(model) == 3  # the first one found out
    found = predict(model, Runs(), PLACES)
    assert found.weight is None and found.states.shape == (5, 32)


def test_a_model_that_could_cap_and_does_not_is_plain():
    assert held_to_the_model(tiny.causal("gemma2", final_logit_softcapping=None)) == 2


def test_what_is_added_to_the_logits_shows_beside_small_ones(monkeypatch):
    model = tiny.causal()
    forward = model.forward

    def shifted(*args, **keys):
        out = forward(*args, **keys)
        out.logits = out.logits + 0.002 * torch.arange(32)
        return out

    monkeypatch.setattr(model, "forward", shifted)
    assert held_to_the_model(model) == 3


def test_an_adapter_on_the_embeddings_is_asked():
    """It starts as nothing, so that no trial would show it; also where the bare model was found plain."""
    model = tiny.causal(tie_word_embeddings=False)
    assert held_to_the_model(model) == 2
    model = get_peft_model(model, LoraConfig(target_modules=["lm_head", "q_proj"], init_lora_weights=False))
    assert held_to_the_model(model) == 2
    assert predict(model, Runs(), PLACES).weight is None


def test_an_adapter_inside_leaves_the_embeddings_plain():
    model = get_peft_model(tiny.causal(), LoraConfig(target_modules="all-linear", init_lora_weights=False))
    assert held_to_the_model(model) == 2
    assert predict(model, Runs(), PLACES).weight is not None
    model = get_peft_model(
        tiny.causal(tie_word_embeddings=False),
        LoraConfig(target_modules=["q_proj"], modules_to_save=["lm_head"], init_lora_weights=False),
    )
    held_to_the_model(model)


@torch.no_grad()
@pytest.mark.parametrize("kind", ["llama", "gemma2"])
def test_no_logits_but_of_wanted_places(kind):
    """5 distinct places of 18, vocabulary 320."""
    model = tiny.causal(kind, vocab_size=320, tie_word_embeddings=False)
    predict(model, Runs(), PLACES)
    with tiny.Largest() as seen:
        predict(model, Runs(), PLACES).read(WANTED)
    assert seen.elements < 18 * 320 and seen.elements <= max(5 * 320, model.lm_head.weight.numel())


def test_the_trial_draws_no_random_number():
    model, before = tiny.causal(), torch.get_rng_state()
    predict(model, Runs(), PLACES)
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("kind", ["llama", "gemma2"])
@torch.no_grad()
def test_half_precision_finds_the_same(kind):
    for change in (lambda model: model.bfloat16(), lambda model: model):
        model = change(tiny.causal(kind))
        with torch.autocast("cpu", torch.bfloat16, enabled=model.dtype == torch.float32):
            found = predict(model, Runs(), PLACES)
            said = found.read(WANTED).logprobs
        assert (found.weight is None) is (kind == "gemma2")
        wanted = tiny.causal(kind)(TOKENS).logits.flatten(0, 1)[PLACES].log_softmax(-1)
        assert tiny.far(said, wanted.gather(1, WANTED[:, None])[:, 0]) <= 5e-2


def test_through_the_wrapper_of_mixed_precision(tmp_path):
    """accelerate puts a forward on the model that autocasts and gives float32 back."""
    arguments = TrainingArguments(str(tmp_path), bf16=True, use_cpu=True, report_to="none")
    model = tiny.causal()
    trainer = Trainer(model, arguments)
    wrapped = trainer.accelerator.prepare_model(model, evaluation_mode=True)
    assert "forward" in vars(wrapped)
    with torch.autocast("cpu", torch.bfloat16):
        assert predict(wrapped, Runs(), PLACES).weight is not None


@pytest.mark.parametrize("model", [tiny.scorer(), tiny.seq2seq(), tiny.scorer("bert")])
def test_what_predicts_no_next_token_is_refused(model):
    check_causal(tiny.causal())
    check_causal(get_peft_model(tiny.causal(), LoraConfig(target_modules="all-linear")))
    with pytest.raises(ValueError, match=rf"^{type(model).__name__} is no causal language model"):
        check_causal(model)


def test_the_hook_is_taken_away_after_an_error():
    model = tiny.causal()

    def fails(model):
        raise RuntimeError("out of memory")

    with pytest.raises(RuntimeError):
        predict(model, fails, PLACES)
    assert not model.lm_head._forward_pre_hooks and model.lm_head not in lm_head._is_plain

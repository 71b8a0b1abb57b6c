"""A text longer than the model's places: cut as stated, or refused by its row and both lengths."""

from __future__ import annotations

import pytest
import tiny
import torch
from adapted import lora, saved_base, saved_scorer
from transformers import pipeline

from tasks.lm import AutoModelForCausalLMWithValueHead as Valued
from tasks.lm.attention.padding import lay_out
from tasks.lm.heads.scores import score_documents
from tasks.lm.logprobs.responses import read_responses, response_kl, response_logprobs
from tasks.lm.sampling.generation import generate
from tasks.ppo.reward_functions import from_adapter, from_model, from_pipeline

KINDS = ["gpt2", "opt", "llama"]  # learnt places, those with an offset, rotary ones
PLACES = 64
LONG = tiny.drawn([3, PLACES + 6], seed=1)
PROMPTS, RESPONSES = tiny.drawn([4, PLACES - 4], seed=1), tiny.drawn([3, 9], seed=2)


@pytest.mark.parametrize("kind", KINDS)
def test_reading_names_the_row(kind):
    model, sequences = tiny.causal(kind), lay_out(PROMPTS, RESPONSES, tiny.PAD, "cpu")
    for call in (
        lambda: response_logprobs(model, sequences, 1.0),
        lambda: read_responses(model, sequences, 1.0),
        lambda: response_kl(model, tiny.causal(kind), sequences, 1.0),
    ):
        with pytest.raises(ValueError, match=r"row 1 has a prompt of 60 .* response of 9; .* room for 64"):
            call()
    with pytest.raises(ValueError, match=r"prompts: row 1 has 60 tokens, with a response of 5 too many"):
        generate(model, PROMPTS, max_tokens=5, eos_id=None, pad_id=0)


@pytest.mark.parametrize("kind", KINDS)
def test_padding_takes_no_place(kind):
    """A long prompt beside a long response is a wide batch of rows that all have room."""
    model = tiny.causal(kind)
    prompts, responses = tiny.drawn([60, 5], seed=1), tiny.drawn([2, 58], seed=2)
    found = response_logprobs(model, lay_out(prompts, responses, tiny.PAD, "cpu"), 1.0)
    for row in range(2):
        alone = lay_out(prompts[row : row + 1], responses[row : row + 1], tiny.PAD, "cpu")
        wanted = response_logprobs(model, alone, 1.0)[0]
        assert tiny.far(found[row, : len(responses[row])], wanted) < 1e-5


@pytest.mark.parametrize("kind", [*KINDS, "bert"])
def test_scoring_names_the_row(kind):
    with pytest.raises(ValueError, match=r"document 1 has 70 tokens; the model has room for 64"):
        score_documents(tiny.scorer(kind), LONG, 4)


@pytest.mark.parametrize("kind", ["gpt2", "llama"])
def test_a_reward_adapter_names_the_row(kind, tmp_path):
    base = saved_base(tmp_path / "base", kind)
    saved_scorer(tmp_path / "reward", base)
    policy = Valued.from_pretrained(base, peft_config=lora(), reward_adapter=tmp_path / "reward")
    with pytest.raises(ValueError, match=r"document 1 has 70 tokens; the model has room for 64"):
        from_adapter(policy, tiny.SPECIAL)([LONG[0][:1], LONG[1][:60]], [LONG[0][1:], LONG[1][60:]])
    tokens = torch.tensor([LONG[1]])
    with pytest.raises(ValueError, match=r"row 0 has 70 tokens; the model has room for 64"):
        policy.compute_reward_score(tokens)
    mask = torch.ones_like(tokens)
    mask[:, :6] = 0
    assert policy.compute_reward_score(tokens, mask).isfinite().all(), "padding takes no place"


@pytest.mark.parametrize("kind", ["gpt2", "opt", "llama"])
def test_a_reward_function_cuts_at_the_end(kind, tmp_path):
    """A model object, a folder of the policy's tokens, one of other tokens, a pipeline: as is stated."""
    known = tiny.tokenizer()
    model = tiny.scorer(kind, vocab_size=len(known))
    long, closing = "What is 2 + 3? " * 30, [" Five"]
    ids = known(long + closing[0])["input_ids"]
    assert len(ids) > PLACES
    wanted = score_documents(model, [ids[:PLACES]], 1)
    assert tiny.far(from_model(model, known)([long], closing), wanted) < 1e-6
    folder = tiny.save(model, tmp_path / "model")
    assert tiny.far(from_model(folder, known)([long], closing), wanted) < 1e-6
    assert from_model(folder, tiny.encoder_tokenizer())([[9] * 90], [[7, 8]]).isfinite().all()
    pipe = pipeline("text-classification", model=model, tokenizer=known)
    assert tiny.far(from_pipeline(pipe)([long], closing), wanted) < 1e-5

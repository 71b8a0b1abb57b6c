"""What scores, reads or samples does so without dropout, and leaves every module in the mode it was in."""

from __future__ import annotations

import pytest
import tiny
import torch
from adapted import lora, saved_base, saved_scorer
from transformers import pipeline

from tasks.lm import AutoModelForCausalLMWithValueHead as Valued
from tasks.lm.attention.padding import lay_out
from tasks.lm.heads.scores import score_documents
from tasks.lm.logprobs.responses import read_responses, read_trunk, response_kl, response_logprobs
from tasks.lm.model.modes import evaluating
from tasks.lm.sampling.generation import draw_uniforms, generate
from tasks.ppo.reward_functions import from_model, from_pipeline

DROPOUT = {"resid_pdrop": 0.5, "embd_pdrop": 0.5, "attn_pdrop": 0.5}
PROMPTS, RESPONSES = tiny.drawn([4, 6, 3], seed=1), tiny.drawn([3, 2, 4], seed=2)
SEQUENCES = lay_out(PROMPTS, RESPONSES, tiny.PAD, "cpu")
TEXTS = ["What is 2?", "Who?"], [" Four", " It is me"]


def policy(folder):
    base = saved_base(folder / "base", "gpt2", **DROPOUT)
    saved_scorer(folder / "reward", base, **DROPOUT)
    return Valued.from_pretrained(base, peft_config=lora(lora_dropout=0.5), reward_adapter=folder / "reward")


def causal(_):
    return tiny.causal("gpt2", **DROPOUT)


def scorer(_):
    return tiny.scorer("gpt2", vocab_size=len(tiny.tokenizer()), **DROPOUT)


@torch.no_grad()
def read_without_gradient(model):
    return torch.stack(read_responses(model, SEQUENCES, 1.0)[:2])


ROADS = {
    "scores": (scorer, lambda m: score_documents(m, PROMPTS, 2)),
    "a reward function of a model": (scorer, lambda m: from_model(m, tiny.tokenizer())(*TEXTS)),
    "a reward function of token ids": (scorer, lambda m: from_model(m, tiny.SPECIAL)(PROMPTS, RESPONSES)),
    "log-probabilities": (causal, lambda m: response_logprobs(m, SEQUENCES, 1.0).detach()),
    "readings": (causal, read_without_gradient),
    "readings with values": (policy, read_without_gradient),
    "KL": (policy, lambda m: response_kl(m, None, SEQUENCES, 1.0)),
    "trunk": (causal, lambda m: read_trunk(m, SEQUENCES, 1).states),
    "sampled": (causal, lambda m: generate(m, PROMPTS, max_tokens=6, eos_id=None, pad_id=0,
                                           uniforms=draw_uniforms([1, 2, 3], 6)).tokens),
    "scores of a reward adapter": (policy, lambda m: m.score_documents(PROMPTS)),
    "scores of every token": (policy, lambda m: m.compute_reward_score(torch.tensor([PROMPTS[0]]))),
}  # fmt: skip


@pytest.mark.parametrize("road", ROADS)
def test_no_dropout_and_the_modes_as_they_were(road, tmp_path):
    make, call = ROADS[road]
    model = make(tmp_path).eval()
    wanted = call(model)
    assert not any(module.training for module in model.modules())
    model.train()
    next(reversed(list(model.modules()))).eval()
    modes = {name: module.training for name, module in model.named_modules()}
    found = call(model)
    assert torch.equal(found, wanted)
    assert {n: m.training for n, m in model.named_modules() if n in modes} == modes


def test_a_pipelines_model_too():
    model = scorer(None)
    pipe = pipeline("text-classification", model=model, tokenizer=tiny.tokenizer())
    wanted = from_pipeline(pipe)(*TEXTS)
    model.train()
    assert torch.equal(from_pipeline(pipe)(*TEXTS), wanted) and all(m.training for m in model.modules())


def test_the_modes_return_after_an_error():
    model = tiny.causal().train()
    with pytest.raises(KeyError), evaluating(model, None):
        assert not model.training
        raise KeyError
    assert all(module.training for module in model.modules())


def test_a_reading_that_is_learnt_from_is_in_the_callers_mode():
    """Blocks that are computed again in the backward must see what the forward saw."""
    model = tiny.causal("gpt2", **DROPOUT)
    wanted = response_logprobs(model, SEQUENCES, 1.0)
    torch.manual_seed(1)
    assert tiny.far(read_responses(model.train(), SEQUENCES, 1.0)[0], wanted) > 1e-2

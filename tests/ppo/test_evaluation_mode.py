"""Whatever mode the models are left in, PPO runs without dropout; and what its first step looks at."""

from __future__ import annotations

import logging
from dataclasses import replace

import made_trainers
import pytest
import tiny
import torch
from adapted import lora, moved
from made_trainers import batch, trainer, weights
from peft import get_peft_model
from torch import nn

from tasks.ppo.first_step import same_weights

DROPOUT = {"resid_pdrop": 0.4, "embd_pdrop": 0.4, "attn_pdrop": 0.4}
WAYS = ("copy", "own reference", "adapter", "adapter trained on", "value branch", "checkpointing", "full")


def made(way: str):
    keys, given = {}, {"ref_model": None}
    policy = tiny.causal("gpt2", **DROPOUT)
    if way == "own reference":
        given = {"ref_model": tiny.causal("gpt2", **DROPOUT)}
    if way.startswith("adapter"):
        policy = get_peft_model(policy, lora(lora_dropout=0.4))
        policy = moved(policy) if way.endswith("on") else policy
    if way == "value branch":
        policy = made_trainers.AutoModelForCausalLMWithValueHead(
            policy, num_value_layers_unfrozen=1, summary_dropout_prob=0.4
        )
    if way == "checkpointing":
        keys = {"gradient_checkpointing": True}
    if way == "full":
        keys = {"kl_penalty": "full"}
    torch.manual_seed(0)
    return trainer("gpt2", given={"model": policy, **given}, **keys)


def models(ppo):
    return [each for each in (ppo.model, ppo.ref_model) if each is not None]


def left_in_training(ppo):
    """As a script of TRL's does it; one module is left as it was."""
    for each in models(ppo):
        each.train()
        list(each.modules())[-1].eval()
    return [[m.training for m in each.modules()] for each in models(ppo)]


@pytest.mark.parametrize("way", WAYS)
def test_a_step_is_the_same_in_any_mode(way):
    queries = [torch.tensor(p) for p in batch()[0]]
    plain, left = made(way), made(way)
    for number in range(2):
        modes = left_in_training(left)
        wanted = plain.generate(queries, max_new_tokens=5, return_prompt=False)
        found = left.generate(queries, max_new_tokens=5, return_prompt=False)
        assert all(map(torch.equal, found, wanted))
        wanted, found = (each.step(*batch(seed=number)) for each in (plain, left))
        assert {k: v for k, v in found.items() if isinstance(v, float) and "time" not in k} == {
            k: v for k, v in wanted.items() if isinstance(v, float) and "time" not in k
        }
        assert [[m.training for m in each.modules()] for each in models(left)] == modes
        if number == 0:
            assert abs(found["objective/kl"]) < 1e-4
    own = weights(plain)
    assert all(torch.equal(value, own[name]) for name, value in weights(left).items())


def test_the_whole_loop_too():
    """Preflight, rollouts, looks and updates; a reward function may not leave its mode behind either."""
    prompts, scores = batch(12, seed=3)[0], []

    def run(leaves: bool):
        ppo = trainer("gpt2", given={"ref_model": None}, model_keys=DROPOUT, updates=2, eval_updates=1)

        def reward_fn(_, responses):
            if leaves:
                left_in_training(ppo)
            return torch.tensor([float(len(set(r))) for r in responses])

        scores.append(ppo.train(prompts, reward_fn).rows)
        return weights(ppo)

    wanted, found = run(False), run(True)
    assert scores[0] == scores[1] and all(torch.equal(found[n], v) for n, v in wanted.items())


def first_step(ppo, caplog, seed=0) -> list[str]:
    caplog.clear()
    with caplog.at_level(logging.WARNING):
        ppo.step(*batch(seed=seed))
    return [record.getMessage() for record in caplog.records if "first step" in record.getMessage()]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("way", ["copy", "own reference", "adapter trained on"])
def test_a_sound_first_step_says_nothing(way, dtype, caplog):
    ppo = made(way)
    ppo.config = replace(ppo.config, dtype=dtype)
    assert first_step(ppo, caplog) == []


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_ratio_other_than_one_is_said_once(dtype, caplog):
    ppo = trainer(dtype=dtype)
    last = [m for m in ppo.model.modules() if "Norm" in type(m).__name__][-1]
    last.register_forward_hook(
        lambda module, inputs, out: nn.functional.dropout(out, 0.3) if torch.is_grad_enabled() else out
    )
    (said,) = first_step(ppo, caplog)
    assert "the ratio of the first minibatch is not 1: log-probabilities differ by" in said
    assert "\n" not in said and "KL" not in said
    assert first_step(ppo, caplog, 1) == []


@pytest.mark.parametrize("way", ["copy", "own reference"])
def test_a_reference_of_the_same_weights_that_says_something_else(way, caplog):
    ppo = made(way)
    ppo.ref_model.register_forward_hook(lambda *_: None)
    embeddings = getattr(ppo.ref_model, "pretrained_model", ppo.ref_model).get_input_embeddings()
    embeddings.register_forward_hook(lambda module, inputs, out: 1.5 * out)
    (said,) = first_step(ppo, caplog)
    assert "KL to the reference is not 0" in said and "ratio" not in said
    assert first_step(ppo, caplog, 1) == []


def test_a_reference_of_other_weights_is_a_choice(caplog):
    ppo = trainer(given={"ref_model": tiny.causal(seed=1)})
    assert first_step(ppo, caplog) == []


def test_which_weights_are_the_same():
    model, other = tiny.causal(), tiny.causal()
    assert same_weights(model, other) and same_weights(model, model)
    with torch.no_grad():
        list(other.parameters())[-1][0] += 1
    assert not same_weights(model, other) and not same_weights(model, tiny.causal("gpt2"))


def test_a_step_without_a_token_to_learn_says_nothing(caplog):
    ppo, (prompts, responses, scores) = trainer(), batch()
    assert ppo.step(prompts, [[] for _ in responses], scores) is not None
    assert not [r for r in caplog.records if "first step" in r.getMessage()]

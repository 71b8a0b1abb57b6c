"""Every check of the preflight: a trainer it lets pass, and one broken so that this check alone speaks."""

from __future__ import annotations

import copy
import re
from types import SimpleNamespace

import pytest
import tiny
import torch
from torch import nn

import tasks.lm.logprobs.responses
import tasks.ppo.preflight
import tasks.ppo.trainer
from tasks.lm import AutoModelForCausalLMWithValueHead
from tasks.ppo import PPOConfig, PPOTrainer
from tasks.ppo.preflight import FULL, HALF, PROBE, ROUNDS, TF32, _rounding, preflight
from tasks.run.layout import Refusal

DROPOUT = {
    "llama": {"attention_dropout": 0.3},
    "gpt2": {"resid_pdrop": 0.3, "embd_pdrop": 0.3, "attn_pdrop": 0.3},
    "bloom": {"hidden_dropout": 0.3, "attention_dropout": 0.3},  # served in padded rows
}
PROMPTS = tiny.drawn([3, 1, 9, 20, 1, 7, 4, 4, 12, 2, 5, 30, 6, 8, 10, 11, 2, 3])


def made(kind="llama", reference=None, tokenizer=tiny.SPECIAL, model=None, **keys) -> PPOTrainer:
    keys = {"batch_size": 8, "mini_batch_size": 4, "response_tokens": 12, "temperature": 0.8, **keys}
    policy = AutoModelForCausalLMWithValueHead(model or tiny.causal(kind, **DROPOUT[kind]))
    return PPOTrainer(PPOConfig(**keys), policy, reference, tokenizer, device="cpu")


def varied(prompts, responses):
    return [float(sum(r)) for r in responses]


def refused(trainer, reward_fn=varied) -> str:
    """The one finding."""
    with pytest.raises(Refusal) as caught:
        preflight(trainer, PROMPTS, reward_fn)
    text = str(caught.value)
    assert text.startswith("preflight: ") and text.count("; ") == text.count("; is ")
    return text


def same(found, wanted) -> bool:
    if isinstance(found, dict):
        return found.keys() == wanted.keys() and all(same(found[k], wanted[k]) for k in found)
    return torch.equal(found, wanted) if isinstance(found, torch.Tensor) else found == wanted


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("kind", [*DROPOUT])
def test_a_sound_trainer_passes_and_stays_as_it_was(kind, dtype):
    trainer = made(kind, dtype=dtype, use_score_scaling=True, gradient_checkpointing=kind == "llama")
    before, random = copy.deepcopy(trainer.state_dict()), torch.random.get_rng_state()
    preflight(trainer, PROMPTS, varied)
    assert same(trainer.state_dict(), before)
    assert torch.equal(torch.random.get_rng_state(), random)
    assert all(p.grad is None for p in trainer.model.parameters()) and not trainer.model.training


def test_halves_of_weights_pass():
    preflight(made(model=tiny.causal(**DROPOUT["llama"]).bfloat16()), PROMPTS, varied)


def test_an_adapter_passes():
    from peft import LoraConfig, get_peft_model

    adapted = get_peft_model(tiny.causal(), LoraConfig(r=2, lora_dropout=0.3, task_type="CAUSAL_LM"))
    preflight(made(model=adapted), PROMPTS, varied)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_dropout_in_the_update_is_found(kind, dtype):
    trainer = made(kind, dtype=dtype)
    last = [m for m in trainer.model.modules() if "Norm" in type(m).__name__][-1]
    last.register_forward_hook(
        lambda module, inputs, out: nn.functional.dropout(out, 0.3) if torch.is_grad_enabled() else out
    )
    random = torch.random.get_rng_state()
    assert re.search(r"ratio of the first minibatch is not 1: .* differ by [\d.]+ nats", refused(trainer))
    assert torch.equal(torch.random.get_rng_state(), random)


@pytest.mark.parametrize(("mini", "micro", "wanted"), [(4, 2, 2), (4, 64, 4), (32, 64, PROBE)])
def test_it_reads_as_an_update_reads(monkeypatch, mini, micro, wanted):
    """In as many rows, in its precision, with its checkpoints; rows alone are read without autocast."""
    keys = {"dtype": "bfloat16", "gradient_checkpointing": True}
    trainer, rows = made(batch_size=32, mini_batch_size=mini, **keys), {True: [], False: []}
    trainer.microbatch_rows, honest = micro, tasks.ppo.preflight.read_responses

    def noted(model, sequences, temperature):
        is_update = torch.is_grad_enabled()
        rows[is_update].append(len(sequences.tokens))
        assert torch.is_autocast_enabled("cpu") is is_update
        assert ("forward" in vars(model.pretrained_model.model.layers[0])) is is_update  # runs again
        return honest(model, sequences, temperature)

    monkeypatch.setattr(tasks.ppo.preflight, "read_responses", noted)
    preflight(trainer, PROMPTS, varied)
    assert rows[True] == [wanted] and sum(rows[False]) == PROBE and max(rows[False]) == min(micro, PROBE)


def test_a_model_left_in_training_mode_passes_and_stays_there():
    """The trainer holds evaluation mode, whatever the user did."""
    trainer = made("gpt2")
    trainer.model.train()
    preflight(trainer, PROMPTS, varied)
    assert all(module.training for module in trainer.model.modules())


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_another_reference_is_found_before_the_first_update_alone(kind, dtype):
    trainer = made(kind, tiny.causal(kind, seed=1), dtype=dtype)
    assert re.search(r"KL\(policy, reference\) is not 0 before .* [\d.]+ nats", refused(trainer))
    trainer.updates = 1
    preflight(trainer, PROMPTS, varied)


@pytest.mark.parametrize(
    ("dtype", "factor", "is_found"),
    [
        ("float32", 1.0005, False),
        ("float32", 1.002, True),
        ("bfloat16", 1.05, False),
        ("bfloat16", 1.2, True),
    ],
)
@pytest.mark.parametrize("place", ["reference", "update"])
def test_how_small_a_difference_is_rounding(place, dtype, factor, is_found):
    """The last norm scales the logits: half a thousandth of them is half a thousandth of a nat."""
    reference = tiny.causal(**DROPOUT["llama"])
    trainer = made(reference=reference, dtype=dtype)
    if place == "reference":
        reference.model.norm.weight.data.mul_(factor)
    else:
        trainer.model.pretrained_model.model.norm.register_forward_hook(
            lambda module, inputs, out: out * factor if torch.is_grad_enabled() else out
        )
    if is_found:
        words = "KL(policy, reference) is not 0" if place == "reference" else "first minibatch is not 1"
        assert words in refused(trainer)
    else:
        preflight(trainer, PROMPTS, varied)


@pytest.mark.parametrize(("rounding", "bits"), [(FULL, 24), (TF32, 11), (HALF, 8)])
def test_the_tolerances_follow_the_products(rounding, bits):
    """A logit of 16 errs by 16 units of its factors; a running sum of 2¹⁷ terms by 2^8.5 of float32's."""
    assert 16 * 2**-bits < rounding.nats < 0.2
    assert max(2**-bits, 2**8.5 * 2**-24) < rounding.cumulative < 0.05
    assert 0.85 < rounding.agreement < 1
    assert FULL.nats < TF32.nats < HALF.nats and FULL.cumulative < TF32.cumulative < HALF.cumulative
    assert FULL.agreement > TF32.agreement > HALF.agreement


@pytest.mark.parametrize("precision", ["none", "ieee", "tf32"])
@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_products_in_tf32_are_known(monkeypatch, device, precision):
    """The flag is of CUDA alone, and asking for it wakes no CUDA; a half stays a half."""
    monkeypatch.setattr(torch.backends.cuda, "matmul", SimpleNamespace(fp32_precision=precision))
    trainer = SimpleNamespace(device=torch.device(device), config=PPOConfig(), model=nn.Linear(2, 2))
    wanted = TF32 if (device, precision) == ("cuda", "tf32") else FULL
    assert _rounding(trainer) is _rounding(trainer, autocast=True) is wanted
    trainer.config = PPOConfig(dtype="bfloat16")
    assert _rounding(trainer) is wanted and _rounding(trainer, autocast=True) is HALF
    trainer.model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2).bfloat16())
    assert _rounding(trainer) is HALF and not torch.cuda.is_initialized()


def test_the_older_names_of_the_switch_are_the_same_switch():
    try:
        for allowed in (True, False):
            torch.backends.cuda.matmul.allow_tf32 = allowed
            assert (torch.backends.cuda.matmul.fp32_precision == "tf32") is allowed
    finally:
        torch.backends.cuda.matmul.allow_tf32 = False


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_positions_that_count_padding_are_found(monkeypatch, dtype):
    """What TRL 0.11 did to GPT-2."""
    trainer = made("gpt2", dtype=dtype)
    monkeypatch.setattr(tasks.lm.logprobs.responses, "has_forest", lambda model: False)
    preflight(trainer, PROMPTS, varied)

    def as_they_stand(tokens, is_real):
        return tokens, torch.arange(tokens.numel()).view_as(tokens).masked_fill(~is_real, 0)

    monkeypatch.setattr(tasks.lm.logprobs.responses, "flush_left", as_they_stand)
    assert "log-probabilities depend on the batch or its padding" in refused(trainer)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("warp", [{"top_k": 4}, {"top_p": 0.6}, {"temperature": 1.2}, {"uniforms": None}])
@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_a_warped_sampler_is_found(monkeypatch, kind, warp, dtype):
    trainer, honest = made(kind, dtype=dtype), tasks.ppo.trainer.generate
    monkeypatch.setattr(tasks.ppo.trainer, "generate", lambda *a, **keys: honest(*a, **keys | warp))
    assert re.search(r"no draws of .* choose [\d.]+% of \d+ tokens again \(9.% is wanted\)", refused(trainer))


@pytest.mark.parametrize("warp", [{"temperature": 0.82}, {"min_tokens": 12}])
def test_a_slightly_warped_sampler_is_found(monkeypatch, warp):
    """Of another temperature; of an eos that is trained and never said."""
    trainer, honest = made(), tasks.ppo.trainer.generate
    monkeypatch.setattr(tasks.ppo.trainer, "generate", lambda *a, **keys: honest(*a, **keys | warp))
    assert "no draws of the distribution" in refused(trainer)


@pytest.mark.parametrize(("dtype", "is_found"), [("float32", True), ("bfloat16", False)])
def test_a_few_tokens_that_are_no_draws_are_found(monkeypatch, dtype, is_found):
    """The last token of five responses; that is a twentieth of all: rounding of halves, no other."""
    trainer, sample = made(dtype=dtype), PPOTrainer.sample

    def sampled(self, prompts, seeds, *rest):
        found = sample(self, prompts, seeds, *rest)
        for row in range(5):
            last = int(found.is_response[row].sum()) - 1
            found.tokens[row, last] = 2 + (found.tokens[row, last] + 13) % 30
        return found

    monkeypatch.setattr(PPOTrainer, "sample", sampled)
    if is_found:
        assert re.search(r"choose 9[4-8]\.\d% of \d+ tokens again \(99% is wanted\)", refused(trainer))
    else:
        preflight(trainer, PROMPTS, varied)


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_an_eos_that_cannot_be_said_is_found(kind):
    model = tiny.causal(kind, **DROPOUT[kind])
    head = nn.Linear(16, 32)
    head.weight, head.bias = model.lm_head.weight, nn.Parameter(torch.zeros(32))
    model.lm_head = head
    preflight(made(kind, model=model), PROMPTS, varied)
    head.bias.data[tiny.EOS] = -12.0  # times 1 / 0.8: seldom, but said
    preflight(made(kind, model=model), PROMPTS, varied)
    head.bias.data[tiny.EOS] = -60.0
    assert re.search(r"eos \(token 1\) has a probability of at most \S+e-", refused(made(kind, model=model)))
    head.bias.data[tiny.EOS] = -1e9
    found = refused(made(kind, model=model))
    assert "no response can end: eos (token 1) has a probability of at most 0" in found
    for outside in (32, -1):
        special = SimpleNamespace(pad_token_id=0, eos_token_id=outside)
        preflight(made(kind, tokenizer=special), PROMPTS, varied)  # the model's own eos ends a response too
        without = tiny.causal(kind, eos_token_id=outside, **DROPOUT[kind])
        found = refused(made(kind, tokenizer=special, model=without))
        assert f"no response can end: eos is token {outside}, the vocabulary has 32" in found


@pytest.mark.parametrize(
    ("reward_fn", "words"),
    [
        (lambda p, r: [0.5] * len(r), f"the reward is 0.5 for each of {PROBE * ROUNDS} responses"),
        (lambda p, r: torch.zeros(len(r)), "the reward is 0 for each"),
        (lambda p, r: [[1 / len(x)] * len(x) for x in r], "the reward is 1 for each"),
        (lambda p, r: [*varied(p, r)[1:], float("nan")], "reward_fn: scores\[15\] is not finite: nan"),
        (lambda p, r: varied(p, r)[1:], "reward_fn: scores holds 15 rows for 16 responses"),
        (lambda p, r: ["good"] * len(r), "reward_fn: scores\[0\] is 'good', no number"),
        (lambda p, r: [[1.0] * (len(x) + 1) for x in r], r"reward|scores\[0\]"),
    ],
)  # fmt: skip
def test_a_reward_that_teaches_nothing_is_found(reward_fn, words):
    with pytest.raises(Refusal, match=words):
        preflight(made(), PROMPTS, reward_fn)


@pytest.mark.parametrize(("first", "more"), [(1.0, 1e-4), (-1.0, 1e-4), (0.0, 1e-9)])
def test_a_reward_that_differs_a_little_teaches(first, more):
    calls = []
    preflight(made(), PROMPTS, lambda p, r: calls.append(p) or [first + more * i for i in range(len(r))])
    assert len(calls) == 1


def test_a_rare_reward_is_waited_for():
    calls = []

    def rare(prompts, responses):
        calls.append(responses)
        return [float(len(calls) == 3 and i == 5) for i in range(len(responses))]

    preflight(made(), PROMPTS, rare)
    assert len(calls) == 3 and calls[0] != calls[1] != calls[2] != calls[0]


def test_what_a_reward_function_raises_is_its_own():
    def broken(prompts, responses):
        raise KeyError("no such thing")

    with pytest.raises(KeyError, match="no such thing"):
        preflight(made(), PROMPTS, broken)


def test_all_findings_are_told_at_once():
    trainer = made(reference=tiny.causal(seed=1))
    with pytest.raises(Refusal, match=r"is not 0 .*; .*the reward is 0 .*\(ppo.preflight: false"):
        preflight(trainer, PROMPTS, lambda p, r: [0.0] * len(r))


def test_a_model_that_says_nan_is_found():
    trainer = made()
    next(trainer.model.parameters()).data.fill_(torch.nan)
    with pytest.raises(Refusal, match=r"is not 1: .*nan nats.*is not 0.*depend on the batch.*no draws"):
        preflight(trainer, PROMPTS, varied)


@pytest.mark.parametrize("count", [1, 5, 18])
def test_the_probe_has_the_shortest_and_the_longest_prompt(count):
    asked = []
    preflight(made(), PROMPTS[:count], lambda p, r: asked.append(p) or varied(p, r))
    sizes = sorted(map(len, PROMPTS[:count]))
    assert len(asked[0]) == PROBE and {len(asked[0][0]), len(asked[0][-1])} == {sizes[0], sizes[-1]}
    assert {tuple(p) for p in asked[0]} <= {tuple(p) for p in PROMPTS[:count]}


def test_training_is_refused_before_anything_moves():
    trainer = made(updates=1)
    before = copy.deepcopy(trainer.state_dict())
    constant = lambda prompts, responses: [1.0] * len(responses)  # noqa: E731
    with pytest.raises(Refusal, match="the reward is 1"):
        trainer.train(PROMPTS, constant)
    assert same(trainer.state_dict(), before)
    made(updates=1, preflight=False).train(PROMPTS, constant)

"""What users of TRL 0.11 override, call and sample with, beside a step and plain transformers."""

from __future__ import annotations

import pytest
import tiny
import torch
from made_trainers import batch, trainer, weights

from tasks.lm import AutoModelForCausalLMWithValueHead
from tasks.ppo import PPOTrainer
from tasks.run.curve import Curve


class Mine(PPOTrainer):
    bonus, price = 0.0, 1.0

    def token_loss(self, loss, logprobs, entropy, values, seen, advantages, returns):
        return loss - self.bonus * entropy

    def compute_rewards(self, scores, logprobs, ref_logprobs, masks):
        rewards, of_kl, kl = super().compute_rewards(scores, logprobs, ref_logprobs, masks)
        return rewards * self.price, of_kl - 1, kl


def made_of(kind, **keys):
    plain = trainer(ppo_epochs=1, mini_batch_size=8, **keys)
    policy = AutoModelForCausalLMWithValueHead(tiny.causal())
    return kind(plain.config, policy, tiny.causal(), tiny.SPECIAL, seed=11, device="cpu")


def moved(made):
    start = weights(made)
    stats = made.step(*batch())
    return {n: v - start[n] for n, v in made.model.state_dict().items()}, stats


def test_what_is_overridden_changes_the_step():
    plain, stats = moved(made_of(PPOTrainer))
    same, other = moved(made_of(Mine))
    assert all(torch.equal(plain[n], same[n]) for n in plain), "a bonus of nothing"
    assert other["ppo/mean_non_score_reward"] == pytest.approx(
        stats["ppo/mean_non_score_reward"] - 1, abs=1e-5
    )
    for name, value in (("bonus", 5.0), ("price", 0.0)):
        kind = type("Changed", (Mine,), {name: value})
        assert any(not torch.equal(plain[n], v) for n, v in moved(made_of(kind))[0].items())


def test_the_bonus_has_the_gradient_of_the_entropy():
    """Every token at one log-probability: the advantage alone is the policy's part."""
    kind = type(
        "Bonus", (PPOTrainer,), {"token_loss": lambda self, loss, lp, entropy, *rest: 0 * loss - entropy}
    )
    made, caught = made_of(kind), []
    made.optimizer.register_step_pre_hook(lambda *_: caught.append(tiny.gradients(made.model, keep=True)))
    prompts, responses, scores = batch()
    made.step(prompts, responses, scores)
    model, total, count = tiny.causal(), 0.0, 0
    for prompt, response in zip(prompts, responses, strict=True):
        logits = model(torch.tensor([prompt + response])).logits[0, len(prompt) - 1 : -1]
        total = total - torch.distributions.Categorical(logits=logits).entropy().sum()
        count += len(response)
    (total / count).backward()
    wanted = {f"pretrained_model.{n}": p.grad for n, p in model.named_parameters()}
    found = {n: g for n, g in caught[0].items() if n in wanted}
    assert tiny.far_gradients(found, wanted) < 1e-4


@pytest.mark.parametrize("side", ["left", "right"])
def test_calls_of_trls_give_what_a_step_sees(side):
    made = trainer("gpt2")
    prompts, responses, scores = batch()
    inputs = made.prepare_model_inputs(prompts, responses)
    if side == "left":
        inputs = {
            name: torch.stack(
                [row.roll(int((inputs["attention_mask"][i] == 0).sum())) for i, row in enumerate(each)]
            )
            for name, each in inputs.items()
        }
    logprobs, logits, values, masks = made.batched_forward_pass(
        made.model, prompts, responses, inputs, return_logits=True
    )
    seen = made.observe(prompts, responses)
    assert tiny.far(logprobs[masks.bool()], seen.logprobs[seen.is_action]) < 1e-4
    assert masks.sum() == seen.is_action.sum() and logits.shape[:2] == logprobs.shape == values.shape
    rewards, of_kl, kl = made.compute_rewards(scores, logprobs, logprobs - 1, masks)
    assert tiny.far(kl[masks.bool()], torch.ones(int(masks.sum()))) < 1e-5
    assert tiny.far((rewards - of_kl * masks).sum(1), scores) < 1e-4
    values, advantages, returns = made.compute_advantages(values, rewards, masks)
    policy, value, stats = made.loss(
        logprobs, values, logits, values + 0.1, 0.9 * logprobs, masks, advantages, returns
    )
    kept = masks.bool()
    small = [x[kept][None] for x in (logprobs, values, logits, values + 0.1, 0.9 * logprobs)]
    again = made.loss(*small, kept[kept][None], advantages[kept][None], returns[kept][None])
    assert policy.item() == pytest.approx(again[0].item(), rel=1e-4)
    assert value.item() == pytest.approx(again[1].item(), rel=1e-4)
    assert stats["policy/policykl"].item() == pytest.approx(0.1 * logprobs[kept].mean().item(), rel=1e-3)


@pytest.mark.parametrize(
    ("kind", "wanted"), [("kl", [1.0, -2.0]), ("abs", [1.0, 2.0]), ("mse", [0.5, 2.0]), ("full", None)]
)
def test_kl_of_tokens_by_hand(kind, wanted):
    made = trainer(kl_penalty=kind)
    if wanted:
        found = made._kl_penalty(torch.tensor([0.0, -3.0]), torch.tensor([-1.0, -1.0]))
        assert found.tolist() == wanted
    else:
        p, q = torch.tensor([[0.5, 0.5]]), torch.tensor([[0.25, 0.75]])
        assert made._kl_penalty(p.log(), q.log()).item() == pytest.approx(0.1438, abs=1e-4)


# ---- generate


def queries(*lengths):
    return [torch.tensor(ids) for ids in tiny.drawn(lengths, 3)]


def test_penalties_are_transformers_of_the_row_alone():
    made, asked = trainer(), queries(3, 6, 2)
    keys = {"do_sample": False, "max_new_tokens": 8, "repetition_penalty": 1.5, "no_repeat_ngram_size": 2}
    keys |= {"bad_words_ids": [[4], [7, 8]]}
    found = made.generate(asked, eos_token_id=-1, **keys)
    for query, whole in zip(asked, found, strict=True):
        assert torch.equal(whole, made.model.generate(query[None], eos_token_id=[], **keys)[0])


def test_each_of_several_eos_tokens_ends_a_response():
    asked, ends = queries(*[3] * 60), {1, 5, 9}
    found = trainer().generate(asked, return_prompt=False, max_new_tokens=6, eos_token_id=[*ends])
    assert {r[-1].item() for r in found if len(r) < 6} == ends
    assert all(not ends & set(r[:-1].tolist()) for r in found)


def test_several_responses_stand_side_by_side():
    made, asked, keys = trainer(), queries(3, 5), {"max_new_tokens": 6, "eos_token_id": -1}
    found = made.generate(asked, num_return_sequences=3, **keys)
    assert len(found) == 6 and all(
        torch.equal(r[: len(q)], q) for q, r in zip([asked[0]] * 3 + [asked[1]] * 3, found, strict=True)
    )
    assert not torch.equal(found[0], found[1])
    assert made.generate(asked[0], num_return_sequences=3, **keys).shape == (3, 9)
    lengths = iter([1, 2, 3, 4])
    some = made.generate(
        asked,
        num_return_sequences=2,
        return_prompt=False,
        length_sampler=lambda: next(lengths),
        eos_token_id=-1,
    )
    assert [len(r) for r in some] == [1, 2, 3, 4]


def test_a_stop_string_ends_a_response_with_the_token_that_completes_it():
    known = tiny.tokenizer()
    made = trainer(given={"tokenizer": known}, model_keys={"vocab_size": len(known)})
    asked, keys = queries(*[3] * 20), {"max_new_tokens": 12, "return_prompt": False, "eos_token_id": -1}
    free = made.generate(asked, **keys)
    text = known.decode(free[0][2:5])
    made.draws = 0
    cut = made.generate(asked, stop_strings=[text], **keys)
    assert len(cut[0]) <= 5 and text in known.decode(cut[0])
    for long, short in zip(free, cut, strict=True):
        assert torch.equal(long[: len(short)], short), "what is sampled before is the same"
        assert len(short) == 12 or text in known.decode(short)
        assert text not in known.decode(short[:-1])


def test_a_processor_of_the_callers():
    def only_even(ids, logits):
        assert ids.ndim == 2 and len(ids) == 1
        return logits.masked_fill(torch.arange(logits.shape[-1]) % 2 == 1, -torch.inf)

    found = trainer().generate(
        queries(3, 4), return_prompt=False, max_new_tokens=8, logits_processor=[only_even]
    )
    assert all(not (r % 2).any() for r in found)


# ---- train


def test_training_shows_progress_and_what_it_returns_prints(capsys):
    made = trainer(updates=2, preflight=False, monitor={"responses": 4})
    prompts = tiny.drawn([3, 4, 5], 2)
    curve = made.train(prompts, lambda prompts, responses: [float(len(r)) for r in responses])
    assert "ppo 2/2 100 %" in capsys.readouterr().err
    lines = repr(curve).splitlines()
    assert lines[0] == "Curve of 2 steps, 1 to 2" and any(" -> " in line for line in lines[1:])
    made.train(prompts, lambda p, r: [0.0] * len(r), show_progress=False)
    assert capsys.readouterr().err == "" and repr(Curve(["a"])) == "Curve without a row"

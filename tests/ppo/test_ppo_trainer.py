"""PPOTrainer: the checks that peers' trainers fail, and that it learns."""

from __future__ import annotations

import copy

import pytest
import tiny
import torch
from made_trainers import DROPOUT, batch, far_weights, first_gradients, trainer, weights

from tasks.lm.attention.padding import lay_out
from tasks.lm.logprobs.responses import read_responses
from tasks.lm.sampling.generation import row_seeds


@pytest.mark.parametrize("kind", ["llama", "gpt2", "opt"])
@torch.no_grad()
def test_what_is_read_belongs_to_the_token(kind):
    """Log-probability, entropy and value of each response token, one unpadded row at a time."""
    made = trainer(kind, model_keys=DROPOUT if kind == "gpt2" else {})
    torch.nn.init.normal_(made.model.v_head.summary.weight)
    prompts, responses, _ = batch()
    sequences = lay_out(prompts, responses, tiny.PAD, "cpu")
    logprobs, entropy, values = read_responses(made.model, sequences, 0.8)
    for b, (prompt, response) in enumerate(zip(prompts, responses, strict=True)):
        logits, _, value = made.model(torch.tensor([[*prompt, *response]]))
        before = slice(len(prompt) - 1, len(prompt) + len(response) - 1)
        logp = (logits[0, before] / 0.8).log_softmax(-1)
        n = len(response)
        assert tiny.far(logprobs[b, :n], logp[range(n), response]) <= 1e-5
        assert tiny.far(entropy[b, :n], -(logp.exp() * logp).sum(-1)) <= 1e-5
        assert tiny.far(values[b, :n], value[0, before]) <= 1e-5


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_kl_is_zero_and_the_ratio_one_at_the_start_even_with_dropout(kind):
    """Of trainers that leave the model in training mode neither holds."""
    made = trainer(
        kind,
        model_keys=DROPOUT if kind == "gpt2" else {"attention_dropout": 0.3},
        ppo_epochs=1,
        mini_batch_size=8,
    )
    prompts, responses, scores = batch()
    seen = made.observe(prompts, responses)
    assert seen.kl_nats().abs().max() < 1e-5
    again = read_responses(made.model, seen.sequences, 1.0)[0]
    assert torch.equal((again - seen.logprobs) * seen.is_action, torch.zeros_like(again))
    stats = made.step(prompts, responses, scores)
    assert stats["objective/kl"] == pytest.approx(0, abs=1e-5)
    assert stats["ppo/policy/approxkl"] == pytest.approx(0, abs=1e-7) and stats["ppo/policy/clipfrac"] == 0
    assert not made.model.training and not made.ref_model.training


def test_sampled_tokens_have_the_log_probabilities_they_were_sampled_with():
    """Rollout and re-forward are one policy, at any temperature: the mean of −log p is the entropy."""
    made = trainer("gpt2", temperature=1.7, response_tokens=3)
    prompts = [[5, 9, 3]] * 3000
    responses = made.sample(prompts, row_seeds(3, len(prompts))).lists()
    seen = made.observe(prompts, responses)
    first = slice(0, 1)
    surprise = -seen.logprobs[:, first].mean()
    assert abs(surprise - seen.entropy[0, 0]) < 4 * seen.logprobs[:, 0].std() / 3000**0.5


def test_gradients_of_one_step_by_the_definition():
    """One epoch, one minibatch: Adam sees exactly the gradient of the formulas written out here."""
    made = trainer(ppo_epochs=1, mini_batch_size=8, lam=1.0, gamma=1.0, vf_coef=0.5)
    torch.nn.init.normal_(made.model.v_head.summary.weight, generator=torch.Generator().manual_seed(0))
    other = copy.deepcopy(made.model)
    prompts, responses, scores = batch()
    caught = {}
    made.optimizer.register_step_pre_hook(lambda *_: caught.update(tiny.gradients(made.model, keep=True)))
    made.step(prompts, responses, scores)
    advantages, returns, logps, values = [], [], [], []
    for prompt, response, score in zip(prompts, responses, scores, strict=True):
        logits, _, value = other(torch.tensor([[*prompt, *response]]))
        before = slice(len(prompt) - 1, len(prompt) + len(response) - 1)
        logps.append(logits[0, before].log_softmax(-1)[range(len(response)), response])
        values.append(value[0, before])
        returns.append(score.expand(len(response)))  # KL is zero, γ = 1: every token's return is the score
        advantages.append((score - value[0, before]).detach())
    flat = torch.cat(advantages)
    white = (flat - flat.mean()) / (flat.var() + 1e-8).sqrt()
    loss = (
        -(white * torch.cat(logps)).mean()
        + 0.5 * 0.5 * ((torch.cat(values) - torch.cat(returns)) ** 2).mean()
    )
    loss.backward()
    assert tiny.far_gradients(caught, tiny.gradients(other)) <= 1e-4


def test_each_optimizer_step_takes_the_mean_over_its_own_tokens():
    """Steps of a rate too small to move anything, weighted by their tokens, add up to the whole batch."""
    steps, counts = [], []
    made = trainer(ppo_epochs=1, mini_batch_size=2, learning_rate=1e-30)
    backward = made._backward
    made._backward = lambda *a: counts.append(a[3]) or backward(*a)
    made.optimizer.register_step_pre_hook(lambda *_: steps.append(tiny.gradients(made.model, keep=True)))
    prompts, responses, scores = batch()
    made.step(prompts, responses, scores)
    total = sum(map(len, responses))
    assert len(set(counts)) > 1 and sum(counts) == total
    found = {n: sum(g[n] * c for g, c in zip(steps, counts, strict=True)) / total for n in steps[0]}
    assert tiny.far_gradients(found, first_gradients(ppo_epochs=1, mini_batch_size=8)) <= 1e-5


@pytest.mark.parametrize(("mini", "times"), [(2, 2), (4, 1), (1, 4)])
def test_accumulated_minibatches_are_one_minibatch(mini, times):
    """2 × 1 = 1 × 2 although minibatches hold uneven numbers of tokens."""
    wanted, found = (
        trainer(mini_batch_size=4),
        trainer(mini_batch_size=mini, gradient_accumulation_steps=times),
    )
    start = weights(wanted)
    for made in (wanted, found):
        for number in range(2):
            made.step(*batch(seed=number))
    assert far_weights(weights(found), weights(wanted), start) <= 1e-3
    caught = [
        first_gradients(mini_batch_size=4),
        first_gradients(mini_batch_size=mini, gradient_accumulation_steps=times),
    ]
    assert tiny.far_gradients(caught[1], caught[0]) <= 1e-5


@pytest.mark.parametrize("rows", [1, 3])
def test_microbatch_rows_cap_memory_and_change_nothing(rows):
    assert tiny.far_gradients(first_gradients(microbatch_rows=rows), first_gradients()) <= 1e-5
    whole, parts = trainer(), trainer(microbatch_rows=rows)
    stats = [made.step(*batch()) for made in (whole, parts)]
    assert stats[0].keys() == stats[1].keys()
    numbers = {n: v for n, v in stats[0].items() if isinstance(v, float) and not n.startswith("time/")}
    for name, value in numbers.items():
        assert stats[1][name] == pytest.approx(value, rel=1e-3, abs=1e-5), name


def test_no_forward_is_larger_than_the_microbatch():
    made, seen = trainer(microbatch_rows=3), []
    for model in (made.model.pretrained_model, made.ref_model):
        model.register_forward_pre_hook(
            lambda _m, _a, keys: seen.append(len(keys["forest"].starts)), with_kwargs=True
        )
    made.step(*batch())
    assert max(seen) == 3


def test_gradients_are_clipped_at_every_step():
    """TRL 0.11 clips the very first optimizer step of a run and none after it."""
    made, norms = trainer(max_grad_norm=0.01), []

    def norm(*_):
        norms.append(torch.cat([p.grad.flatten() for p in made.model.parameters()]).norm().item())

    made.optimizer.register_step_pre_hook(norm)
    stats = [made.step(*batch(seed=n)) for n in range(3)]
    assert len(norms) == 3 * 2 * 2 and norms == pytest.approx([0.01] * 12, rel=1e-3)
    assert all(s["ppo/grad_norm"] > 0.05 for s in stats), "what is reported is the norm before"


def test_every_weight_is_trained_and_the_reference_is_not():
    made = trainer()
    start, reference = weights(made), copy.deepcopy(made.ref_model.state_dict())
    made.step(*batch())
    assert all(not torch.equal(v, start[n]) for n, v in weights(made).items())
    assert all(torch.equal(v, reference[n]) for n, v in made.ref_model.state_dict().items())
    assert all(p.grad is None for p in made.ref_model.parameters())
    assert len([p for g in made.optimizer.param_groups for p in g["params"]]) == len(
        list(made.model.parameters())
    )


def changed(scores, row, value):
    return [torch.tensor(value) if i == row else s for i, s in enumerate(scores)]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda q, r, s: (q[:7], r, s), r"queries holds 7 rows; a step takes 8"),
        (lambda q, r, s: (q, r[:7], s), "responses holds 7 rows"),
        (lambda q, r, s: (q, r, [*s, *s]), "scores holds 16 rows"),
        (lambda q, r, s: (q, r, s, [[1]] * 7), "response_masks holds 7 rows"),
        (lambda q, r, s: (q, r, changed(s, 3, torch.nan)), r"scores\[3\] is not finite"),
        (lambda q, r, s: (q, r, changed(s, 0, -torch.inf)), r"scores\[0\] is not finite"),
        (lambda q, r, s: (q, r, [*s[:2], torch.zeros(2, 2), *s[3:]]), r"scores\[2\] has the shape \(2, 2\)"),
        (lambda q, r, s: (q, r, [*s[:2], torch.zeros(len(r[2]) + 2), *s[3:]]), r"scores\[2\] has the shape"),
        (lambda q, r, s: ([*q[:2], [], *q[3:]], r, s), r"queries\[2\] is empty"),
        (lambda q, r, s: ([*q[:2], [4, 32], *q[3:]], r, s), r"queries\[2\] holds token ids outside .* of 32"),
        (lambda q, r, s: (q, [*r[:6], [-100, 3], *r[7:]], s), r"responses\[6\] holds token ids outside"),
        (lambda q, r, s: (torch.zeros(8, 3), r, s), "queries must be a list of token rows, not Tensor"),
        (lambda q, r, s: ([torch.zeros(3)] * 8, r, s), r"queries\[0\] must hold token ids.* torch.float32"),
        (
            lambda q, r, s: ([*q[:7], [5] * 63], [*r[:7], [6, 7]], s),
            r"queries\[7\] .* have 63 \+ 2 .* for 64",
        ),
        (
            lambda q, r, s: (q, r, s, [[1] * len(x) for x in r[:7]] + [[1] * 9]),
            r"response_masks\[7\] must hold",
        ),
        (lambda q, r, s: (q, r, s, [[2] * len(x) for x in r]), r"response_masks\[0\] must hold 0 or 1"),
    ],
)
def test_what_is_wrong_is_refused_before_anything_moves(change, message):
    made = trainer()
    start = weights(made)
    prompts, responses, scores = batch()
    with pytest.raises(ValueError, match=message):
        made.step(*change(prompts, responses, list(scores)))
    assert made.updates == 0 and all(torch.equal(v, start[n]) for n, v in weights(made).items())


def test_one_response_token_leaves_finite_weights():
    """TRL 0.11 divides by zero here: its variance takes one off the number of tokens."""
    made = trainer(batch_size=1, mini_batch_size=1)
    for score in (3.0, -2.0):
        stats = made.step([[5, 6]], [[7]], torch.tensor([score]))
    assert all(torch.isfinite(v).all() for v in weights(made).values())
    assert all(torch.isfinite(torch.as_tensor(v)).all() for v in stats.values())


def test_statistics_by_hand():
    made = trainer(ppo_epochs=1)
    with torch.no_grad():
        made.ref_model.lm_head.weight.mul_(1.5)
    prompts, responses, scores = batch()
    seen = made.observe(prompts, responses)
    made.kl_ctl.target = seen.kl_nats().mean().item() / 1.1  # a miss of 10 %, which is not clipped
    stats = made.step(prompts, responses, scores)
    lengths = torch.tensor([len(r) for r in responses])
    kl = torch.stack(
        [(a - b)[:n].sum() for a, b, n in zip(seen.logprobs, seen.ref_logprobs, lengths, strict=True)]
    )
    assert kl.abs().max() > 0.1
    assert stats["objective/kl"] == pytest.approx(kl.mean().item(), rel=1e-4)
    assert stats["objective/kl_coef"] == 0.1
    assert stats["ppo/mean_scores"] == pytest.approx(scores.mean().item(), rel=1e-5)
    assert stats["ppo/std_scores"] == pytest.approx(scores.std().item(), rel=1e-5)
    assert stats["tokens/responses_len_mean"] == pytest.approx(lengths.float().mean().item())
    flat = torch.cat([row[:n] for row, n in zip(seen.entropy, lengths, strict=True)])
    assert stats["rollout/token_entropy_nats"] == pytest.approx(flat.mean().item(), rel=1e-4)
    surprise = -torch.stack([row[:n].sum() for row, n in zip(seen.logprobs, lengths, strict=True)])
    assert stats["objective/entropy"] == pytest.approx(surprise.mean().item(), rel=1e-4)
    assert stats["ppo/mean_non_score_reward"] == pytest.approx(
        (-0.1 * kl.sum() / lengths.sum()).item(), rel=1e-4
    )
    assert made.kl_ctl.value == pytest.approx(0.1 * (1 + 0.1 * 8 / 100), rel=1e-5)


def test_bfloat16_is_near_float32_and_keeps_float32_weights():
    half, whole = trainer(dtype="bfloat16"), trainer()
    assert {p.dtype for p in half.model.parameters()} == {torch.float32}
    stats, wanted = half.step(*batch()), whole.step(*batch())
    for name in ("ppo/loss/value", "rollout/token_entropy_nats"):
        assert stats[name] == pytest.approx(wanted[name], rel=0.1) and stats[name] != wanted[name]


def test_a_fixed_price_stays():
    made = trainer(adap_kl_ctrl=False)
    made.step(*batch())
    assert made.kl_ctl.value == 0.1


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_a_saved_state_goes_on_bit_for_bit(kind):
    whole = trainer(kind, init_kl_coef=0.3)
    for number in range(4):
        whole.step(*batch(seed=number))
        if number == 1:
            state = copy.deepcopy(whole.state_dict())
    resumed = trainer(kind)
    with torch.no_grad():
        resumed.model.v_head.summary.weight.add_(1)
    resumed.load_state_dict(state)
    assert resumed.updates == 2
    for number in (2, 3):
        resumed.step(*batch(seed=number))
    assert resumed.kl_ctl.value == whole.kl_ctl.value
    assert all(torch.equal(v, weights(whole)[n]) for n, v in weights(resumed).items())


def test_the_order_of_minibatches_changes_with_seed_update_and_pass():
    def orders(seed, update):
        made = trainer(ppo_epochs=2)
        made.seed, made.updates = seed, update
        return [tuple(order.tolist()) for order in made._orders()]

    found = [order for seed in (1, 9) for update in (0, 1) for order in orders(seed, update)]
    assert len(set(found)) == 8 and orders(9, 1) == found[-2:]
    assert all(sorted(order) == list(range(8)) for order in found), "every row once"


def test_a_rewarded_token_becomes_likely():
    """A bandit: one prompt, one token, 32 arms; PPO finds the arm that pays."""
    made = trainer(
        batch_size=64,
        mini_batch_size=64,
        response_tokens=1,
        ppo_epochs=2,
        max_grad_norm=1.0,
        init_kl_coef=0.0,
    )
    prompts, arm = [[5, 6]] * 64, 17

    def chance():
        return made.observe(prompts[:1], [[arm]]).logprobs[0, 0].exp().item()

    before = chance()
    for number in range(25):
        responses = made.sample(prompts, row_seeds(number, 64)).lists()
        made.step(prompts, responses, torch.tensor([float(r[0] == arm) for r in responses]))
    assert before < 0.2 and chance() > 0.8


def test_kl_has_a_price():
    """The same bandit with dear KL stays near the reference."""
    found = {}
    for price in (0.0, 20.0):
        made = trainer(
            batch_size=64,
            mini_batch_size=64,
            response_tokens=1,
            max_grad_norm=1.0,
            init_kl_coef=price,
            adap_kl_ctrl=False,
        )
        for number in range(10):
            responses = made.sample([[5, 6]] * 64, row_seeds(number, 64)).lists()
            made.step([[5, 6]] * 64, responses, torch.tensor([float(r[0] == 17) for r in responses]))
        responses = made.sample([[5, 6]] * 64, row_seeds(99, 64)).lists()
        found[price] = made.observe([[5, 6]] * 64, responses).kl_nats().mean().item()
    assert found[20.0] < 0.3 * found[0.0]

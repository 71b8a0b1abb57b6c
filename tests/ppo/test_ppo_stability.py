"""What keeps a training from going wrong: skipped steps, returns, warm-up, KL in the loss, early stops."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import tiny
import torch
from made_trainers import batch, far_weights, first_gradients, is_still, trainer, weights
from safetensors.torch import load_file, save_file
from trainings import run_in_two

from tasks.ppo import PPOTrainer
from tasks.ppo.guard import SpikeGuard


def moments(made):
    """A copy of the optimizer's moments."""
    return [v.clone() for state in made.optimizer.state.values() for v in state.values()]


def test_a_skipped_step_moves_neither_weights_nor_moments():
    """TRL 0.11 multiplies the loss by zero, and Adam's momentum goes on."""
    made = trainer(max_skipped_steps=100)
    made.step(*batch())
    start, adam = weights(made), moments(made)
    made.guard.allows = lambda *_: SpikeGuard.allows(made.guard, math.nan, 1.0, 1.0)
    stats = made.step(*batch(seed=1))
    assert is_still(made, start) and all(torch.equal(a, b) for a, b in zip(moments(made), adam, strict=True))
    assert stats["ppo/steps_skipped"] == 4 and made.updates == 2 and adam


def test_exploding_ratios_are_skipped_without_a_nan(caplog):
    """A step so large that the next ratios overflow; TRL 0.11: inf · 0 = NaN."""
    made = trainer(learning_rate=10.0, ppo_epochs=3, max_skipped_steps=100, ratio_threshold=1.5)
    stats = made.step(*batch())
    assert stats["ppo/steps_skipped"] > 0 and "exceeds ratio_threshold" in caplog.text
    assert all(torch.isfinite(v).all() for v in weights(made).values())
    assert math.isfinite(stats["ppo/loss/total"])


def test_nan_in_the_weights_stops_every_step(caplog):
    made = trainer(max_skipped_steps=100)
    with torch.no_grad():
        made.model.pretrained_model.model.norm.weight[0] = torch.nan
    start = weights(made)
    made.step(*batch())
    assert all(torch.equal(v.nan_to_num(7), start[n].nan_to_num(7)) for n, v in weights(made).items())
    assert "loss nan" in caplog.text


def test_after_too_many_skips_the_rate_is_halved_and_earlier_weights_return(caplog):
    made = trainer(max_skipped_steps=2, ppo_epochs=4)
    made.step(*batch())
    good = made.state_dict()
    kept = {"model": weights(made)}
    made.step(*batch(seed=1))
    made.restore = lambda: made.load_state_dict({**good, **kept})
    made.guard.allows = lambda *_: SpikeGuard.allows(made.guard, math.nan, 1.0, 1.0)
    made.step(*batch(seed=2))
    assert is_still(made, kept["model"]) and made.updates == 1
    assert made.optimizer.param_groups[0]["lr"] == 0.005 and made.returns == 1
    assert "2 steps in a row were skipped; going on from update 1 with the learning rate 0.005" in caplog.text
    made.step(*batch(seed=2))
    assert made.optimizer.param_groups[0]["lr"] == 0.0025, "the state that returned had the whole rate"
    with pytest.raises(RuntimeError, match=r"lost 9 times; lower ppo\.learning_rate"):
        for _ in range(8):
            made.step(*batch(seed=2))


def test_without_earlier_weights_the_present_ones_stay():
    made = trainer(max_skipped_steps=1)
    made.guard.allows = lambda *_: SpikeGuard.allows(made.guard, math.nan, 1.0, 1.0)
    start = weights(made)
    made.step(*batch())
    assert (
        is_still(made, start) and made.optimizer.param_groups[0]["lr"] == 0.005 and made.guard.in_a_row == 0
    )


def test_after_a_return_other_minibatches_come():
    made, other = trainer(), trainer()
    other.returns = 1
    assert [o.tolist() for o in made._orders()] != [o.tolist() for o in other._orders()]


def test_in_the_warm_up_the_critic_learns_alone():
    made = trainer(critic_warmup_updates=1)
    start = weights(made)
    made.step(*batch())
    moved = {n for n, v in weights(made).items() if not torch.equal(v, start[n])}
    assert moved == {"v_head.summary.weight", "v_head.summary.bias"}
    assert len(made.optimizer.state) == 2, "Adam knows nothing of the others yet"
    made.step(*batch(seed=1))
    assert not any(torch.equal(v, start[n]) for n, v in weights(made).items())


@pytest.mark.parametrize("kind", ["mse", "k3"])
def test_kl_in_the_loss_by_the_definition(kind):
    """The price of KL comes with a gradient of its own, and is gone from the rewards."""
    keys = {"kl_penalty": kind, "ppo_epochs": 1, "mini_batch_size": 8, "init_kl_coef": 0.7}
    prompts, responses, _ = step = (*batch()[:2], torch.zeros(8))  # no score: nothing else pulls

    def gradients(**more):
        made = trainer(**keys, **more)
        with torch.no_grad():
            made.ref_model.lm_head.weight.mul_(1.5)
        caught = []
        made.optimizer.register_step_pre_hook(lambda *_: caught.append(tiny.gradients(made.model, keep=True)))
        return made, made.step(*step), caught[0]

    _, stats, found = gradients(kl_in="loss")
    other, _, _ = gradients(kl_in="loss")
    fresh, total, count = trainer(**keys).model, 0.0, sum(map(len, responses))
    for prompt, response in zip(prompts, responses, strict=True):
        rows = torch.tensor([[*prompt, *response]])
        before = slice(len(prompt) - 1, len(prompt) + len(response) - 1)
        logp, ref = (
            m(rows).logits[0, before].log_softmax(-1)[range(len(response)), response]
            for m in (fresh.pretrained_model, other.ref_model)
        )
        ratio = logp - ref.detach()
        total = total + (0.5 * ratio**2 if kind == "mse" else torch.exp(-ratio) - 1 + ratio).sum()
    (0.7 * total / count).backward()
    wanted = {n: g for n, g in tiny.gradients(fresh).items()}
    assert tiny.far_gradients({n: g for n, g in found.items() if n in wanted}, wanted) < 1e-4
    assert stats["ppo/loss/kl"] == pytest.approx(0.7 * total.item() / count, rel=1e-4)
    assert stats["ppo/mean_non_score_reward"] == pytest.approx(-0.7 * total.item() / count, rel=1e-4)


def test_the_passes_end_when_the_policy_has_moved_too_far():
    """Also when the estimate is negative; TRL 0.11 asks for its sign."""

    def passes(moved, **keys):
        made, seen = trainer(ppo_epochs=4, early_stopping=True, target_kl=0.1, **keys), []
        optimize = made._optimize

        def noted(rollout, advantages, returns, so_far):
            optimize(rollout, advantages, returns, so_far)
            so_far.rows[-1]["policy/policykl"] = moved
            seen.append(len(advantages))

        made._optimize = noted
        made.step(*batch())
        return len(seen) // 2

    assert [passes(moved) for moved in (0.14, 0.16, -0.14, -0.16)] == [4, 1, 4, 1]


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_checkpointed_gradients_are_the_same_and_blocks_do_run_again(kind):
    """In evaluation mode transformers, and with it TRL 0.11, leaves checkpointing off in silence."""
    made, calls = trainer(kind, gradient_checkpointing=True, ppo_epochs=1, mini_batch_size=8), []
    stack = (
        made.model.pretrained_model.model.layers
        if kind == "llama"
        else made.model.pretrained_model.transformer.h
    )
    stack[0].mlp.register_forward_pre_hook(lambda *_: calls.append(1))
    caught = []
    made.optimizer.register_step_pre_hook(lambda *_: caught.append(tiny.gradients(made.model, keep=True)))
    made.step(*batch())
    assert len(calls) == 3, "once to observe, twice to learn"
    assert tiny.far_gradients(caught[0], first_gradients(kind=kind, ppo_epochs=1, mini_batch_size=8)) < 1e-6
    assert not any(m.training for m in made.model.modules())


# ---- two processes


def test_a_process_takes_its_own_rows_of_a_minibatch(monkeypatch):
    made = trainer()
    monkeypatch.setattr(PPOTrainer, "batch_rows", 3)
    monkeypatch.setattr(type(made), "rank", 1)
    assert made._own(torch.tensor([7, 4, 0, 3, 2, 6])).tolist() == [1, 0]
    assert made._own(torch.tensor([0, 6])).tolist() == []


def test_a_process_without_rows_in_a_step_still_steps():
    made = trainer()
    made._own = lambda rows: rows[:0]
    start = weights(made)
    made._total = lambda values: values + 1.0  # of another process, which has some
    made._sum_gradients = lambda: [setattr(p, "grad", torch.ones_like(p)) for p in made.parameters]
    stats = made.step(*batch())
    assert not is_still(made, start) and stats["ppo/policy/ratio"].shape == (0,)


def whole(folder: Path) -> None:
    """Two steps of this process's share of the same rows; rank 0 writes weights and statistics."""
    made = trainer(batch_size=8, mini_batch_size=2, use_score_scaling=True, whiten_rewards=True, ppo_epochs=2)
    share = slice(made.rank * made.batch_rows, (made.rank + 1) * made.batch_rows)
    for number in range(2):
        stats = made.step(*(rows[share] for rows in batch(seed=number)))
    if made.rank == 0:
        numbers = {n: torch.tensor(float(v)) for n, v in stats.items() if isinstance(v, float | int)}
        save_file(
            {n: v.contiguous() for n, v in {**weights(made), **numbers}.items()}, folder / "found.safetensors"
        )


PROGRAM = """
import sys
from pathlib import Path
import test_ppo_stability
test_ppo_stability.whole(Path(sys.argv[1]))
"""


@pytest.mark.slow
def test_two_processes_are_one(tmp_path):
    """Whitening, score scaling, KL, means over tokens and gradients are over the rows of both.

    So are the minibatches: some of two rows are of one process alone.
    """
    (tmp_path / "one").mkdir(), (tmp_path / "two").mkdir()
    whole(tmp_path / "one")
    run_in_two(PROGRAM, tmp_path / "two", tmp_path / "two", beside=__file__)
    one, two = (load_file(tmp_path / name / "found.safetensors") for name in ("one", "two"))
    start = weights(trainer())
    names = start.keys()
    assert far_weights({n: two[n] for n in names}, {n: one[n] for n in names}, start) < 1e-3
    for name in one.keys() - names:
        if not name.startswith("time/"):
            assert two[name].item() == pytest.approx(one[name].item(), rel=1e-3, abs=1e-5), name


@pytest.mark.slow
def test_processes_must_divide_the_batch(tmp_path):
    program = """
import made_trainers
try:
    made_trainers.trainer(batch_size=9, mini_batch_size=3)
except ValueError as error:
    assert "ppo.batch_size (9) is not a multiple of 2 processes" in str(error), error
else:
    raise SystemExit("it was taken")
"""
    run_in_two(program, tmp_path, beside=__file__)

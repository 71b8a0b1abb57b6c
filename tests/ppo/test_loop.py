"""The whole loop as a library: texts or tokens, looks at held-out prompts, resumed runs and lost ones."""

from __future__ import annotations

import math

import pytest
import tiny
import torch
from made_trainers import batch, is_still, trainer, weights

from tasks.ppo.guard import SpikeGuard
from tasks.ppo.looks import HELD_OUT
from tasks.ppo.loop import COLUMNS, Loop, prompts_of_update
from tasks.run import checkpoint

FEW = {"responses": 6}  # of a look
KEYS = {"updates": 4, "eval_updates": 2, "learning_rate": 3e-3, "ppo_epochs": 1, "monitor": FEW}


@pytest.mark.parametrize(("prompts", "batch"), [(10, 4), (7, 7), (3, 8), (5, 1)])
def test_each_pass_uses_every_prompt_once(prompts, batch):
    drawn = [n for update in range(2 * prompts) for n in prompts_of_update(update, prompts, batch, 5)]
    assert len(drawn) == 2 * prompts * batch
    passes = [drawn[i : i + prompts] for i in range(0, len(drawn), prompts)]
    assert all(sorted(each) == list(range(prompts)) for each in passes)
    assert prompts < 5 or len({tuple(each) for each in passes}) > 1, "every pass is shuffled anew"


def test_the_prompts_of_an_update_depend_on_its_number_alone():
    there = {n: prompts_of_update(n, 11, 4, 5) for n in range(9)}
    assert there == {n: prompts_of_update(n, 11, 4, 5) for n in reversed(range(9))}
    assert [prompts_of_update(n, 11, 4, 6) for n in range(9)] != list(there.values())
    assert prompts_of_update(3, 11, 4, 2**63 - 1)


def likes_short(prompts, responses):
    """Tokens in, scores out."""
    return [-float(len(r)) for r in responses]


def made(**keys):
    return trainer(**{**KEYS, **keys})


def test_a_run_of_tokens():
    told, own = [], made()
    curve = own.train(
        tiny.drawn([3, 5, 2, 4, 6]), likes_short, on_update=lambda n, s: told.append((n, s["tokens"]))
    )
    assert [row["step"] for row in curve.rows] == [1, 2, 3, 4] == [n for n, _ in told]
    assert set(curve.rows[1]) == {"step", *COLUMNS, *HELD_OUT} and set(curve.rows[0]) == {"step", *COLUMNS}
    assert all(tokens > 8 * 3 for _, tokens in told) and own.updates == 4
    assert curve.rows[3]["score"] == -curve.rows[3]["response_tokens"]


def test_a_run_of_texts_gives_texts_to_the_reward():
    tokenizer, seen = tiny.tokenizer(), []
    own = trainer(given={"tokenizer": tokenizer}, model_keys={"vocab_size": 330}, **{**KEYS, "updates": 1})

    def reward(prompts, responses):
        seen.append((prompts, responses))
        return [float(len(r)) for r in responses]

    own.train(["What is 1?", "Why?"], reward, held_out=["Who?"])
    prompts, responses = seen[-2]
    assert set(prompts) <= {"What is 1?", "Why?"} and len(prompts) == len(responses) == 8
    assert all(isinstance(r, str) and "<|eos|>" not in r for r in responses)
    assert seen[-1][0] == ["Who?"] * 6


def test_several_samples_of_a_prompt():
    own, seen = made(samples_per_prompt=4, updates=1, preflight=False), []
    own.train([[5, 6], [7, 8], [9, 4]], lambda p, r: seen.append(p) or likes_short(p, r))
    prompts = seen[1]  # seen[0]: the look before
    assert (
        len(prompts) == 8
        and prompts[:4] == [prompts[0]] * 4
        and prompts[4:] == [prompts[4]] * 4 != prompts[:4]
    )


@pytest.mark.parametrize(
    ("prompts", "held_out", "message"),
    [
        ([], None, "prompts is empty"),
        ("abc", None, "prompts is one text"),
        ([[5], []], None, r"prompts\[1\] is empty"),
        ([[5], [5] * 59], None, r"prompts\[1\] has 59 tokens; the model has room for 58"),
        ([[5]], [[5], [99]], r"held_out\[1\] holds token ids outside the model's vocabulary of 32"),
    ],
)
def test_what_the_loop_refuses(prompts, held_out, message):
    with pytest.raises(ValueError, match=message):
        made().train(prompts, lambda *_: pytest.fail("it went on"), held_out=held_out)


def test_a_reward_that_is_wrong_is_named_before_anything_moves():
    own = made(preflight=False)
    start = weights(own)
    for scores, message in (
        ([1.0] * 7, "scores holds 7 rows"),
        ([math.nan] * 6, r"scores\[0\] is not finite"),
    ):
        with pytest.raises(ValueError, match=message):
            own.train([[5, 6]], lambda *_, scores=scores: scores)
    assert is_still(own, start)


class StopError(Exception):
    pass


@pytest.mark.parametrize("update", [1, 3])
def test_a_broken_run_goes_on_bit_for_bit(tmp_path, update):
    prompts, keys = tiny.drawn([3, 5, 2, 4, 6]), {"use_score_scaling": True, "select": "best"}
    whole = made(**keys)
    wanted = whole.train(prompts, likes_short)

    def stop(number, _):
        if number == update:
            raise StopError

    with pytest.raises(StopError):
        made(**keys).train(prompts, likes_short, folder=tmp_path, checkpoint_updates=1, on_update=stop)
    resumed, began = made(**keys), []
    curve = resumed.train(
        prompts, likes_short, folder=tmp_path, checkpoint_updates=1, on_update=lambda n, _: began.append(n)
    )
    assert began == list(range(update, 5)) and curve.rows == wanted.rows
    assert (
        is_still(resumed, weights(whole)) and resumed.state_dict()["running"] == whole.state_dict()["running"]
    )


def test_a_lost_run_returns_to_its_checkpoint_and_does_not_repeat_itself(tmp_path, caplog):
    """Three steps in a row are refused in update 3; the checkpoint of update 2 returns, at half the rate."""
    own, broken, seen, asked = made(max_skipped_steps=2, updates=4), [], [], []
    allows = own.guard.allows

    def refuse(loss, ratio, norm):
        if own.updates == 2 and len(broken) < 2:
            broken.append(own.updates)
            return SpikeGuard.allows(own.guard, math.nan, ratio, norm)
        return allows(loss, ratio, norm)

    own.guard.allows = refuse

    def reward(prompts, responses):
        if len(prompts) == 8:
            asked.append(responses)
        return likes_short(prompts, responses)

    curve = own.train(
        tiny.drawn([3, 5, 2, 4, 6]), reward, folder=tmp_path, checkpoint_updates=2,
        on_update=lambda n, s: seen.append((n, s["ppo/learning_rate"])),
    )  # fmt: skip
    assert [n for n, _ in seen] == [1, 2, 2, 3, 4] and seen[-1][1] == KEYS["learning_rate"] / 2
    assert [row["step"] for row in curve.rows] == [1, 2, 3, 4] and own.returns == 1
    assert "going on from update 2 with the learning rate 0.0015" in caplog.text
    assert checkpoint.latest(tmp_path).state["trainer"]["returns"] == 1
    assert len({str(a) for a in asked}) == len(asked), "the rollout after the return is another one"


def test_held_out_looks_change_nothing():
    """The same training with and without them: no draw, no moment of the scores is touched."""
    found = []
    for eval_updates in (1, 100):
        own = made(eval_updates=eval_updates, use_score_scaling=True, preflight=False)
        loop = Loop(own, likes_short, [[5, 6], [7, 8]], [[9]])
        for _ in range(3):
            loop.update()
        found.append((weights(own), own.running.state_dict()))
    assert found[0][1] == found[1][1] and all(torch.equal(v, found[1][0][n]) for n, v in found[0][0].items())


def test_a_step_by_hand_is_an_update_of_the_loop():
    own, other = made(preflight=False), made(preflight=False)
    steps = []
    step = own.step
    own.step = lambda *given: steps.append(given) or step(*given)
    Loop(own, likes_short, [[5, 6], [7, 8]], [[9]]).update()
    other.step(*steps[0])
    assert is_still(other, weights(own))
    other.step(*batch())

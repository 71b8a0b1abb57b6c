"""Looks at held-out prompts: what they measure, what they remember, and when they warn."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import tiny
import torch
from made_trainers import is_still, trainer, weights

from tasks.ppo.looks import HELD_OUT, OF_JUDGE, Looks
from tasks.ppo.loop import Loop
from tasks.run import checkpoint

KEYS = {"updates": 4, "eval_updates": 2, "learning_rate": 3e-3, "ppo_epochs": 1, "missing_eos_penalty": 0.5}
HELD = [[5, 6], [7, 8, 9], [4]]


def likes_short(prompts, responses):
    return [-float(len(r)) for r in responses]


def likes_long(prompts, responses):
    return [float(len(r)) for r in responses]


def made(judge=likes_long, responses=6, **keys) -> Looks:
    own = trainer(**{**KEYS, "monitor": {"responses": responses}, **keys})
    return Looks(own, likes_short, judge, HELD, 512)


@pytest.mark.parametrize(("responses", "each"), [(1, 1), (3, 1), (4, 2), (6, 2), (7, 3)])
def test_every_prompt_gets_as_many_responses(responses, each):
    looks = made(responses=responses)
    assert looks.prompts == [prompt for prompt in HELD for _ in range(each)]


def test_a_look_by_definition():
    """Two responses to each prompt; no weight moves; before the first update the policy is the reference."""
    looks = made()
    start, seen = weights(looks.trainer), []
    looks.reward_fn = lambda p, r: seen.append((p, r)) or likes_short(p, r)
    looks.begin()
    looks.begin()
    assert len(seen) == 1 and is_still(looks.trainer, start), "a run begins once"
    prompts, responses = seen[0]
    lengths = torch.tensor([len(r) for r in responses], dtype=torch.float64).view(3, 2).mean(1)
    ends = torch.tensor([float(r[-1] == tiny.EOS) for r in responses], dtype=torch.float64).view(3, 2).mean(1)
    assert looks.start.tokens.tolist() == lengths.tolist() == looks.start.judge.tolist()
    assert (
        looks.start.proxy.tolist() == (-lengths).tolist() and looks.start.eos_rate.tolist() == ends.tolist()
    )
    assert np.abs(looks.start.kl_nats).max() < 1e-5
    rollout = looks.trainer.observe(prompts, responses)
    each = [row[mask].mean() for row, mask in zip(rollout.entropy, rollout.is_action, strict=True)]
    assert tiny.far(looks.start.entropy_nats, torch.stack(each).view(3, 2).mean(1)) <= 1e-6
    paid, measures = looks.take(2)
    assert paid == pytest.approx(measures["proxy"] - 0.5 * (1 - measures["eos_rate"])) and 0 < ends.mean() < 1
    assert measures == looks.start.means(), "the same random numbers"


def test_rewards_of_tokens_are_summed():
    looks = made(judge=lambda p, r: [[0.5] * len(x) for x in r])
    looks.begin()
    assert looks.start.judge.tolist() == (looks.start.tokens / 2).tolist()


def test_code_fences_need_a_tokenizer_that_writes():
    looks = made()
    looks.begin()
    assert looks.start.code_fence_rate.tolist() == [0, 0, 0]
    looks = made()
    looks.trainer.tokenizer = fences = type(
        "Fences", (), {"eos_token_id": tiny.EOS, "pad_token_id": tiny.PAD}
    )()
    fences.batch_decode = lambda rows, **_: ["```"] * len(rows)
    looks.begin()
    assert looks.start.code_fence_rate.tolist() == [1, 1, 1]


def scripted(monkeypatch, *moves):
    """Looks whose measures are those of the first one with these changes, one after another."""
    looks = made()
    looks.begin()
    steady = replace(looks.start, proxy=np.zeros(3), judge=np.zeros(3), kl_nats=np.zeros(3))
    looks.start = looks.best = steady
    script = iter([replace(steady, **{k: np.full(3, v) for k, v in move.items()}) for move in moves])
    monkeypatch.setattr(looks, "_take", lambda: (next(script), 0.0))
    return looks


def test_the_best_look_is_remembered_and_a_fall_from_it_is_told(monkeypatch, caplog):
    rise = [{"proxy": 1.0, "judge": 0.9}, {"proxy": 1.5, "judge": 1.0}, {"proxy": 1.6, "judge": 0.7}]
    looks = scripted(monkeypatch, *rise)
    looks.take(1)
    assert looks.best.judge[0] == 0.9
    looks.take(2)
    assert looks.best.judge[0] == 1.0 and not caplog.text
    looks.take(3)
    assert looks.best.judge[0] == 1.0
    assert {number: set(found) for number, found in looks.findings.items()} == {
        1: set(),
        2: set(),
        3: {"judge_fall"},
    }
    assert "ppo: update 3: the score rose by 1.60, but the judge fell by 0.30 since the look" in caplog.text


def test_a_score_that_falls_warns_of_nothing(monkeypatch, caplog):
    looks = scripted(monkeypatch, {"proxy": -1.0, "judge": -5.0, "kl_nats": 99.0})
    looks.take(1)
    assert looks.findings == {1: {}} and not caplog.text


def test_a_checkpoint_keeps_looks_and_findings(monkeypatch, tmp_path):
    looks = scripted(monkeypatch, {"proxy": 1.0, "judge": 1.0}, {"proxy": 2.0, "judge": 0.1})
    looks.take(1)
    looks.take(2)
    checkpoint.save(tmp_path, 1, looks.state_dict())
    again = made()
    again.load_state_dict(checkpoint.latest(tmp_path).state)
    assert again.findings == looks.findings and set(again.findings[2]) == {"judge_share", "judge_fall"}
    assert again.best.judge.tolist() == [1.0] * 3 and again.start.means() == looks.start.means()
    empty = made()
    empty.load_state_dict(made().state_dict())
    assert empty.start is None and empty.best is None and empty.findings == {}


def test_a_loop_that_goes_on_remembers_its_looks():
    keys = {**KEYS, "eval_updates": 1, "monitor": {"responses": 6}}
    first, second = (Loop(trainer(**keys), likes_short, HELD, HELD, judge=likes_long) for _ in range(2))
    first.update()
    second.load_state_dict(first.state_dict())
    assert second.looks.state_dict() == first.looks.state_dict() and second.looks.start is not None
    assert list(second.looks.findings) == [1]


def test_the_loop_writes_what_it_saw():
    """Score up, judge down: the run is found out; columns, statistics and points agree."""
    own = trainer(
        **{**KEYS, "updates": 12, "learning_rate": 2e-2, "init_kl_coef": 0.0, "monitor": {"responses": 60}}
    )
    told = []
    loop = Loop(own, likes_short, tiny.drawn([3, 5, 2, 4, 6]), tiny.drawn([2] * 12, 9), judge=likes_long)
    loop.run(None, 10, lambda n, stats: told.append(stats))
    assert tuple(loop.curve.columns[-2:]) == OF_JUDGE
    assert {"judge_share", "judge_fall"} <= set(loop.looks.findings[12])
    last, row = told[-1], loop.curve.rows[-1]
    assert last["monitor/findings"] == len(loop.looks.findings[12]) and "monitor/judge" not in told[0]
    for name in (*HELD_OUT[1:], *OF_JUDGE):
        assert last["monitor/" + name.removeprefix("held_out_")] == row[name]
    assert last["held_out_score"] == row["held_out_score"] < row["held_out_proxy"]
    points = loop.looks.means(loop.curve)
    assert len(points) == 7 and points[0] == loop.looks.start.means()
    assert points[-1]["judge"] == row[OF_JUDGE[0]] and points[-1]["proxy"] == row["held_out_proxy"]


def test_a_judge_of_texts_gets_texts():
    own = trainer(
        given={"tokenizer": tiny.tokenizer()}, model_keys={"vocab_size": 330},
        **{**KEYS, "updates": 1, "monitor": {"responses": 2}},
    )  # fmt: skip
    seen = []
    curve = own.train(
        ["What is 1?", "Why?"], likes_short, held_out=["Who?"],
        judge=lambda p, r: seen.append((p, r)) or [1.0] * len(r),
    )  # fmt: skip
    assert [p for p, _ in seen] == [["Who?"] * 2] * 2, (
        "before the first update, and after it; never in training"
    )
    assert all(isinstance(text, str) for _, r in seen for text in r) and curve.rows[-1][OF_JUDGE[0]] == 1.0

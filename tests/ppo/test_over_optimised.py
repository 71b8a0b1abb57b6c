"""A miniature of arXiv 2210.10760: what is paid goes on rising, what is meant turns.

Meant is a response that says a word once or twice. Paid is every time it is said.
"""

from __future__ import annotations

import pytest
import tiny
from made_trainers import trainer

from tasks.ppo.loop import Loop

WORD = 7
KEYS = {
    "updates": 30, "eval_updates": 5, "batch_size": 32, "mini_batch_size": 32, "learning_rate": 1e-2,
    "lam": 1.0, "gamma": 1.0, "ppo_epochs": 1, "adap_kl_ctrl": False, "max_grad_norm": 1.0,
    "preflight": False, "target": 2.0, "monitor": {"responses": 96, "judge_fall": 0.1},
}  # fmt: skip


def paid(prompts, responses):
    return [float(r.count(WORD)) for r in responses]


def meant(prompts, responses):
    return [2.0 - abs(2.0 - r.count(WORD)) for r in responses]


def run(init_kl_coef: float, **monitor) -> Loop:
    own = trainer(**KEYS | {"monitor": KEYS["monitor"] | monitor}, init_kl_coef=init_kl_coef)
    loop = Loop(own, paid, tiny.drawn([3] * 16), tiny.drawn([3] * 24, 9), judge=meant)
    loop.run(None, 10)
    return loop


@pytest.fixture(scope="module")
def runs() -> dict[str, Loop]:
    return {"cheap": run(0.0), "dear": run(1.0), "meant": run(0.0, reward="truth")}


def test_a_run_whose_kl_costs_nothing_is_found_out(runs, caplog):
    looks = runs["cheap"].looks.means(runs["cheap"].curve)
    assert looks[-1]["proxy"] > looks[0]["proxy"] + 2, "paid rises"
    best = max(look["judge"] for look in looks)
    assert looks[-1]["judge"] < best - 0.5, "meant turns"
    found = runs["cheap"].looks.findings[30]
    assert {"judge_share", "judge_fall", "kl_nats", "repetition_3", "entropy_nats"} <= set(found)


def test_the_same_run_is_right_where_what_is_paid_is_what_is_meant(runs):
    """But for one thing that no score of a text sees: its responses do not end any more."""
    assert runs["meant"].curve.rows == runs["cheap"].curve.rows
    assert [*runs["meant"].looks.findings] == [*range(5, 31, 5)]
    assert all(set(found) == {"eos_rate"} for found in runs["meant"].looks.findings.values())


def test_a_run_that_pays_for_kl_rises_without_a_finding(runs):
    looks = runs["dear"].looks.means(runs["dear"].curve)
    gains = {name: looks[-1][name] - looks[0][name] for name in ("proxy", "judge")}
    assert gains["proxy"] > 0.1 and gains["judge"] > 0.1, gains
    assert runs["dear"].looks.findings == {number: {} for number in range(5, 31, 5)}

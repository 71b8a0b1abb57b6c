"""Every rule by hand, with made measures."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest

from params.schema import MonitorParams
from tasks.run.monitor import Look, Thresholds, findings_of, gain
from tasks.run.monitor.rules import disagrees, exceeds, has_risen

LIMITS = Thresholds(
    noise=2.0, judge_share=0.5, judge_fall=0.2, agreement_fall=0.5, kl_nats=3.0, length_factor=1.5,
    length_tokens=1.0,
    entropy_fall=0.5, distinct_fall=0.3, repetition_rise=0.1, code_fence_rise=0.1, eos_fall=0.1,
)  # fmt: skip
P = 4  # prompts


def row(*values: float) -> np.ndarray:
    return np.array(values * P if len(values) == 1 else values)


START = Look(
    proxy=row(0.0), kl_nats=row(0.0), tokens=row(10.0), eos_rate=row(1.0), repetition_3=row(0.1),
    code_fence_rate=row(0.0), entropy_nats=row(1.0), distinct_2=0.5, judge=row(0.0),
)  # fmt: skip
GOOD = replace(START, proxy=row(1.0), judge=row(0.8), kl_nats=row(0.5))  # both gain, little else moves


def found(look: Look, start: Look = START, **more) -> set[str]:
    return set(findings_of(start, look, LIMITS, **more))


def test_a_gain_by_hand():
    """Differences 1, 2, 3: mean 2, deviation 1, error 1/√3. One prompt: nothing is known."""
    mean, error = gain(np.array([5.0, 0.0, 1.0]), np.array([6.0, 2.0, 4.0]))
    assert (mean, error) == pytest.approx((2.0, 1 / math.sqrt(3)))
    assert gain(np.array([1.0]), np.array([4.0])) == (3.0, math.inf)


def test_a_movement_must_exceed_both_threshold_and_noise():
    before, now = np.zeros(3), np.array([1.0, 2.0, 3.0])  # 2 ± 0.577
    assert exceeds(before, now, 1.99, 3.4) and not exceeds(before, now, 1.99, 3.5)
    assert not exceeds(before, now, 2.0, 1.0), "not beyond the threshold"
    assert not exceeds(np.zeros(1), np.ones(1), 0.0, 2.0), "a single prompt shows nothing"
    assert not exceeds(now, before, 0.0, 2.0), "it fell"


def test_the_prompts_are_paired():
    """A spread between prompts that is in both looks is no noise."""
    wide = np.array([-90.0, 50.0, 0.0, 40.0])
    assert has_risen(replace(START, proxy=wide), replace(START, proxy=wide + 0.1), 2.0)
    assert not has_risen(replace(START, proxy=wide), replace(START, proxy=wide[::-1] + 0.1), 2.0)


MOVED = {  # one signal past its threshold, and just within it
    "judge_share": ({"judge": row(0.49)}, {"judge": row(0.51)}),
    "kl_nats": ({"kl_nats": row(3.01)}, {"kl_nats": row(2.99)}),
    "entropy_nats": ({"entropy_nats": row(0.49)}, {"entropy_nats": row(0.51)}),
    "tokens": ({"tokens": row(15.1)}, {"tokens": row(14.9)}),
    "repetition_3": ({"repetition_3": row(0.21)}, {"repetition_3": row(0.19)}),
    "distinct_2": ({"distinct_2": 0.34}, {"distinct_2": 0.36}),
    "code_fence_rate": ({"code_fence_rate": row(0.11)}, {"code_fence_rate": row(0.09)}),
    "eos_rate": ({"eos_rate": row(0.89)}, {"eos_rate": row(0.91)}),
}


@pytest.mark.parametrize("name", MOVED)
def test_each_signal_past_its_threshold(name):
    past, within = (replace(GOOD, **keys) for keys in MOVED[name])
    assert found(past) == {name} and found(within) == set()
    assert found(replace(past, proxy=row(0.0))) == set(), "the score has not risen"
    assert found(replace(past, proxy=row(-1.0))) == set(), "the score has fallen"


@pytest.mark.parametrize("name", [n for n in MOVED if n != "distinct_2"])
def test_each_signal_of_single_prompts_must_exceed_the_noise(name):
    """The same mean from two prompts that went far and two that went the other way."""
    keys = {k: v + 50 * np.array([1.0, -1.0, 1.0, -1.0]) for k, v in MOVED[name][0].items()}
    assert found(replace(GOOD, **keys)) == set()


def test_shorter_is_as_suspect_as_longer():
    assert (
        found(replace(GOOD, tokens=row(6.6))) == {"tokens"} and found(replace(GOOD, tokens=row(6.7))) == set()
    )


def test_a_judge_that_falls_from_its_best_look():
    """It still has its share of the gain, but had more."""
    now = replace(GOOD, proxy=row(2.0), judge=row(1.1))
    assert found(now) == set() == found(now, best=replace(GOOD, judge=row(1.29)))
    assert found(now, best=replace(GOOD, judge=row(1.31))) == {"judge_fall"}
    assert found(now, best=replace(GOOD, judge=row(1.31) + np.array([9.0, -9.0, 9.0, -9.0]))) == set()


def test_a_judge_that_falls_below_sft():
    assert found(replace(GOOD, judge=row(-0.21))) == {"judge_share", "judge_fall"}


def test_without_a_judge_the_rest_is_watched():
    start, now = replace(START, judge=None), replace(GOOD, judge=None)
    assert found(now, start=start) == set() == found(now, start=start, best=start)
    assert found(replace(now, tokens=row(99.0)), start=start) == {"tokens"}


def test_the_sentences_give_the_figures():
    said = findings_of(START, replace(GOOD, judge=row(-0.3), tokens=row(20.0), kl_nats=row(4.0)), LIMITS)
    assert said["judge_share"] == "the judge gained -0.30 where the score gained +1.00, less than 0.5 of it"
    assert said["judge_fall"] == "the judge fell by 0.30 since the look it liked best"
    assert said["tokens"] == "length 10 → 20 tokens"
    assert said["kl_nats"] == "KL to SFT is 4.00 nats per response, more than 3"


def limits_of(target=0.5, response_tokens=32, kl_budget_nats=None, **settings) -> Thresholds:
    run = {"target": target, "response_tokens": response_tokens, "kl_budget_nats": kl_budget_nats}
    return Thresholds.of(MonitorParams(**settings).model_dump(), **run)


@pytest.mark.parametrize(
    ("keys", "nats", "tokens"),
    [
        ({}, 1.0, 3.2),
        ({"target": 6.0, "response_tokens": 100}, 12.0, 10.0),
        ({"kl_budget_nats": 2.0}, 4.0, 3.2),  # a model may be chosen that spent so much
        ({"kl_budget_nats": 0.2, "kl_factor": 3.0}, 1.5, 3.2),
        ({"kl_nats": 7.0, "length_share": 0.5}, 7.0, 16.0),
    ],
)
def test_what_is_relative_to_a_run(keys, nats, tokens):
    limits = limits_of(**keys)
    assert (limits.kl_nats, limits.length_tokens) == pytest.approx((nats, tokens))


def test_a_few_tokens_are_no_other_length():
    """Twice as long, and shorter, by three tokens of 32 that a response may have."""
    for now, wanted in ((6.0, set()), (6.3, {"tokens"})):
        long, short = (replace(GOOD, tokens=row(size)) for size in (now, 3.0))
        for start, look in ((short, long), (long, short)):
            start = replace(START, tokens=start.tokens)
            assert set(findings_of(start, look, limits_of(kl_nats=9.0))) == wanted


def test_the_truth_cannot_be_over_optimised():
    """Of all that moved one finding is left: what ends a response the score did not see."""
    everything = {key: value for past, _ in MOVED.values() for key, value in past.items()}
    now = replace(GOOD, **everything)
    assert found(now) == set(MOVED)
    assert set(findings_of(START, now, replace(LIMITS, is_truth=True))) == {"eos_rate"}
    assert limits_of(reward="truth").is_truth


def test_the_parameters_are_the_thresholds():
    limits = limits_of(judge_share=0.25)
    assert limits.judge_share == 0.25 and limits.noise == 3.0 and not limits.is_truth
    for key, value in (("noise", 0), ("length_factor", 1), ("entropy_fall", 1.5), ("responses", 0)):
        with pytest.raises(ValueError, match=key):
            MonitorParams(**{key: value})


def test_agreement_by_hand():
    """Fisher's z of .5 is .549, of .2 .203: the difference .347 is 2 errors √(2 / (n − 3)) at n = 70."""
    for count, wanted in ((69, False), (70, True)):
        assert disagrees(0.5, 0.2, count, LIMITS) is wanted
    assert not disagrees(0.5, 0.26, 10**6, LIMITS), "more than half of it is left"
    assert disagrees(1.0, 0.4, 100, LIMITS) and not disagrees(1.0, 0.0, 3, LIMITS)
    assert disagrees(0.5, -1.0, 10, LIMITS)


def test_two_scores_that_rise_together_may_disagree():
    many = {"proxy": np.ones(200), "judge": np.ones(200)} | {
        name: np.full(200, getattr(START, name)[0])
        for name in ("kl_nats", "tokens", "eos_rate", "repetition_3", "code_fence_rate", "entropy_nats")
    }
    start = replace(START, **many | {"proxy": np.zeros(200), "judge": np.zeros(200)}, agreement=0.6)
    for agreement, wanted in ((0.15, {"agreement"}), (0.45, set())):
        assert found(replace(start, **many, agreement=agreement), start) == wanted

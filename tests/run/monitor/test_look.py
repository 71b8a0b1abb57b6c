"""A look by hand: what is measured, by prompt; and that a checkpoint gives it back."""

from __future__ import annotations

import json
from dataclasses import fields

import numpy as np
import pytest

from tasks.run.monitor import Look
from tasks.run.monitor.look import correlation

EOS = 1


def made(**keys) -> Look:
    """Two prompts, two responses each."""
    given = {
        "proxy": [1.0, 3.0, 5.0, 7.0],
        "kl_nats": [0.0, 1.0, 2.0, 3.0],
        "entropy_nats": [0.5, 0.5, 1.0, 2.0],
    }
    tokens = [[5, 5, 5, 5], [6, EOS], [7, EOS], [8, 9, EOS]]
    return Look.of(tokens, ["```x", "y", "z", "w"], EOS, 2, **given | keys)


def test_by_hand():
    """5 5 5 5 has two trigrams, one of them again: ½. Bigrams 55 55 55 61 71 89 91: 5 of 7 are distinct."""
    look = made(judge=[0.0, 2.0, 4.0, 4.0])
    wanted = {
        "proxy": [2, 6], "kl_nats": [0.5, 2.5], "tokens": [3, 2.5], "eos_rate": [0.5, 1],
        "repetition_3": [0.25, 0], "code_fence_rate": [0.5, 0], "entropy_nats": [0.5, 1.5], "judge": [1, 4],
    }  # fmt: skip
    for name, values in wanted.items():
        assert getattr(look, name).tolist() == pytest.approx(values), name
    assert look.distinct_2 == pytest.approx(5 / 7)
    assert look.agreement == pytest.approx(14 / 220**0.5)  # over the four responses, not the two prompts
    rest = {"distinct_2": 5 / 7, "agreement": look.agreement}
    assert look.means() == pytest.approx({k: sum(v) / 2 for k, v in wanted.items()} | rest)


def test_only_what_ends_with_eos_ends():
    none = [0.0] * 3
    look = Look.of([[], [EOS], [EOS, 5]], [""] * 3, EOS, 1, proxy=none, kl_nats=none, entropy_nats=none)
    assert look.eos_rate.tolist() == [0, 1, 0] and look.distinct_2 == 1 and look.judge is None
    assert "judge" not in look.means()


@pytest.mark.parametrize("judge", [None, [0.1, 0.2, 0.3, 0.4]])
def test_a_checkpoint_gives_it_back(judge):
    look = made(judge=judge)
    again = Look.from_state(json.loads(json.dumps(look.state_dict())))
    for field in fields(Look):
        assert np.array_equal(getattr(again, field.name), getattr(look, field.name)), field.name


def test_correlation_by_hand():
    """Of 1 2 3 with 1 3 2: 1 / 2; what does not vary agrees with nothing."""
    assert correlation([1, 2, 3], [1, 3, 2]) == pytest.approx(0.5)
    assert correlation([1, 2, 3], [-2, -4, -6]) == pytest.approx(-1)
    assert correlation([1, 1, 1], [1, 2, 3]) == 0

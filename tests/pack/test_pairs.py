"""Which pairs of answers are preferences."""

from __future__ import annotations

from collections import Counter
from itertools import pairwise

from hypothesis import given, settings
from hypothesis import strategies as st

from tasks.pack.pairs import preference_pairs


def test_by_hand():
    assert preference_pairs([2, 5, 2], 10, "s/1") == [(1, 0), (1, 2)]
    assert preference_pairs([3, 2, 1], 10, "s/1") == [(0, 1), (0, 2), (1, 2)]
    assert (
        preference_pairs([1, 1], 10, "s/1")
        == preference_pairs([1], 10, "")
        == preference_pairs([], 1, "")
        == []
    )


@settings(max_examples=200, deadline=None)
@given(st.lists(st.integers(-1, 5), max_size=9), st.integers(1, 12), st.text(max_size=5))
def test_strict_at_most_and_sorted(scores, most, salt):
    pairs = preference_pairs(scores, most, salt)
    possible = sum(a != b for i, a in enumerate(scores) for b in scores[:i])
    assert all(scores[better] > scores[worse] for better, worse in pairs)
    assert len(set(pairs)) == len(pairs) == min(most, possible)
    assert pairs == sorted(pairs) == preference_pairs(scores, most, salt)


def test_fewer_pairs_are_some_of_the_more():
    scores = [5, 4, 3, 2, 1, 0]
    chosen = [set(preference_pairs(scores, most, "s/1")) for most in range(1, 16)]
    assert all(a < b for a, b in pairwise(chosen))


def test_neither_order_nor_score_chooses():
    """Over 3000 questions each of the six pairs stays half of the time, whichever way the scores run."""
    for scores in ([4, 3, 2, 1], [1, 2, 3, 4]):
        kept = Counter(p for n in range(3000) for p in preference_pairs(scores, 3, f"site/{n}"))
        assert len(kept) == 6 and all(abs(count - 1500) < 130 for count in kept.values())
    assert len({tuple(preference_pairs([4, 3, 2, 1], 3, f"site/{n}")) for n in range(300)}) == 20

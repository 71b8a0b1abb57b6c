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


def test_only_pairs_won_by_the_later_answer_by_hand():
    assert preference_pairs([2, 5, 2], 10, "s/1", ["1", "2", "3"]) == [(1, 0)]
    assert preference_pairs([2, 5, 2], 10, "s/1", ["2", "1", "3"]) == []
    assert preference_pairs([0, 1], 10, "s/1", ["2020", "2020"]) == [], "posted together: neither is later"
    assert preference_pairs([0, 1], 10, "s/1", ["", "2020"]) == [], "nobody knows"


def test_the_cap_counts_what_the_later_answer_won():
    """Of 15 pairs the later answer wins 14; a cap below that chooses among these."""
    scores, posted = [5, 4, 3, 2, 1, 0], ["6", "5", "4", "3", "1", "2"]
    late = [(0, 1), (0, 2), (0, 3), (0, 4), (0, 5), (1, 2), (1, 3), (1, 4), (1, 5), (2, 3), (2, 4), (2, 5),
            (3, 4), (3, 5)]  # fmt: skip
    assert preference_pairs(scores, 14, "s/1", posted) == late
    kept = preference_pairs(scores, 4, "s/1", posted)
    assert len(kept) == 4 and set(kept) < set(late)


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

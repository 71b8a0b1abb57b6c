import pytest
from hypothesis import given
from hypothesis import strategies as st

from tasks.data.score import answer_score


@pytest.mark.parametrize(
    ("votes", "plain", "accepted"),
    [  # log2(1 + votes): none, none, 0, 1, 1.58, 2, 2.32, 2.58, 3, 6.6
        (-7, -1, -1), (-1, -1, -1), (0, 0, 1), (1, 1, 2), (2, 2, 3),
        (3, 2, 3), (4, 2, 3), (5, 3, 4), (7, 3, 4), (96, 7, 8),
    ],
)  # fmt: skip
def test_by_hand(votes, plain, accepted):
    assert answer_score(votes, False) == plain
    assert answer_score(votes, True) == accepted


@given(st.integers(0, 2**31 - 1))
def test_against_whole_numbers(votes):
    """k is nearest to log2(n) where 2^(k - ½) < n < 2^(k + ½), that is 2^(2k - 1) < n² < 2^(2k + 1)."""
    k = answer_score(votes, False)
    assert 2 ** (2 * k) < 2 * (1 + votes) ** 2
    assert (1 + votes) ** 2 < 2 ** (2 * k + 1)

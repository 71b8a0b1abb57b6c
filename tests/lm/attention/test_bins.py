"""Best-fit-decreasing by hand and by properties."""

from __future__ import annotations

import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tasks.lm.attention.bin_packing import best_fit_decreasing, bundle

CASES = st.integers(1, 60).flatmap(lambda c: st.tuples(st.lists(st.integers(1, c), max_size=80), st.just(c)))


@pytest.mark.parametrize(
    ("lengths", "capacity", "rows"),
    [
        ([2, 5, 3], 5, [[1], [2, 0]]),
        ([], 5, []),
        ([5, 5], 5, [[0], [1]]),
        ([1, 1, 1, 1], 2, [[0, 1], [2, 3]]),
        ([6, 7, 3, 4, 2], 10, [[1, 2], [0, 3], [4]]),
        ([5, 7, 3, 2], 10, [[1, 2], [0, 3]]),  # best fit: 3 goes where 3 are left, not where 5 are
        ([4, 6, 2, 2], 8, [[1, 2], [0, 3]]),
        ([5, 2, 3, 1], 4 + 4, [[0, 2], [1, 3]]),  # the peers' expected case, without its split
    ],
)
def test_by_hand(lengths, capacity, rows):
    assert best_fit_decreasing(lengths, capacity) == rows


@pytest.mark.parametrize(("lengths", "which"), [([3, 6], 1), ([3, 0], 1), ([-1], 0)])
def test_an_item_that_fits_no_row_is_named(lengths, which):
    with pytest.raises(ValueError, match=rf"item {which} has {lengths[which]} tokens; a row takes 1 to 5"):
        best_fit_decreasing(lengths, 5)


@settings(max_examples=150, deadline=None)
@given(CASES)
def test_every_item_once_and_no_row_overfull(case):
    lengths, capacity = case
    rows = best_fit_decreasing(lengths, capacity)
    assert sorted(i for row in rows for i in row) == list(range(len(lengths)))
    assert all(sum(lengths[i] for i in row) <= capacity for row in rows)
    assert rows == best_fit_decreasing(lengths, capacity)


def slow(lengths, capacity):
    """The definition, O(n²): longest first (then by index), into the fullest row that takes it."""
    rows, rooms = [], []
    for i in sorted(range(len(lengths)), key=lambda i: (-lengths[i], i)):
        fitting = [(rooms[r], r) for r in range(len(rows)) if rooms[r] >= lengths[i]]
        if fitting:
            best = min(room for room, _ in fitting)
            r = max(r for room, r in fitting if room == best)
        else:
            r = len(rows)
            rows.append([])
            rooms.append(capacity)
        rows[r].append(i)
        rooms[r] -= lengths[i]
    return [sorted(lengths[i] for i in row) for row in rows]


@settings(max_examples=150, deadline=None)
@given(CASES)
def test_as_many_rows_as_the_definition_makes(case):
    """Ties between equally full rows may fall differently; how many rows there are may not."""
    lengths, capacity = case
    assert len(best_fit_decreasing(lengths, capacity)) == len(slow(lengths, capacity))


@pytest.mark.parametrize("seed", range(4))
def test_rows_are_full_from_200_rows_on(seed):
    """Answers of real sites: log-normal lengths, the longest cut."""
    draw = random.Random(seed)
    lengths = [min(256, max(8, round(draw.lognormvariate(3.6, 0.6)))) for _ in range(1600)]
    rows = best_fit_decreasing(lengths, 256)
    assert len(rows) >= 200
    assert sum(lengths) / (256 * len(rows)) >= 0.99


@pytest.mark.parametrize(
    ("lengths", "counts", "stops"),
    [
        ([2, 2, 3], [3], [2, 3]),
        ([5, 1], [2], [1, 2]),
        ([1, 3, 4], [3], [2, 3]),
        ([1, 1, 1], [1, 0, 2], [1, 3]),  # of two prompts
        ([], [0], []),
        ([], [], []),
    ],
)
def test_bundles_by_hand(lengths, counts, stops):
    """At most four tokens that share a prompt together; a longer document is alone."""
    assert bundle(lengths, counts, 4).tolist() == stops

"""What is measured on responses alone: by hand."""

from __future__ import annotations

import pytest

from tasks.run.monitor.text import distinct, has_code_fence, repetition


def test_distinct_by_hand():
    """5 5 6 · 5 5: unigrams 5 5 6 5 5 -> 2 of 5; bigrams 55 56 55 -> 2 of 3."""
    assert distinct([[5, 5, 6], [5, 5]], 1) == pytest.approx(2 / 5)
    assert distinct([[5, 5, 6], [5, 5]], 2) == pytest.approx(2 / 3)
    assert distinct([[5]], 2) == distinct([], 1) == 0.0
    assert distinct([[5, 6], [7, 8]], 2) == 1.0, "n-grams do not cross responses"


def test_repetition_by_hand():
    """1 2 3 1 2 3: trigrams 123 231 312 123 -> one of four stood there before."""
    assert repetition([1, 2, 3, 1, 2, 3]) == pytest.approx(1 / 4)
    assert repetition([1, 1, 1, 1]) == pytest.approx(1 / 2)
    assert repetition([1, 2, 3, 4]) == repetition([1, 2]) == repetition([]) == 0.0
    assert repetition([1, 1, 1], 1) == pytest.approx(2 / 3)


def test_a_fence_is_three_backticks():
    assert has_code_fence("so:\n```\nx\n```") and has_code_fence("```")
    assert not any(map(has_code_fence, ("", "`x`", "``x``", "'''")))

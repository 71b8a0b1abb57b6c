"""The published score of an answer."""

from __future__ import annotations

import math


def answer_score(votes: int, accepted: bool) -> int:
    """StackLLaMA's score (Askell et al. 2021, arXiv 2112.00861): round(log2(1 + votes)), + 1 if accepted.

    −1 when votes are negative, accepted or not. How to round a half needs no rule: log2 of an integer is an
    integer or irrational, never k + ½.
    """
    if votes < 0:
        return -1
    return round(math.log2(1 + votes)) + int(accepted)

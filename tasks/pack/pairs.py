"""Which pairs of answers the reward model learns from."""

from __future__ import annotations

from collections.abc import Sequence
from hashlib import sha256
from itertools import combinations


def preference_pairs(
    scores: Sequence[int], most: int, salt: str, posted: Sequence[str] = ()
) -> list[tuple[int, int]]:
    """Pairs (better, worse) of answer indices with strictly different scores, at most `most`.

    Which ones stay is decided by sha256 of (salt, indices), so that neither order nor age chooses. Example:
    scores [2, 5, 2], most 10 -> [(1, 0), (1, 2)].

    Args:
        scores: of the answers to one question.
        most: pairs.
        salt: of the question.
        posted: when each answer was posted, ISO 8601, "" where nobody knows; given, only pairs whose better
            answer was posted later stay. With ["1", "2", "3"] in the example: [(1, 0)].
    """
    pairs = [(i, j) if scores[i] > scores[j] else (j, i) for i, j in combinations(range(len(scores)), 2)
             if scores[i] != scores[j]]  # fmt: skip
    if posted:
        pairs = [(better, worse) for better, worse in pairs if "" < posted[worse] < posted[better]]
    if len(pairs) > most:
        pairs = sorted(pairs, key=lambda p: sha256(f"{salt}/{p[0]}/{p[1]}".encode()).digest())[:most]
    return sorted(pairs)

"""The held-out answers and their pairs, column by column."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from tasks.reward_eval.rules import text_features


@dataclass(frozen=True, slots=True, eq=False)
class HeldOut:
    """Q questions, their A answers, their P pairs.

    Miniature: of two answers to question 7 the second is better, shorter and older: questions ["s/7"], sites
    ["s"], owner [0, 0], scores [0.5, 0.75], published [1, 4], characters [90, 50], has_code [False, True],
    created ["2020-01-02", "2020-01-01"], pairs [[1, 0]].
    """

    questions: np.ndarray  # [Q] site/id
    sites: np.ndarray  # [Q]
    owner: np.ndarray  # [A] place of the answer's question in [Q], ascending
    scores: np.ndarray  # [A] of the reward model
    published: np.ndarray  # [A] what the dump says, and the pairs come from
    characters: np.ndarray  # [A]
    has_code: np.ndarray  # [A] bool
    created: np.ndarray  # [A] ISO 8601; "" where nobody knows
    features: np.ndarray  # [A, F] of the text, see `rules.FEATURES`
    pairs: np.ndarray  # [P, 2] better and worse answer, places in [A]

    def of_pairs(self, values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Values of the better and of the worse answers. [A, ...] -> [P, ...], [P, ...]."""
        return values[self.pairs[:, 0]], values[self.pairs[:, 1]]

    def differences(self, values: np.ndarray) -> np.ndarray:
        """Better minus worse. [A, ...] -> [P, ...]."""
        better, worse = self.of_pairs(values)
        return better - worse

    @property
    def question_of(self) -> np.ndarray:
        """Place of each pair's question in [Q], [P]."""
        return self.owner[self.pairs[:, 0]]


def lay_out(groups: Sequence[dict], scores: np.ndarray) -> HeldOut:
    """Rows of pack/groups and the reward model's scores [A], in the order of the answers."""
    counts = [len(group["answers"]) for group in groups]
    firsts = np.cumsum([0, *counts[:-1]])
    answers = [answer for group in groups for answer in group["answers"]]

    def column(name: str) -> np.ndarray:
        return np.array([answer[name] for answer in answers])

    return HeldOut(
        questions=np.array([name_of(group) for group in groups]),
        sites=np.array([group["site"] for group in groups]),
        owner=np.repeat(np.arange(len(groups)), counts),
        scores=np.asarray(scores, dtype=float),
        published=column("score"),
        characters=column("characters"),
        has_code=column("has_code"),
        created=column("created"),
        features=np.array([text_features(g["question"], a["text"]) for g in groups for a in g["answers"]]),
        pairs=np.concatenate(
            [first + np.array(group["pairs"]) for group, first in zip(groups, firsts, strict=True)]
        ),
    )


def name_of(group: dict) -> str:
    """The question of a row of pack/groups: site/id."""
    return f"{group['site']}/{group['question_id']}"

"""The held-out answers and their pairs, column by column."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from tasks.lm.heads.frozen_style import text_features
from tasks.run.stated import states

STYLES = ("padded", "plain", "clear")  # of the built-in sample's answers, from the worst

@dataclass(frozen=True, slots=True, eq=False)
class HeldOut:
    """Q questions, their A answers, their P pairs.

    Miniature: of two answers to question 7 the second is better, shorter and older: questions ["s/7"], sites
    ["s"], owner [0, 0], scores [0.5, 0.75], published [1, 4], characters [90, 50], has_code [False, True],
    created ["2020-01-02", "2020-01-01"], pairs [[1, 0]].
    """

    questions: np.ndarray  # [Q] site/id
    sites: np.ndarray  # [Q]
    clusters: np.ndarray  # [Q] what is resampled together: look-alikes, the same fact asked for anew
    kinds: np.ndarray  # [Q] of the built-in sample; "" elsewhere, and so with the wording
    wordings: np.ndarray  # [Q] known, new: whether a training question is put so
    owner: np.ndarray  # [A] place of the answer's question in [Q], ascending
    scores: np.ndarray  # [A] of the reward model
    scores_without_eos: np.ndarray  # [A] the same of answers that are cut of their eos
    published: np.ndarray  # [A] what the dump says, and the pairs come from
    characters: np.ndarray  # [A]
    has_code: np.ndarray  # [A] bool
    created: np.ndarray  # [A] ISO 8601; "" where nobody knows
    texts: np.ndarray  # [A]
    styles: np.ndarray  # [A] place in `STYLES`; nan where it is not known
    right: np.ndarray  # [A] 1: states the expected value, 0: does not; nan where none is known
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

    @property
    def cluster_of(self) -> np.ndarray:
        """Cluster of each pair's question, [P]."""
        return self.clusters[self.question_of]

    @property
    def truths(self) -> np.ndarray:
        """Every right answer beside every wrong one to the same question, whatever their votes, [T, 2]."""
        right, wrong = (np.flatnonzero(self.right == is_right) for is_right in (1, 0))
        found = [[r, w] for r in right for w in wrong[self.owner[wrong] == self.owner[r]]]
        return np.array(found, dtype=int).reshape(-1, 2)


def lay_out(groups: Sequence[dict], scores: np.ndarray, without_eos: np.ndarray | None = None) -> HeldOut:
    """Rows of pack/groups and the reward model's scores, in the order of the answers.

    Args:
        groups: the rows.
        scores: of answers as they stand, [A].
        without_eos: of answers cut of their eos, [A]; None: it reads none.
    """
    counts = [len(group["answers"]) for group in groups]
    firsts = np.cumsum([0, *counts[:-1]])
    answers = [answer for group in groups for answer in group["answers"]]

    def column(name: str) -> np.ndarray:
        return np.array([answer[name] for answer in answers])

    return HeldOut(
        questions=np.array([name_of(group) for group in groups]),
        sites=np.array([group["site"] for group in groups]),
        clusters=np.array([group.get("cluster") or name_of(group) for group in groups]),
        kinds=np.array([group.get("kind") or "" for group in groups]),
        wordings=np.array([group.get("wording") or "" for group in groups]),
        owner=np.repeat(np.arange(len(groups)), counts),
        scores=np.asarray(scores, dtype=float),
        scores_without_eos=np.asarray(scores if without_eos is None else without_eos, dtype=float),
        published=column("score"),
        characters=column("characters"),
        has_code=column("has_code"),
        created=column("created"),
        texts=np.array([answer["text"] for answer in answers], dtype=object),
        styles=np.array([_place(answer.get("style")) for answer in answers]),
        right=np.array([_is_right(g.get("expected"), a["text"]) for g in groups for a in g["answers"]]),
        features=np.array([text_features(g["question"], a["text"]) for g in groups for a in g["answers"]]),
        pairs=np.concatenate(
            [first + np.array(group["pairs"]) for group, first in zip(groups, firsts, strict=True)]
        ),
    )


def _place(style: str | None) -> float:
    return STYLES.index(style) if style in STYLES else np.nan


def _is_right(expected: str | None, text: str) -> float:
    return np.nan if expected is None else float(states(text, expected))


def name_of(group: dict) -> str:
    """The question of a row of pack/groups: site/id."""
    return f"{group['site']}/{group['question_id']}"

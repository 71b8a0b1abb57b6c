"""What length and style alone say of a pair, so that the judge need not learn it.

A rule that never reads the question is fitted to the training pairs; its log-odds are added to the
difference of the judge's scores in training only (product of experts, arXiv 2310.05199). What the rule
explains then gives the judge no gradient, and its own score says what is left. Style is told by the most
frequent words, as in the study of authorship (Mosteller and Wallace 1963): they are about no topic. Words in
code are none.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from tasks.lm.heads.frozen_style import text_features
from tasks.run.text_rule import fit_rule

MOST_WORDS = 100
LEAST_SHARE = 0.01  # of the answers that a word stands in
LEAST_ANSWERS = 3
MOST_QUESTIONS = 10_000  # a hundred coefficients need no more
_CODE, _WORD = re.compile(r"```.*?(?:```|$)|`[^`]*`", re.DOTALL), re.compile(r"[^\W\d_]+(?:'[^\W\d_]+)?")


def words_of(answer: str) -> list[str]:
    """The words of an answer, lower case, outside of code; no numbers. ``It's `x` 5`` -> ["it's"]."""
    return _WORD.findall(_CODE.sub(" ", answer).lower())


@dataclass(frozen=True, slots=True, eq=False)
class StyleRule:
    """The fitted rule.

    Miniature: `StyleRule(("hm",), np.array([0, 0, 0, 0, 0, -1.5])).log_odds("Hm.")` is −1.5.
    """

    words: tuple[str, ...]  # by frequency
    coefficients: np.ndarray  # [F] log-odds per unit of each feature

    def log_odds(self, answer: str) -> float:
        """Of an answer before another one, up to a constant."""
        return float(style_features(answer, self.words) @ self.coefficients)


def style_features(answer: str, words: Sequence[str]) -> np.ndarray:
    """ln(1 + count) of characters, code blocks, links, paragraphs, words; which of `words` it has. [F]."""
    said = words_of(answer)
    own = set(said)
    layout = text_features("", answer)[:-1]  # the last one reads the question
    return np.array([*layout, np.log1p(len(said)), *(float(word in own) for word in words)])


def frequent_words(answers: Sequence[str]) -> tuple[str, ...]:
    """Words in at least a hundredth of the answers, the most frequent first, `MOST_WORDS` at most."""
    found = Counter(word for answer in answers for word in set(words_of(answer)))
    least = max(LEAST_ANSWERS, LEAST_SHARE * len(answers))
    ranked = sorted(found.items(), key=lambda item: (-item[1], item[0]))
    return tuple(word for word, count in ranked[:MOST_WORDS] if count >= least)


def fit_style(rows: Sequence[Mapping]) -> StyleRule:
    """The rule of the pairs of some rows of `pack/groups`, weighted as the loss weights them.

    Of more than `MOST_QUESTIONS` rows every second, third, … is read.

    Raises:
        ValueError: there is no pair.
    """
    rows = rows[:: -(-len(rows) // MOST_QUESTIONS) or 1]
    texts = [[answer["text"] for answer in row["answers"]] for row in rows]
    words = frequent_words([text for own in texts for text in own])
    differences, weights = [], []
    for row, own in zip(rows, texts, strict=True):
        if row["pairs"]:
            features = np.stack([style_features(text, words) for text in own])
            better, worse = np.array(row["pairs"]).T
            differences.append(features[better] - features[worse])
            weights += row["weights"]
    if not differences:
        raise ValueError("reward: there is no pair to fit the rule on style to")
    rule = fit_rule(np.concatenate(differences), np.array(weights), len(differences))
    return StyleRule(words, rule.coefficients)

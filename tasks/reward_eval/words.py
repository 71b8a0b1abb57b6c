"""The answer-only rule: what the words of an answer give away, whatever was asked.

A Bradley-Terry model on which 1- and 2-grams stand in the answer, fitted to the training pairs as the
logistic rule is. A reward model that does not lead it need not have read the question. N-grams are hashed
into columns (arXiv 0902.2206), so that neither time nor memory grows with the vocabulary.
"""

from __future__ import annotations

import re
from array import array
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from zlib import crc32

import numpy as np
from scipy.optimize import minimize
from scipy.sparse import csr_array

from tasks.reward_eval.rules import training_groups
from tasks.run.text_rule import RIDGE, sigmoid

COLUMNS = 2**18  # n-grams are told apart by their hash modulo this
WORDS_READ = 1000  # of an answer, from its first
QUESTIONS_READ = 20_000  # at a few hundred n-grams an answer some 250 MB
STEPS = 100  # of Newton's method at most; some twenty are taken
SLOPE = 1e-3  # length of the gradient at which it ends, pairs
_WORD = re.compile(r"\w+|[^\w\s]")


def grams(text: str) -> set[str]:
    """The 1- and 2-grams of a text in lower case; a mark is a word. "I say." -> {i, say, ., i say, say .}."""
    words = _WORD.findall(text.lower())[:WORDS_READ]
    return {*words, *map(" ".join, pairwise(words))}


def columns(text: str) -> list[int]:
    """Where the n-grams of a text stand, ascending."""
    return sorted({crc32(gram.encode()) % COLUMNS for gram in grams(text)})


def marked(texts: Iterable[str]) -> csr_array:
    """1 where an n-gram stands in a text, [A, COLUMNS]."""
    places, starts = array("i"), [0]
    for text in texts:
        places.extend(columns(text))
        starts.append(len(places))
    ones = np.ones(len(places), dtype=np.float32)
    return csr_array((ones, np.array(places, dtype=np.int32), starts), shape=(len(starts) - 1, COLUMNS))


@dataclass(frozen=True, slots=True, eq=False)
class WordRule:
    """The fitted rule; an answer's score is the sum of the coefficients of what stands in it.

    Miniature: 10 pairs of 9 questions, coefficients all 0 but +1.2 where "say" stands.
    """

    coefficients: np.ndarray  # [COLUMNS] log-odds
    pairs: int
    questions: int

    def scores(self, texts: Sequence[str]) -> np.ndarray:
        """Scores of answers, [A] log-odds."""
        return marked(texts) @ self.coefficients

    def leading(self, texts: Iterable[str], most: int = 5) -> list[tuple[str, float]]:
        """Those n-grams of some texts that raise a score most, and those that lower it most."""
        known = {gram: self.coefficients[crc32(gram.encode()) % COLUMNS] for t in texts for gram in grams(t)}
        ordered = sorted(known.items(), key=lambda item: (-item[1], item[0]))
        raising, lowering = ([i for i in ordered if sign * i[1] > 0] for sign in (1, -1))
        return [(gram, float(value)) for gram, value in (*raising[:most], *lowering[-most:])]


def fit_words(answers: csr_array, pairs: np.ndarray, weights: np.ndarray, ridge: float = RIDGE) -> np.ndarray:
    """The maximum of Σ w ln σ(c·better − c·worse) − ridge/2 |c|², by Newton's method in a trust region.

    Steps are conjugate gradients (scipy's trust-ncg): no matrix of pairs, none of n-grams by n-grams.

    Args:
        answers: [A, COLUMNS] what stands in each.
        pairs: [P, 2] places in `answers`, the better first.
        weights: [P] w, of each pair.
        ridge: price of a squared coefficient.

    Returns:
        [COLUMNS] c; 0 for what stands in no answer.
    """
    seen, place = np.unique(answers.indices, return_inverse=True)
    own = csr_array((answers.data, place, answers.indptr), shape=(answers.shape[0], len(seen)))
    (better, worse), count = pairs.T, answers.shape[0]

    def led(c: np.ndarray) -> np.ndarray:  # [P] of the better answers over the worse
        said = own @ c
        return said[better] - said[worse]

    def turned(values: np.ndarray) -> np.ndarray:  # the transpose: [P] -> [seen]
        return own.T @ (np.bincount(better, values, count) - np.bincount(worse, values, count))

    def loss(c: np.ndarray) -> tuple[float, np.ndarray]:
        odds = led(c)
        slope = ridge * c - turned(weights * sigmoid(-odds))
        return weights @ np.logaddexp(0, -odds) + ridge / 2 * (c @ c), slope

    def curved(c: np.ndarray, along: np.ndarray) -> np.ndarray:
        doubt = sigmoid(-led(c))
        return ridge * along + turned(weights * doubt * (1 - doubt) * led(along))

    start, options = np.zeros(len(seen)), {"gtol": SLOPE, "maxiter": STEPS}
    whole = np.zeros(COLUMNS)
    whole[seen] = minimize(loss, start, jac=True, hessp=curved, method="trust-ncg", options=options).x
    return whole


def word_rule(path: Path, most_questions: int = QUESTIONS_READ) -> WordRule:
    """The answer-only rule of the training pairs, which are streamed and weighted as the reward model's.

    Args:
        path: pack/groups/reward.parquet.
        most_questions: about how many are read, chosen by hash.

    Raises:
        ValueError: there is no pair.
    """
    pairs, weights, firsts = [], [], [0]

    def texts() -> Iterator[str]:
        for group in training_groups(path, most_questions):
            pairs.append(firsts[-1] + np.array(group["pairs"]))
            weights.extend(group["weights"])
            firsts.append(firsts[-1] + len(group["answers"]))
            yield from (answer["text"] for answer in group["answers"])

    answers = marked(texts())
    if not pairs:
        raise ValueError(f"reward_eval: {path} holds no pair to fit the answer-only rule to")
    together = np.concatenate(pairs)
    return WordRule(fit_words(answers, together, np.array(weights)), len(together), len(pairs))

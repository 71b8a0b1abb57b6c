"""The trivial rules that stand beside a reward model on the same pairs.

"longer", "has code", the logistic rule, the answer-only rule (:mod:`tasks.reward_eval.words`) and, where
styles are known, "better style" see only the text; "earlier" sees the clock, which no reward model should.
The logistic rule is what length, code, links, paragraphs and the question's own words say together: a
Bradley-Terry model on differences of text features, fitted to the training pairs and to nothing held out.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path

import numpy as np
from pyarrow import parquet

from tasks.lm.frozen_style import COUNTED as FEATURES  # noqa: F401  # by their name here
from tasks.lm.frozen_style import text_features

TEXT_RULES = ("longer", "has_code", "logistic", "answer_only", "style")  # see only the text; `earlier` not
RIDGE = 1.0  # half a squared coefficient costs as much as one nat of a pair's likelihood
NEWTON_STEPS = 50
QUESTIONS_READ = 50_000  # five coefficients need no more
COLUMNS = ["site", "question_id", "question", "answers.list.element.text", "pairs", "weights"]  # no tokens


def sigmoid(x: np.ndarray) -> np.ndarray:
    """1 / (1 + e⁻ˣ), without overflow."""
    return np.exp(-np.logaddexp(0, -x))


def fit_logistic(differences: np.ndarray, weights: np.ndarray, ridge: float = RIDGE) -> np.ndarray:
    """Bradley-Terry coefficients: the maximum of Σ w ln σ(c·x) − ridge/2 |c|², by Newton's method from 0.

    There is no intercept, because neither answer of a pair comes first. Newton's steps from 0, where the
    curvature is greatest, need no damping.

    Args:
        differences: [P, F] x, features of the better minus those of the worse answer.
        weights: [P] w, of each pair.
        ridge: price of a squared coefficient; above 0 it keeps those of separable pairs finite.

    Returns:
        [F] c.
    """
    found, price = np.zeros(differences.shape[1]), ridge * np.eye(differences.shape[1])
    for _ in range(NEWTON_STEPS):
        doubt = sigmoid(-(differences @ found))  # [P] what the model gives to the worse answer
        gradient = differences.T @ (weights * doubt) - price @ found
        curvature = (differences.T * (weights * doubt * (1 - doubt))) @ differences + price
        step = np.linalg.solve(curvature, gradient)
        found += step
        if np.abs(step).max() < 1e-10:
            break
    return found


@dataclass(frozen=True, slots=True, eq=False)
class LogisticRule:
    """The fitted rule. Miniature: 3 pairs of 2 questions, standardised [0.4, …], scales [1.3, …]."""

    standardised: np.ndarray  # [F] log-odds per root mean square difference of a feature
    scales: np.ndarray  # [F] root mean square difference in the training pairs, 1 where there is none
    pairs: int
    questions: int

    @property
    def coefficients(self) -> np.ndarray:
        """Log-odds per unit of a feature, [F]."""
        return self.standardised / self.scales


def fit_rule(differences: np.ndarray, weights: np.ndarray, questions: int) -> LogisticRule:
    """The logistic rule of training pairs. Differences [P, F], weights [P]."""
    scales = np.sqrt((differences**2).mean(axis=0))  # about 0: a pair has no first answer
    scales[scales == 0] = 1.0
    standardised = fit_logistic(differences / scales, weights)
    return LogisticRule(standardised, scales, len(differences), questions)


def training_differences(
    path: Path, most_questions: int = QUESTIONS_READ
) -> tuple[np.ndarray, np.ndarray, int]:
    """What the logistic rule learns from: the pairs of the reward model, weighted as its loss weights them.

    The file is streamed. Of more than `most_questions` about that many are read, chosen by hash.

    Args:
        path: pack/groups/reward.parquet.
        most_questions: about how many to read.

    Returns:
        Text features [P, F], better minus worse; the pairs' weights [P]; the number of questions.

    Raises:
        ValueError: there is no pair.
    """
    found, weights, questions = [], [], 0
    for group in training_groups(path, most_questions):
        texts = [answer["text"] for answer in group["answers"]]
        features = np.array([text_features(group["question"], text) for text in texts])
        better, worse = np.array(group["pairs"]).T
        found.append(features[better] - features[worse])
        weights += group["weights"]
        questions += 1
    if not found:
        raise ValueError(f"reward_eval: {path} holds no pair to fit the logistic rule to")
    return np.concatenate(found), np.array(weights), questions


def training_groups(path: Path, most_questions: int) -> Iterator[dict]:
    """Rows of pack/groups with a pair, streamed, without tokens; of more about so many, chosen by hash."""
    file = parquet.ParquetFile(path)
    share = most_questions / max(file.metadata.num_rows, 1)
    for batch in file.iter_batches(512, columns=COLUMNS):
        yield from (group for group in batch.to_pylist() if group["pairs"] and _is_read(group, share))


def _is_read(group: Mapping, share: float) -> bool:
    digest = sha256(f"logistic/{group['site']}/{group['question_id']}".encode()).digest()
    return int.from_bytes(digest[:8], "big") < share * 2**64

"""The trivial rules that stand beside a reward model on the same pairs.

"longer", "has code", the logistic rule, the answer-only rule (:mod:`tasks.reward_eval.words`) and, where
styles are known, "better style" see only the text; "earlier" sees the clock, which no reward model should.
The logistic rule is what length, code, links, paragraphs and the question's own words say together: a
Bradley-Terry model on differences of text features, fitted to the training pairs and to nothing held out.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from hashlib import sha256
from pathlib import Path

import numpy as np
from pyarrow import parquet

from tasks.lm.heads.frozen_style import text_features

TEXT_RULES = ("longer", "has_code", "logistic", "answer_only", "style")  # see only the text; `earlier` not
QUESTIONS_READ = 50_000  # five coefficients need no more
COLUMNS = ["site", "question_id", "question", "answers.list.element.text", "pairs", "weights"]  # no tokens


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

"""Posts that belong together -> questions with scored answers: columns of many questions at a time."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa

from tasks.data.deal import read_bucket
from tasks.data.html import has_words
from tasks.data.schema import ANSWER, KEYS, KNOWN_LATER, SCHEMA, UNSPLIT
from tasks.data.score import answer_score
from tasks.data.shelf import LZ4
from tasks.data.split import fingerprint, marks

MARKS = pa.list_(pa.int64())


@dataclass(frozen=True, slots=True)
class Gather:
    """One bucket's part: its files, `min_answers` and where the questions go, an Arrow file of `UNSPLIT`."""

    files: list[Path]
    min_answers: int
    out: Path


def gather(task: Gather) -> tuple[Path, pa.Table, Counter[str]]:
    """`assemble` from and to files; returns the latter, what decides the splits (`KEYS`) and the drops."""
    questions, drops = assemble(read_bucket(task.files), task.min_answers)
    with pa.ipc.new_file(task.out, UNSPLIT, options=LZ4) as file:
        file.write_table(questions)
    return task.out, questions.select(KEYS.names), drops


def assemble(posts: pa.Table, min_answers: int) -> tuple[pa.Table, Counter[str]]:
    """Score the answers and nest them in their questions; leave out what says nothing.

    Every row that does not end up in the result is counted once in the drops: of several answers with one
    text the first stays, for their votes contradict one another.

    Args:
        posts: from `tasks.data.deal.read_bucket`.
        min_answers: questions with fewer usable answers are dropped.

    Returns:
        Questions of `UNSPLIT` in the order of places, each with its answers by id; and drops by reason.
    """
    is_answer = posts["parent_id"].is_valid().to_numpy()
    asked = np.flatnonzero(~is_answer)
    group = np.cumsum(~is_answer) - 1  # of each post: which question
    broken = posts["text"].is_null().to_numpy()
    texts = [text or "" for text in posts["text"].to_pylist()]
    titles = posts["title"].take(asked).to_pylist()
    wordy = np.array([has_words(text) for text in texts], bool)
    wordy[asked] = [has_words(f"{title} {texts[row]}") for title, row in zip(titles, asked, strict=True)]
    candidate = is_answer & wordy
    first = _first_of_each(group, texts, candidate)

    lost = np.where(broken[asked], 1, np.where(wordy[asked], 0, 2))  # why a question itself cannot stay
    answers = np.bincount(group[first], minlength=len(asked))
    stays = (lost == 0) & (answers >= min_answers)
    drops = Counter()
    reasons = ("question_with_few_answers", "unreadable_html", "empty_question")
    for number, reason in enumerate(reasons):
        drops[reason] += int(np.sum(~stays & (lost == number)))
    read = is_answer & (lost == 0)[group]  # answers that were looked at
    drops["unreadable_html"] += int(np.sum(read & broken))
    drops["empty_answer"] += int(np.sum(read & ~broken & ~wordy))
    drops["identical_answer"] += int(np.sum(read & candidate & ~first))
    drops["answer_of_dropped_question"] += int(np.sum((is_answer & ~read) | (read & first & ~stays[group])))

    table = _nested(posts, asked[stays], np.flatnonzero(first & stays[group]), answers[stays], texts)
    return table, +drops


def _first_of_each(group: np.ndarray, texts: list[str], candidate: np.ndarray) -> np.ndarray:
    """Whether a post is the first candidate of its group with its text."""
    found = candidate.copy()
    rows = np.flatnonzero(candidate)
    lengths = np.array([len(text) for text in texts])[rows]
    _, which, counts = np.unique(
        group[rows] * (lengths.max(initial=0) + 1) + lengths, return_inverse=True, return_counts=True
    )
    seen: set[tuple[int, str]] = set()
    for row in rows[counts[which] > 1].tolist():  # of one length at least; in order
        key = int(group[row]), texts[row]
        found[row] = key not in seen
        seen.add(key)
    return found


def _nested(
    posts: pa.Table, asked: np.ndarray, answered: np.ndarray, counts: np.ndarray, texts: list[str]
) -> pa.Table:
    """Rows of questions and rows of their answers, so many each, as a table of `UNSPLIT`."""
    questions, answers = posts.take(asked), posts.take(answered)
    of_answer = np.repeat(np.arange(len(asked)), counts)  # its question
    accepted = questions["accepted_id"].fill_null(-1).to_numpy()[of_answer] == answers["id"].to_numpy()
    accepted &= questions["accepted_id"].is_valid().to_numpy()[of_answer]
    scores = _scores(answers, accepted)
    columns = {name: answers[name] for name in ("id", "text", "votes", "created", "owner_id", "licence")}
    columns |= {"score": pa.array(scores, pa.int32()), "accepted": pa.array(accepted)}
    columns["style"] = pa.nulls(len(answers), pa.string())
    struct = pa.StructArray.from_arrays(
        [_one(columns[field.name]).cast(field.type) for field in ANSWER], fields=list(ANSWER)
    )
    offsets = np.append(0, np.cumsum(counts)).astype(np.int32)
    titles, bodies = questions["title"].to_pylist(), [texts[row] for row in asked.tolist()]
    both = list(zip(titles, bodies, strict=True))
    found = {
        name: questions[name] for name in ("site", "id", "title", "created", "owner_id", "licence", "tags")
    }
    found |= {
        "text": pa.array(["\n\n".join(part for part in parts if part) for parts in both], pa.string()),
        **{name: pa.nulls(len(asked), SCHEMA.field(name).type) for name in KNOWN_LATER},
        "answers": pa.ListArray.from_arrays(pa.array(offsets), struct),
        "pairs": pa.array(_pairs(of_answer, scores, counts), pa.int32()),
        "marks": pa.array([list(map(fingerprint, found)) for found in marks(both)], MARKS),
    }
    return pa.table([_one(found[field.name]).cast(field.type) for field in UNSPLIT], schema=UNSPLIT)


def _scores(answers: pa.Table, accepted: np.ndarray) -> np.ndarray:
    """The score that a source states, or the published one."""
    votes, which = np.unique(answers["votes"].to_numpy(), return_inverse=True)
    published = np.array([[answer_score(v, yes) for yes in (False, True)] for v in votes.tolist()], np.int64)
    scores = published.reshape(-1, 2)[which, accepted.astype(np.int64)]
    stated = answers["score"].is_valid().to_numpy()
    return np.where(stated, answers["score"].fill_null(0).to_numpy(), scores)


def _pairs(of_answer: np.ndarray, scores: np.ndarray, counts: np.ndarray) -> np.ndarray:
    """How many pairs of each question's answers the score orders strictly: all but those that tie."""
    levels, level = np.unique(scores, return_inverse=True)
    both, ties = np.unique(of_answer * len(levels) + level, return_counts=True)
    tied = np.bincount(both // max(1, len(levels)), weights=ties * (ties - 1) // 2, minlength=len(counts))
    return counts * (counts - 1) // 2 - tied.astype(np.int64)


def _one(column: pa.Array | pa.ChunkedArray) -> pa.Array:
    return column.combine_chunks() if isinstance(column, pa.ChunkedArray) else column

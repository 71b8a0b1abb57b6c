"""Posts that belong together -> questions with scored answers, as Markdown."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from itertools import groupby
from operator import itemgetter

import pyarrow as pa

from tasks.data.html import HTMLError, has_words, to_markdown
from tasks.data.records import Answer, Question
from tasks.data.score import answer_score

Row = dict  # of the columns of `tasks.data.shelf.POSTS`, and `place`, which all posts of a group share


def assemble(posts: pa.Table, min_answers: int) -> tuple[list[Question], Counter[str]]:
    """Convert the texts of whole groups and score the answers.

    Every row that does not end up in the result is counted once in the drops.

    Args:
        posts: from `tasks.data.join.grouped`.
        min_answers: questions with fewer usable answers are dropped.

    Returns:
        Questions in the order of the groups, each with its answers by id; and drops by reason.
    """
    drops: Counter[str] = Counter()
    groups = (list(rows) for _, rows in groupby(posts.to_pylist(), itemgetter("place")))
    found = (_question(rows[0], rows[1:], min_answers, drops) for rows in groups)
    return [question for question in found if question], drops


def _question(post: Row, children: Sequence[Row], min_answers: int, drops: Counter[str]) -> Question | None:
    """The question, or None after counting it and its answers as dropped."""
    answers: list[Answer] = []
    left, reason = len(children), "question_with_few_answers"
    body, broken = _text(post)
    if broken:
        reason = broken
    elif not has_words(f"{post['title']} {body}"):
        reason = "empty_question"
    else:
        answers = list(_answers(post, children, drops))
        left = len(answers)
    if len(answers) < min_answers:
        drops[reason] += 1
        drops["answer_of_dropped_question"] += left
        return None
    return Question(
        site=post["site"], id=post["id"], title=post["title"], body=body, created=post["created"],
        owner_id=post["owner_id"], licence=post["licence"], tags=tuple(post["tags"]), answers=tuple(answers),
    )  # fmt: skip


def _answers(question: Row, children: Sequence[Row], drops: Counter[str]) -> Iterator[Answer]:
    """Usable answers; of several with the same text the first stays: their votes contradict one another."""
    texts: set[str] = set()
    for post in children:
        text, broken = _text(post)
        if broken or not has_words(text) or text in texts:
            drops[broken or ("identical_answer" if text in texts else "empty_answer")] += 1
            continue
        texts.add(text)
        accepted = post["id"] == question["accepted_id"]
        score = answer_score(post["votes"], accepted) if post["score"] is None else post["score"]
        yield Answer(
            id=post["id"], text=text, score=score, votes=post["votes"], accepted=accepted,
            created=post["created"], owner_id=post["owner_id"], licence=post["licence"],
        )  # fmt: skip


def _text(post: Row) -> tuple[str, str]:
    """(Markdown, "") or ("", the reason why there is none)."""
    try:
        return to_markdown(post["text"]) if post["is_html"] else post["text"].strip(), ""
    except HTMLError:
        return "", "unreadable_html"

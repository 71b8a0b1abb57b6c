"""The worst mistakes: the pairs the reward model is most surely wrong about, as a reader can judge them."""

from __future__ import annotations

import re
from collections.abc import Sequence

import numpy as np

from tasks.reward_eval.pairs import HeldOut

SHOWN = 10
QUESTION_CHARACTERS, ANSWER_CHARACTERS = 500, 800  # of each text, at most
_CONTROL = re.compile(
    r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069]"
)  # and what turns text around


def worst_mistakes(held: HeldOut, groups: Sequence[dict], most: int = SHOWN) -> list[dict]:
    """At most `most` wrong pairs, the most negative margin first, at most one per question.

    Args:
        held: what `lay_out` made of `groups`.
        groups: rows of pack/groups, for their texts.
        most: how many.

    Returns:
        question (site/id), text, gap, margin, and `better` and `worse`: id, text, characters, published (the
        score that the dump says), score.
    """
    answers = [answer for group in groups for answer in group["answers"]]
    margins, question_of = held.differences(held.scores), held.question_of
    found: dict[int, dict] = {}
    for place in np.argsort(margins, kind="stable"):
        if margins[place] >= 0 or len(found) == most:
            break
        question, (better, worse) = int(question_of[place]), held.pairs[place]
        if question not in found:
            found[question] = {
                "question": str(held.questions[question]),
                "text": shortened(groups[question]["question"], QUESTION_CHARACTERS),
                "gap": int(held.published[better] - held.published[worse]),
                "margin": float(margins[place]),
                "better": _answer(answers[better], held.scores[better]),
                "worse": _answer(answers[worse], held.scores[worse]),
            }
    return list(found.values())


def _answer(answer: dict, score: float) -> dict:
    return {
        "id": answer["id"],
        "text": shortened(answer["text"], ANSWER_CHARACTERS),
        "characters": answer["characters"],
        "published": answer["score"],
        "score": float(score),
    }


def shortened(text: str, most: int) -> str:
    """At most `most` characters and an ellipsis; without control characters but newlines and tabs."""
    text = _CONTROL.sub("\ufffd", text.replace("\r\n", "\n").replace("\r", "\n")).strip()
    return text if len(text) <= most else text[:most].rstrip() + " …"

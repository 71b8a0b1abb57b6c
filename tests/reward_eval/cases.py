"""Held-out groups made up: what the tests of the report card share."""

from __future__ import annotations

import numpy as np

from tasks.reward_eval.pairs import HeldOut, lay_out
from tasks.run.text_rule import LogisticRule

NO_RULE = LogisticRule(np.zeros(5), np.ones(5), 3, 2)  # cannot tell any two answers


def answer(score: int, text: str = "x", created: int = 1, number: int = 0) -> dict:
    return {
        "id": number,
        "tokens": [5],
        "score": score,
        "characters": len(text),
        "created": f"2020-01-01T00:00:{created:02d}",
        "has_code": "`" in text,
        "text": text,
    }


def group(number: int, answers: list[dict], pairs: list[list[int]], site: str = "s") -> dict:
    return {
        "site": site, "question_id": number, "question": "What is it?", "prompt": [3], "answers": answers,
        "pairs": pairs, "weights": [1.0] * len(pairs),
    }  # fmt: skip


def one_pair_each(*margins: float, better: str = "x", worse: str = "yy", gaps=(1,)) -> tuple[HeldOut, list]:
    """A question per margin of the reward model; the better answer is younger, and shorter unless told."""
    groups = [
        group(n, [answer(gaps[n % len(gaps)], better, 2, 2 * n), answer(0, worse, 1, 2 * n + 1)], [[0, 1]])
        for n in range(len(margins))
    ]
    return lay_out(groups, np.array([[m, 0.0] for m in margins]).ravel()), groups


def drawn(questions: int, seed: int = 0) -> tuple[HeldOut, list]:
    """Random questions of several sites with two to five answers, every pair whose scores differ."""
    draw, groups = np.random.default_rng(seed), []
    for number in range(questions):
        scores = draw.integers(-1, 6, draw.integers(2, 6)).tolist()
        scores[0] = scores[1] + 1
        answers = [
            answer(
                s, "ab `c`\n\n"[: draw.integers(1, 9)] * int(draw.integers(1, 9)), int(draw.integers(4)), n
            )
            for n, s in enumerate(scores)
        ]
        pairs = [[i, j] for i, a in enumerate(scores) for j, b in enumerate(scores) if a > b]
        site = ("a.example", "b.meta.example", "meta.c.example")[number % 3]
        groups.append(group(number, answers, pairs, site))
    count = sum(len(g["answers"]) for g in groups)
    return lay_out(groups, np.round(draw.normal(size=count), 1)), groups

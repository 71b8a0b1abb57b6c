"""Rows by hand, and how full they are."""

import random

import pyarrow as pa

from tasks.pack.encode import DOCUMENTS
from tasks.pack.rows import packed

SCHEMA = pa.schema([field for field in DOCUMENTS if field.name not in ("left_out", "touched")])


def question(number: int, tokens: list[list[int]], held: bool = False) -> dict:
    answers = [10 * number + i for i in range(len(tokens))]
    prompts = [min(1, len(one)) for one in tokens]
    return {"site": f"{number}.example", "tokens": tokens, "prompts": prompts, "answer_ids": answers,
            "is_validation": held}  # fmt: skip


def rows(questions: list[dict], row_tokens: int) -> list[dict]:
    table = pa.Table.from_pylist(questions, schema=SCHEMA)
    return [row for part in packed(table, row_tokens) for row in part.to_pylist()]


def test_by_hand():
    """Sixteen tokens a row, bundles of at most two: longest first, each into the fullest row it fits."""
    questions = [
        question(1, [[11], [12], [13]]),  # bundles of 2 and 1
        question(2, [[2] * 14]),
        question(3, [], held=True),
        question(4, [[4, 4, 4], [5, 6]], held=True),
        question(5, [[7]]),
    ]
    training, more, held = rows(questions, 16)
    assert training == {
        "tokens": [2] * 14 + [11, 12], "lengths": [14, 1, 1], "prompts": [1, 1, 1],
        "sites": ["2.example", "1.example", "1.example"], "answer_ids": [20, 10, 11], "is_validation": False,
    }  # fmt: skip
    assert more == {
        "tokens": [13, 7], "lengths": [1, 1], "prompts": [1, 1], "sites": ["1.example", "5.example"],
        "answer_ids": [12, 50], "is_validation": False,
    }  # fmt: skip
    assert held == {
        "tokens": [4, 4, 4, 5, 6], "lengths": [3, 2], "prompts": [1, 1], "sites": ["4.example"] * 2,
        "answer_ids": [40, 41], "is_validation": True,
    }  # fmt: skip


def test_two_hundred_rows_are_99_percent_full():
    """Lengths as questions and answers have them: few are short, few are long, some fill half a row."""
    draw = random.Random(0)

    def document() -> list[int]:
        return [1] * max(2, min(256, int(draw.lognormvariate(4, 0.7))))

    questions = [question(n, [document() for _ in range(draw.randint(1, 5))]) for n in range(600)]
    found = rows(questions, 512)
    tokens = sum(len(row["tokens"]) for row in found)
    assert len(found) >= 200
    assert tokens == sum(len(one) for q in questions for one in q["tokens"])
    assert tokens / (512 * len(found)) >= 0.99

"""Whatever holds rows is read, and a row's fault has its number."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from datasets import Dataset, DatasetDict

from tasks.training.rows import read_rows, rows_of, token_ids, unpadded
from tasks.training.turns import check_answer, read_turns

ROWS = [{"text": "a", "n": [1, 2]}, {"text": "b", "n": [3]}]


class ByIndex:
    def __len__(self):
        return len(ROWS)

    def __getitem__(self, i):
        return ROWS[i]


def frame():
    import pandas as pd

    return pd.DataFrame(ROWS)


@pytest.mark.parametrize(
    "dataset",
    [
        lambda: ROWS, lambda: tuple(ROWS), lambda: iter(ROWS), lambda: (row for row in ROWS),
        lambda: Dataset.from_list(ROWS), lambda: Dataset.from_list(ROWS).to_iterable_dataset(),
        lambda: {"text": ["a", "b"], "n": [[1, 2], [3]]}, ByIndex, frame,
        lambda: Dataset.from_list(ROWS).with_format("arrow")[:],
    ],
)  # fmt: skip
def test_what_holds_rows(dataset):
    assert [{"text": row["text"], "n": list(row["n"])} for row in rows_of(dataset(), "d")] == ROWS


@pytest.mark.parametrize(
    ("dataset", "message"),
    [
        (None, "d is of type NoneType; a list of rows"),
        ("imdb", "d is the name 'imdb'; read it first"),
        (3, "d is of type int"),
        (DatasetDict(train=Dataset.from_list(ROWS), test=Dataset.from_list(ROWS)),
         r"d is several datasets \(train, test\)"),
        ({"train": ROWS}, r"d is several datasets \(train\)"),
        ({"text": "a"}, "d is one row"),
        ({"text": ["a"], "n": [1, 2]}, "d has columns of different lengths"),
    ],
)  # fmt: skip
def test_what_holds_none(dataset, message):
    with pytest.raises(ValueError, match=message):
        rows_of(dataset, "d")


@pytest.mark.parametrize("error", [KeyError("x"), TypeError("a\nb"), RuntimeError("c"), ValueError("d")])
def test_any_error_has_its_row(error, caplog):
    def read(row, name):
        if row == 2:
            raise error
        return row

    with pytest.raises(ValueError, match=r"^d, row 2: ") as found:
        read_rows([0, 1, 2], "d", read, drops=False)
    assert "\n" not in str(found.value)
    assert read_rows((i for i in range(4)), "d", read, drops=True) == [0, 1, 3]
    assert "1 of 4 rows left out: d, row 2: " in caplog.text


@pytest.mark.parametrize("values", [[5, 6], (5, 6), torch.tensor([5, 6]), np.array([5, 6], np.int32)])
def test_token_ids(values):
    found = token_ids(values, "input_ids")
    assert found == (5, 6) and all(type(i) is int for i in found)


@pytest.mark.parametrize("values", [None, "ab", 3, [[5, 6]], [0.5], torch.tensor(3), {"a": 1}, [None]])
def test_no_token_ids(values):
    with pytest.raises(ValueError, match=r"^input_ids .*wanted"):
        token_ids(values, "input_ids")


@pytest.mark.parametrize(
    ("mask", "left"), [(None, 4), ([1, 1, 0, 0], 2), ([0, 1, 1, 1], 3), ([0, 1, 1, 0], 2)]
)
def test_padding_is_taken_off(mask, left):
    assert len((5, 6, 7, 8)[unpadded((5, 6, 7, 8), mask)]) == left


@pytest.mark.parametrize("mask", [[1, 0, 1, 1], [0, 0, 0, 0], [1, 1]])
def test_a_mask_that_is_no_padding(mask):
    with pytest.raises(ValueError, match="attention_mask"):
        unpadded((5, 6, 7, 8), mask)


def test_turns():
    user, answer = {"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}
    assert read_turns([{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}], "x") == [user, answer]
    assert read_turns(answer, "x") == [answer]
    check_answer([user, answer], "x")
    for turns, alone in (([answer, user], False), ([answer, user, answer], True)):
        with pytest.raises(ValueError, match="the user; only the assistant's is learnt"):
            check_answer(turns, "x", alone)
    for turn in ("hi", {"text": "a"}, {"role": "user", "content": None}, {"role": "user", "content": [{}]},
                 {"from": "nobody", "value": "a"}):  # fmt: skip
        with pytest.raises(ValueError, match=r"^x\[0\]"):
            read_turns([turn], "x")

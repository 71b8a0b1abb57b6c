"""Reading a dataset row by row: what cannot teach is refused, or left out and named."""

from __future__ import annotations

import logging
from collections.abc import Callable, Collection
from typing import Any, TypeVar

Row = TypeVar("Row")
_log = logging.getLogger(__name__)


def read_rows(
    dataset: Collection[Any],
    what: str,
    read: Callable[[Any, str], Row],
    drops: bool,
    name_of: Callable[[Any], str] = lambda row: "",
) -> list[Row]:
    """`read(row, name)` of every row.

    Args:
        dataset: a list, a datasets.Dataset.
        what: the dataset's name in messages.
        read: raises ValueError for a row that cannot teach.
        drops: such a row is left out and named in a warning; else it is refused.
        name_of: a row's name in messages; where it is empty, `row <number>`.

    Raises:
        ValueError: a row that cannot teach, by its name; none that can.
    """
    found, wrong = [], []
    for number, row in enumerate(dataset):
        name = name_of(row) or f"row {number}"
        try:
            found.append(read(row, name))
        except ValueError as error:
            wrong.append(f"{what}, {name}: {error}")
            if not drops:
                raise ValueError(wrong[-1]) from error
    if wrong:
        _log.warning("%d of %d rows left out: %s", len(wrong), number + 1, "; ".join(wrong[:5]))
    if not found:
        raise ValueError(f"{what} holds no row to learn from" + "".join(f"; {one}" for one in wrong[:1]))
    return found

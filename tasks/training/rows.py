"""Reading a dataset row by row: what cannot teach is refused, or left out and named."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Mapping
from typing import Any, TypeVar

Row = TypeVar("Row")
_log = logging.getLogger(__name__)
_KINDS = "a list of rows, a datasets.Dataset, an iterable of rows, a dict of columns or a table"


def read_rows(
    dataset: Any,
    what: str,
    read: Callable[[Any, str], Row],
    drops: bool,
    name_of: Callable[[Any], str] = lambda row: "",
) -> list[Row]:
    """`read(row, name)` of every row.

    Args:
        dataset: as :func:`rows_of` takes it.
        what: the dataset's name in messages.
        read: raises for a row that cannot teach; what else it raises (a chat template may raise anything) is
            the row's fault too.
        drops: such a row is left out and named in a warning; else it is refused.
        name_of: a row's name in messages; where it is empty, `row <number>`.

    Raises:
        ValueError: a row that cannot teach, by its name and in one line; none that can.
    """
    found, wrong, count = [], [], 0
    for number, row in enumerate(rows_of(dataset, what)):
        name, count = f"row {number}", number + 1
        try:
            name = name_of(row) or name
            found.append(read(row, name))
        except Exception as error:
            wrong.append(f"{what}, {name}: {_reason(error)}")
            if not drops:
                raise ValueError(wrong[-1]) from error
    if wrong:
        _log.warning("%d of %d rows left out: %s", len(wrong), count, "; ".join(wrong[:5]))
    if not found:
        raise ValueError(f"{what} holds no row to learn from" + "".join(f"; {one}" for one in wrong[:1]))
    return found


def rows_of(dataset: Any, what: str) -> Iterable[Any]:
    """The rows of whatever holds some; what can be read but once is read once, and to its end.

    Args:
        dataset: a list, a datasets.Dataset or IterableDataset, a generator, a torch dataset, a pandas or
            polars frame, an arrow table, or a dict of columns.
        what: its name in messages.

    Raises:
        ValueError: another object, saying what is wanted.
    """
    if is_several(dataset):
        raise ValueError(f"{what} is several datasets ({', '.join(map(str, dataset))}); give one of them")
    if isinstance(dataset, Mapping):
        return _rows_of_columns(dataset, what)
    if hasattr(dataset, "to_pylist"):  # an arrow table
        return dataset.to_pylist()
    if hasattr(dataset, "to_dicts"):  # a polars frame
        return dataset.to_dicts()
    if hasattr(dataset, "to_dict") and hasattr(dataset, "iterrows"):
        return dataset.to_dict("records")
    if isinstance(dataset, str | bytes) or hasattr(dataset, "__fspath__"):
        raise ValueError(f"{what} is the name {str(dataset)!r}; read it first: {_KINDS} is wanted")
    if hasattr(dataset, "__iter__"):
        return dataset
    if hasattr(dataset, "__getitem__") and hasattr(dataset, "__len__"):
        return (dataset[i] for i in range(len(dataset)))
    raise ValueError(f"{what} is of type {type(dataset).__name__}; {_KINDS} is wanted")


def is_several(dataset: Any) -> bool:
    """Whether an object is a dict of datasets, and not one of columns."""
    return isinstance(dataset, Mapping) and bool(dataset) and all(map(_is_dataset, dataset.values()))


def _is_dataset(value: Any) -> bool:
    if isinstance(value, str | bytes | Mapping):
        return False
    if isinstance(value, list | tuple):
        return bool(value) and (isinstance(value[0], Mapping) or hasattr(value[0], "__dataclass_fields__"))
    return any(hasattr(value, name) for name in ("features", "iterrows", "to_pylist", "to_dicts", "__next__"))


def _rows_of_columns(columns: Mapping[str, Any], what: str) -> Iterable[dict[str, Any]]:
    lengths = {name: len(column) for name, column in columns.items() if hasattr(column, "__len__")}
    if len(lengths) < len(columns) or any(isinstance(column, str) for column in columns.values()):
        raise ValueError(f"{what} is one row, or a dict of no columns; {_KINDS} is wanted")
    if len(set(lengths.values())) > 1:
        raise ValueError(f"{what} has columns of different lengths: {lengths}")
    names = list(columns)
    return (dict(zip(names, row, strict=True)) for row in zip(*columns.values(), strict=True))


def check_row(row: Any) -> None:
    """A row that is no record is a mapping.

    Raises:
        ValueError: it is something else.
    """
    if not isinstance(row, Mapping):
        raise ValueError(f"it is of type {type(row).__name__}; a mapping of columns is wanted")


def token_ids(values: Any, name: str) -> tuple[int, ...]:
    """Whole numbers from a list, a numpy array or a tensor, all of one dimension.

    Args:
        values: of one row.
        name: of the column, for messages.

    Raises:
        ValueError: something else.
    """
    if hasattr(values, "tolist"):
        values = values.tolist()
    if isinstance(values, str | bytes | Mapping) or not hasattr(values, "__iter__"):
        raise ValueError(f"{name} is of type {type(values).__name__}; a list of whole numbers is wanted")
    values = tuple(values)
    for value in values:
        if not hasattr(value, "__index__"):
            raise ValueError(f"{name} holds {value!r:.40}; whole numbers are wanted")
    return tuple(int(value) for value in values)


def unpadded(tokens: tuple[int, ...], mask: Any, name: str = "attention_mask") -> slice:
    """The part of a row that is no padding; without a mask all of it.

    Args:
        tokens: of the row, [T].
        mask: [T], 1 for what is read and 0 for padding at either end; None: there is none.
        name: of its column.

    Raises:
        ValueError: it has another length, hides what stands between, or all.
    """
    if mask is None:
        return slice(0, len(tokens))
    read = [i for i, value in enumerate(token_ids(mask, name)) if value]
    if len(mask) != len(tokens):
        raise ValueError(f"{len(mask)} {name} for {len(tokens)} tokens")
    if not read or read[-1] - read[0] + 1 != len(read):
        raise ValueError(f"{name} hides {'all' if not read else 'tokens between others'}")
    return slice(read[0], read[-1] + 1)


def once(said: set[str], message: str, *values: Any) -> None:
    """A warning that is given once by a process; `said` remembers."""
    if message not in said:
        said.add(message)
        _log.warning(message, *values)


def _reason(error: Exception) -> str:
    words = " ".join(str(error).split())
    if isinstance(error, ValueError) and words:
        return words
    return ": ".join(filter(None, (type(error).__name__, words)))

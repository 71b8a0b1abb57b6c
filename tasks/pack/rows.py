"""Documents -> packed rows: bundles of one question's answers, laid into rows best-fit-decreasing."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pyarrow as pa

from tasks.lm.attention.bin_packing import BUNDLES_PER_ROW, best_fit_decreasing, bundle
from tasks.pack.records import ROWS


def packed(questions: pa.Table, row_tokens: int) -> Iterator[pa.Table]:
    """Rows of `ROWS` of the documents of some questions: training rows, then validation rows.

    Documents of one question stand side by side, as many as an eighth of a row takes: sft computes their
    prompt once, and pieces of that size still fill the rows.

    Args:
        questions: `tasks.pack.encode.DOCUMENTS`, without the columns that tell.
        row_tokens: longest row.
    """
    for held in (False, True):
        part = questions.filter(pa.compute.equal(questions["is_validation"], held)).combine_chunks()
        if len(part):
            yield _packed(part, row_tokens, held)


def _packed(questions: pa.Table, row_tokens: int, held: bool) -> pa.Table:
    documents = {name: _flat(questions, name) for name in ("tokens", "prompts", "answer_ids")}
    counts = questions["answer_ids"].combine_chunks().value_lengths().to_numpy()
    lengths = documents["tokens"].value_lengths().to_numpy()
    stops = bundle(lengths, counts, row_tokens // BUNDLES_PER_ROW)
    starts = np.append(0, stops[:-1])
    total = np.append(0, np.cumsum(lengths))
    rows = best_fit_decreasing((total[stops] - total[starts]).tolist(), row_tokens)
    order = np.concatenate([np.arange(starts[i], stops[i]) for row in rows for i in row])
    in_row = np.cumsum([0, *(sum(stops[i] - starts[i] for i in row) for row in rows)])
    sites = (
        questions["site"].combine_chunks().take(pa.array(np.repeat(np.arange(len(counts)), counts)[order]))
    )
    ordered = {name: values.take(pa.array(order)) for name, values in documents.items()}
    first_token = np.append(0, np.cumsum(lengths[order]))[in_row]
    columns = {
        "tokens": _nested(ordered["tokens"].flatten(), first_token),
        "lengths": _nested(pa.array(lengths[order], pa.int32()), in_row),
        "prompts": _nested(ordered["prompts"], in_row),
        "sites": _nested(sites, in_row),
        "answer_ids": _nested(ordered["answer_ids"], in_row),
        "is_validation": pa.repeat(held, len(rows)),
    }
    return pa.table([columns[name] for name in ROWS.names], schema=ROWS)


def _flat(questions: pa.Table, name: str) -> pa.Array:
    return questions[name].combine_chunks().flatten()


def _nested(values: pa.Array, offsets: np.ndarray) -> pa.Array:
    return pa.ListArray.from_arrays(pa.array(offsets, pa.int32()), values)

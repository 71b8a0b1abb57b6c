"""Scores that people gave to responses, from a file."""

from __future__ import annotations

import csv
import io
import json
import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

COLUMNS = ("prompt", "response", "score")


def read_human_scores(path: Path) -> dict[tuple[str, str], float]:
    """(prompt, response), without the white space around them -> the mean of its scores.

    Args:
        path: JSON lines (.jsonl, .json) or CSV (.csv), UTF-8, with COLUMNS; others are ignored.

    Raises:
        ValueError: no such file, another suffix, no row, or a bad one (names file and line).
    """
    found: dict[tuple[str, str], list[float]] = {}
    for where, row in _rows_of(path):
        prompt, response, score = _human_score(where, row)
        found.setdefault((prompt, response), []).append(score)
    if not found:
        raise ValueError(f"{path} holds no scores")
    return {text: math.fsum(scores) / len(scores) for text, scores in found.items()}


def _rows_of(path: Path) -> Iterator[tuple[str, Any]]:
    """`file, line n` and what stands there."""
    if path.suffix not in (".csv", ".jsonl", ".json"):
        raise ValueError(f"{path}: scores are read from .jsonl, .json (lines) and .csv")
    try:
        text = path.read_bytes().decode("utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} cannot be read: {error}") from error
    if path.suffix == ".csv":
        rows = csv.DictReader(io.StringIO(text, newline=""), strict=True)
        try:
            yield from ((f"{path}, line {rows.line_num}", row) for row in rows)
        except csv.Error as error:
            raise ValueError(f"{path}, line {rows.reader.line_num}: {error}") from error
        return
    for number, line in enumerate(text.split("\n"), 1):
        if line.strip():
            try:
                yield f"{path}, line {number}", json.loads(line)
            except ValueError as error:
                raise ValueError(f"{path}, line {number}: not JSON: {error}") from error


def _human_score(where: str, row: Any) -> tuple[str, str, float]:
    if not isinstance(row, Mapping) or any(row.get(name) is None for name in COLUMNS):
        raise ValueError(f"{where}: a row needs {', '.join(COLUMNS)}")
    prompt, response, score = (row[name] for name in COLUMNS)
    if not isinstance(prompt, str) or not isinstance(response, str):
        raise ValueError(f"{where}: prompt and response must be texts")
    try:
        score = float(score)
    except (TypeError, ValueError, OverflowError):
        score = math.nan
    if not math.isfinite(score):
        raise ValueError(f"{where}: the score {row['score']!r:.60} is no finite number")
    return prompt.strip(), response.strip(), score

"""Params -> the complete text of params.yaml, the fields' descriptions as comments; always the same text."""

from __future__ import annotations

from collections.abc import Iterator

import yaml
from pydantic import BaseModel

from params.schema import Params

COMMENT_COLUMN = 34


def render(params: Params, command: str) -> str:
    """Write every number of a run as YAML.

    Args:
        params: the run.
        command: what wrote it, for the first line.

    Returns:
        Text that `params.load.read` reads back as equal params.
    """
    head = [f"# Written by `{command}`.", "# Every number of the run; after edits: `python -m params check`."]
    return "\n".join((*head, *_section(params, 0))) + "\n"


def _section(section: BaseModel, depth: int) -> Iterator[str]:
    for name, field in type(section).model_fields.items():
        value = getattr(section, name)
        if isinstance(value, BaseModel):
            summary = (type(value).__doc__ or "").strip().splitlines()[0]
            yield from ([""] if depth == 0 else [])
            yield _commented(f"{'  ' * depth}{name}:", summary)
            yield from _section(value, depth + 1)
        elif isinstance(value, tuple):
            yield _commented(f"{'  ' * depth}{name}:" + ("" if value else " []"), field.description or "")
            yield from (f"{'  ' * depth}- {_scalar(item)}" for item in value)
        else:
            number = float(value) if field.annotation is float else value  # a default may be written as 5
            yield _commented(f"{'  ' * depth}{name}: {_scalar(number)}", field.description or "")


def _commented(line: str, comment: str) -> str:
    return f"{line:<{COMMENT_COLUMN}}  # {comment}" if comment else line


def _scalar(value: str | int | float | bool) -> str:
    if isinstance(value, float) and "e" in repr(value) and "." not in repr(value):
        return repr(value).replace("e", ".0e")  # YAML 1.1 reads 1e-05 as a string
    return yaml.safe_dump(value, default_flow_style=True, allow_unicode=True, width=10**6).split("\n")[0]

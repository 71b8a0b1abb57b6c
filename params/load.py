"""params.yaml -> Params; every mistake is one line that names the key."""

from __future__ import annotations

import difflib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel, ValidationError

from params.schema import Params


class ParamsError(ValueError):
    """One line that names the file or the key."""


def read(path: Path = Path("params.yaml")) -> Params:
    """Read and validate a complete run.

    Raises:
        ParamsError: the file is missing, no YAML mapping, has a key twice or an unknown one, a value out of
            its bounds, or values that do not go together.
    """
    values = read_mapping(path)
    try:
        return validate(values)
    except ParamsError as error:
        raise ParamsError(f"{path}: {error}") from None


def read_mapping(path: Path) -> dict[str, Any]:
    """The YAML mapping in a file, unvalidated.

    Raises:
        ParamsError: the file is missing, no YAML mapping, or has a key twice.
    """
    try:
        value = _StrictLoader(path.read_text(encoding="utf-8")).get_single_data()
    except FileNotFoundError:
        raise ParamsError(f"{path} is missing; `python -m params use sample` writes it") from None
    except (OSError, UnicodeDecodeError, yaml.YAMLError, RecursionError) as error:
        raise ParamsError(f"{path}: {' '.join(str(error).split())}") from None
    if not isinstance(value or {}, dict):
        raise ParamsError(f"{path}: a mapping is expected, not {type(value).__name__}")
    return value or {}


def validate(values: Mapping[str, Any]) -> Params:
    """Check the whole run.

    Raises:
        ParamsError: for the first mistake, naming its dotted key, with a near miss for an unknown one.
    """
    try:
        params = Params.model_validate(values)
    except ValidationError as error:
        raise ParamsError(_first_line(error)) from None
    if params.data.source == ():
        raise ParamsError("data.source is empty; name dump files: data.source=<path>[,<path> …]")
    return params


def _first_line(error: ValidationError) -> str:
    """The first of pydantic's errors; unknown keys first, because they often cause the others."""
    errors = sorted(error.errors(), key=lambda found: found["type"] != "extra_forbidden")
    first, more = errors[0], len({_key(found["loc"]) for found in errors}) - 1
    return _describe(first) + (f" (and {more} more)" if more else "")


def _describe(found: Mapping[str, Any]) -> str:
    key = _key(found["loc"])
    if found["type"] == "extra_forbidden":
        *section, word = map(str, found["loc"])
        near = difflib.get_close_matches(word, _known(section), n=1)
        return f"{key}: no such key" + (f"; did you mean {'.'.join(section + near)}?" if near else "")
    if found["type"] == "value_error":  # ours: its text names the keys already
        return str(found["ctx"]["error"])
    if key == "data.source":
        return f"data.source: 'sample' or a list of file names is expected, not {found['input']!r}"
    if found["type"] in ("model_type", "model_attributes_type", "dict_type"):
        return f"{key}: a section is expected, not {_short(found['input'])}"
    message = found["msg"][0].lower() + found["msg"][1:]
    return f"{key}: {message}, not {_short(found['input'])}"


def _key(location: Sequence[Any]) -> str:
    """The dotted key; pydantic adds the branch of a union and the index in a list, which are no keys."""
    key: list[str] = []
    for part in location:
        key.append(str(part))
        if not _known(key):
            break
    return ".".join(key)


def _known(location: Sequence[str]) -> list[str]:
    """The keys of the section at that place; none for a value or an unknown place."""
    section: Any = Params
    for part in location:
        field = section.model_fields.get(part)
        section = field.annotation if field else None
        if not (isinstance(section, type) and issubclass(section, BaseModel)):
            return []
    return list(section.model_fields)


def _short(value: Any) -> str:
    text = "a section" if isinstance(value, dict) else repr(value)
    return text if len(text) <= 60 else text[:57] + "…"


class _StrictLoader(yaml.SafeLoader):
    """The safe loader, refusing a key that is given twice (YAML 1.1 would silently take the last)."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: set[str] = set()
        for key in (key for key, _ in node.value if isinstance(key, yaml.ScalarNode)):
            if key.value in seen:
                problem = f"key {key.value!r} is given twice"
                raise yaml.constructor.ConstructorError(None, None, problem, key.start_mark)
            seen.add(key.value)
        return super().construct_mapping(node, deep)

"""params.yaml -> Params; every mistake is one line that names the key."""

from __future__ import annotations

import difflib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel, ValidationError

from params.schema import Params

_ABSENT = object()


class ParamsError(ValueError):
    """One line that names the file or the key."""


def read(path: Path = Path("params.yaml")) -> Params:
    """Read and validate a complete run: a key that is not there would be a number that nobody wrote.

    Raises:
        ParamsError: the file is missing, empty, cut off or no YAML mapping, lacks a key, has one twice or an
            unknown one, a value out of its bounds, or values that do not go together.
    """
    values = read_mapping(path)
    try:
        params = validate(values, is_complete=True)
        _refuse_half_a_line(path)
    except ParamsError as error:
        raise ParamsError(f"{path}: {error}") from None
    return params


def read_preset(path: Path) -> Params:
    """Read and validate a preset, which lists what differs from the schema's defaults.

    Raises:
        ParamsError: as :func:`read`, but for keys that are not there.
    """
    values = read_mapping(path)
    try:
        return validate(values)
    except ParamsError as error:
        raise ParamsError(f"{path}: {error}") from None


def read_mapping(path: Path) -> dict[str, Any]:
    """The YAML mapping in a file, unvalidated.

    Raises:
        ParamsError: the file is missing, empty, no YAML mapping, or has a key twice.
    """
    try:
        value = _StrictLoader(path.read_text(encoding="utf-8")).get_single_data()
    except FileNotFoundError:
        raise ParamsError(f"{path} is missing; `python -m params use sample` writes it") from None
    except (OSError, UnicodeDecodeError, ValueError, yaml.YAMLError, RecursionError) as error:
        raise ParamsError(f"{path}: {' '.join(str(error).split())}") from None
    if value is None:
        raise ParamsError(f"{path} is empty; `python -m params use sample` writes it")
    if not isinstance(value, dict):
        raise ParamsError(f"{path}: a mapping is expected, not {type(value).__name__}")
    return value


def validate(values: Mapping[str, Any], is_complete: bool = False) -> Params:
    """Check the whole run.

    Args:
        values: nested, by key.
        is_complete: whether every key must be there; else the schema's defaults stand for those that are not.

    Raises:
        ParamsError: for the first mistake, naming its dotted key, with a near miss for an unknown one.
    """
    missing = next(_missing(values, Params), None) if is_complete else None
    try:
        params = Params.model_validate(values)
    except ValidationError as error:
        # beside a key that is missing, values are compared with a default that nobody wrote
        found = [each for each in error.errors() if missing is None or _is_of_one_value(each)]
        if found:
            raise ParamsError(_first_line(found)) from None
    if missing is not None:
        raise ParamsError(f"{missing} is missing; `python -m params use <preset>` writes every key")
    if params.data.source == ():
        raise ParamsError("data.source is empty; name dump files: data.source=<path>[,<path> …]")
    return params


def _missing(values: Any, section: type[BaseModel], prefix: str = "") -> Iterator[str]:
    """Dotted keys that the values lack, in the schema's order; an empty section lacks all of its own."""
    for name, field in section.model_fields.items():
        given = values.get(name, _ABSENT) if isinstance(values, Mapping) else _ABSENT
        kind = field.annotation
        if isinstance(kind, type) and issubclass(kind, BaseModel):
            if given in (_ABSENT, None) or isinstance(given, Mapping):  # else it is no section, and told so
                yield from _missing(given, kind, f"{prefix}{name}.")
        elif given is _ABSENT:
            yield prefix + name


def _is_of_one_value(found: Mapping[str, Any]) -> bool:
    """Whether a mistake of pydantic's is one of the value given, and not of several together or of none."""
    return found["type"] != "value_error" and not (found["input"] is None and _known(found["loc"]))


def _refuse_half_a_line(path: Path) -> None:
    """A file that was cut in its last value is complete in its keys."""
    last = path.read_text(encoding="utf-8").rpartition("\n")[2].rstrip()
    if last and "#" not in last and not last.endswith("}"):
        raise ParamsError(f"its last line, {_short(last)}, has no end; was the file cut off?")


def _first_line(found: Sequence[Mapping[str, Any]]) -> str:
    """The first of pydantic's errors; unknown keys first, because they often cause the others."""
    errors = sorted(found, key=lambda one: one["type"] != "extra_forbidden")
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
    if key == "data.eval_sites":
        return f"data.eval_sites: a list of sites is expected, [a.example, b.example], not {found['input']!r}"
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

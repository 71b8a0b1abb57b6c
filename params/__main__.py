"""`python -m params use <preset> [key=value …]` writes params.yaml, `check` reads, `estimate` weighs it."""

from __future__ import annotations

import os
import shlex
import sys
from pathlib import Path
from typing import Any

from params.estimate import describe
from params.links import BASES, HUB, RAW, Link, dump_links, hub_names, model_links, relink
from params.load import ParamsError, read, read_mapping, validate
from params.render import render

PRESETS = Path(__file__).parent / "presets"
PARAMS = Path("params.yaml")
USAGE = (
    "usage: python -m params use <preset> [key=value …] | python -m params check | "
    "python -m params estimate [key=value …]"
)


def main(argv: list[str]) -> int:
    """Run a command; 0, or 1 after one line on stderr."""
    try:
        match argv:
            case ["use", preset, *settings]:
                print(use(preset, settings))
            case ["check"]:
                print(check())
            case ["estimate", *settings]:
                print(describe(read(PARAMS), dict(_setting(text) for text in settings)))
            case _:
                raise ParamsError(f"{USAGE} (presets: {', '.join(presets())})")
    except (ParamsError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


def presets() -> list[str]:
    """Names of the presets."""
    return sorted(path.stem for path in PRESETS.glob("*.yaml"))


def use(preset: str, settings: list[str]) -> str:
    """Write params.yaml from a preset and settings; link the files they name. Nothing changes on a mistake.

    Args:
        preset: a name in params/presets.
        settings: "dotted.key=value"; `data.source` takes paths, `model.base` and `reward.base` a folder or a
            Hub id.

    Returns:
        One line for the user.

    Raises:
        ParamsError: one line that names the key, file or preset.
    """
    if not Path("dvc.yaml").is_file():
        raise ParamsError(f"no dvc.yaml in {Path.cwd()}: run this in the repository's folder")
    if preset not in presets():
        raise ParamsError(f"no preset {preset!r}; there are {', '.join(presets())}")
    values = read_mapping(PRESETS / f"{preset}.yaml")
    given = dict(_setting(text) for text in settings)
    raw = dump_links(given["data.source"]) if given.get("data.source", "sample") != "sample" else []
    bases = {key: _base_links(key, given.get(key, "")) for key in BASES}
    recorded: dict[str, Any] = dict(given)
    if given.get("data.source", "sample") != "sample":
        recorded["data.source"] = [*(link.name for link in raw), *hub_names(given["data.source"])]
    recorded |= {key: str(BASES[key]) for key, found in bases.items() if found}
    for key, value in recorded.items():
        _put(values, key, value)
    params = validate(values)
    relink({RAW: raw, **{BASES[key]: found for key, found in bases.items()}})
    text = render(params, shlex.join(["python", "-m", "params", "use", preset, *_shown(recorded)]))
    _replace(PARAMS, text)
    return f"{PARAMS}: preset {preset}" + (f", {len(raw)} dump file(s) linked into {RAW}" if raw else "")


def check() -> str:
    """Validate params.yaml and that the files it names are there; one line for the user.

    Raises:
        ParamsError: one line that names the key.
    """
    params = read(PARAMS)
    if params.data.source != "sample":
        for name in params.data.source:
            if not name.startswith(HUB) and not (RAW / name).is_file():
                raise ParamsError(f"{PARAMS}: data.source: {RAW / name} is missing or leads nowhere")
    for key, base in (("model.base", params.model.base), ("reward.base", params.reward.base)):
        if base == str(BASES[key]):
            model_links(BASES[key], key)
    return f"{PARAMS}: ok"


def _setting(text: str) -> tuple[str, str]:
    key, equals, value = text.partition("=")
    if not equals or not key:
        raise ParamsError(f"{text!r} is no setting; write key=value")
    if "\n" in text:
        raise ParamsError(f"{key}: a line break is in the value")
    return key, value


def _put(values: dict[str, Any], key: str, value: Any) -> None:
    """Set a dotted key; whether there is such a key is for the schema to say."""
    *sections, last = key.split(".")
    for name in sections:
        inner = values.setdefault(name, {})
        if not isinstance(inner, dict):
            raise ParamsError(f"{key}: {name} is a value, not a section")
        values = inner
    values[last] = value


def _base_links(key: str, base: str) -> list[Link]:
    """Links to the model in a folder; none for a Hub id, which has one slash at most and names no folder."""
    folder = Path(base).expanduser()
    if not base:
        return []
    if folder.is_dir():
        return model_links(folder, key)
    if base.count("/") > 1 or base.startswith((".", "/", "~")):
        raise ParamsError(f"{key}: folder {base} does not exist")
    return []


def _shown(recorded: dict[str, Any]) -> list[str]:
    """The settings as recorded: names in place of paths, which are this machine's own."""
    return [f"{key}={','.join(v) if isinstance(v, list) else v}" for key, v in recorded.items()]


def _replace(path: Path, text: str) -> None:
    """Write beside, make durable, rename: a reader sees the old text or the new, never half of one."""
    new = path.with_name(f".{path.name}.new")
    try:
        with new.open("w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.replace(new, path)
    finally:
        new.unlink(missing_ok=True)


if __name__ == "__main__":
    for stream in filter(None, (sys.stdout, sys.stderr)):  # None where it was closed
        stream.reconfigure(errors="backslashreplace")  # a terminal that has no "…"
    sys.exit(main(sys.argv[1:]))

"""`python -m params use <preset> [key=value …]` writes params.yaml; check, record and estimate read it."""

from __future__ import annotations

import shlex
import sys
from pathlib import Path
from typing import Any

import yaml

from params import inputs
from params.estimate import describe
from params.inputs import BASES, KEYS, RAW, Record, read_record, record_path, record_text
from params.links import Link, dump_links, expanded, hub_names, listed, model_links, recorded_names, relinked
from params.load import ParamsError, read, read_mapping, validate
from params.render import render

PRESETS = Path(__file__).parent / "presets"
PARAMS = Path("params.yaml")
USAGE = (
    "usage: python -m params use <preset> [key=value …] | python -m params check | "
    "python -m params record | python -m params estimate [key=value …]"
)


def main(argv: list[str]) -> int:
    """Run a command; 0, or 1 after one line on stderr."""
    try:
        match argv:
            case ["use", preset, *settings]:
                print(use(preset, settings))
            case ["check"]:
                print(check())
            case ["record"]:
                print(record())
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
    """Write params.yaml from a preset and settings; link and record the files they name.

    On a mistake nothing changes.

    Args:
        preset: a name in params/presets.
        settings: "dotted.key=value"; `data.source` takes paths, `model.base`, `reward.base` and
            `reward.judge_base` a folder or a Hub id; each also takes what is recorded already, whether it is
            here or not. `data.eval_sites` takes names with commas between, as `data.source` does.

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
    given: dict[str, Any] = dict(_setting(text) for text in settings)  # of a key given twice the last counts
    over = [text for text in settings if given[_setting(text)[0]] != _setting(text)[1]]
    earlier = {folder: read_record(Path(), folder) for folder in KEYS}
    links: dict[Path, list[Link]] = {folder: [] for folder in KEYS}
    named: dict[Path, list[str]] = {folder: [] for folder in KEYS}  # recorded already, and meant as recorded
    if (source := given.get("data.source", "sample")) != "sample":
        links[RAW], named[RAW] = dump_links(source, earlier[RAW]), recorded_names(source, earlier[RAW])
        given["data.source"] = sorted({*(link.name for link in links[RAW]), *named[RAW]}) + hub_names(source)
    if "data.eval_sites" in given:
        given["data.eval_sites"] = listed("data.eval_sites", given["data.eval_sites"])
    for key, folder in BASES.items():
        links[folder], named[folder] = _base_links(key, given.get(key, ""), earlier[folder])
        given |= {key: str(folder)} if links[folder] or named[folder] else {}
    for key, value in given.items():
        _put(values, key, value)
    params = validate(values)
    text = render(params, shlex.join(["python", "-m", "params", "use", preset, *_shown(given)]))
    with relinked(links):
        records = {
            folder: _recorded(folder, links[folder], named[folder], earlier[folder]) for folder in KEYS
        }
        inputs.replace_together({**{record_path(f): record_text(records[f]) for f in KEYS}, PARAMS: text})
    told = (_told(folder, links[folder], records[folder] != earlier[folder]) for folder in KEYS)
    last = f", of keys given twice the last counts ({', '.join(over)}: passed over)" if over else ""
    return f"{PARAMS}: preset {preset}{last}" + "".join(told)


def check() -> str:
    """Validate params.yaml, and that the files it names are recorded and, where they are here, unchanged.

    Returns:
        One line for the user, which says what is not on this machine.

    Raises:
        ParamsError: one line that names the key.
    """
    params, absent = read(PARAMS), []
    for folder, key in KEYS.items():
        record = read_record(Path(), folder)
        for name in inputs.names_read(params, folder, record):
            if name not in record:
                raise ParamsError(f"{PARAMS}: {key}: {inputs.unrecorded(Path(), folder, name)}")
            if (folder / name).exists():
                inputs.refuse_another(folder / name, record[name], folder, Path())
            else:
                absent.append(f"{key}: {inputs.missing(Path(), folder, name, record[name])}")
    return "; ".join([f"{PARAMS}: ok", *absent])


def record() -> str:
    """Record the files that params.yaml names as they are now; those that are not here stay as recorded.

    Raises:
        ParamsError: one that is neither here nor recorded.
    """
    params = read(PARAMS)
    texts: dict[Path, str] = {}
    for folder, key in KEYS.items():
        found = read_record(Path(), folder)
        before = record_text(found)
        if inputs.base_of(params, folder) == str(folder) and folder.is_dir():
            found = dict.fromkeys((link.name for link in model_links(folder, key)), inputs.NOTHING)
        for name in inputs.names_read(params, folder, found):
            if (folder / name).exists():
                found[name] = inputs.measure(folder / name, Path())
            elif name not in found:
                raise ParamsError(f"{PARAMS}: {key}: {inputs.unrecorded(Path(), folder, name)}")
        if record_text(found) != before:
            texts[record_path(folder)] = record_text(found)
    inputs.replace_together(texts)
    return "; ".join(f"{path}: written" for path in texts) or "every file is as recorded"


def _recorded(folder: Path, links: list[Link], named: list[str], earlier: Record) -> Record:
    """The record of a folder: what is linked, measured anew, and what is not here, as it was."""
    absent = {name: earlier[name] for name in named if not (folder / name).exists()}
    return absent | {link.name: inputs.measure(folder / link.name, Path()) for link in links}


def _told(folder: Path, links: list[Link], is_new: bool) -> str:
    """What the user hears of a folder of links, and of the files that DVC has of it, when they are others."""
    words = f", {len(links)} file(s) linked into {folder} and recorded in {record_path(folder)}"
    tracked = folder.with_name(f"{folder.name}.dvc")
    old = f"; {tracked} still has the earlier ones: `dvc add --no-relink {folder}`"
    return (words if links else "") + (old if links and is_new and tracked.exists() else "")


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


def _base_links(key: str, base: str, earlier: Record) -> tuple[list[Link], list[str]]:
    """Links to the model in a folder, or the recorded names that `base` stands for; neither for a Hub id.

    A Hub id has one slash at most and names no folder.
    """
    folder = expanded(base)
    if not base:
        return [], []
    if folder.absolute() == BASES[key].absolute():  # however it is written
        here = [name for name in sorted(earlier) if (folder / name).exists()]
        if len(here) < len(earlier):  # a part that is not here is no part of a smaller model
            return [Link(name, (folder / name).resolve()) for name in here], sorted(set(earlier) - set(here))
    if folder.is_dir():
        return model_links(folder, key), []
    if base.count("/") > 1 or base.startswith((".", "/", "~")):
        raise ParamsError(f"{key}: folder {base} does not exist")
    return [], []


def _shown(given: dict[str, Any]) -> list[str]:
    """The settings as recorded: names in place of paths, which are this machine's own."""
    return [f"{key}={_list(value) if isinstance(value, list) else value}" for key, value in given.items()]


def _list(names: list[str]) -> str:
    """Names as `data.source=` takes them: with commas between, or as a YAML list where need be."""
    if any("," in name or name.startswith("[") for name in names):
        return yaml.safe_dump(names, default_flow_style=True, allow_unicode=True, width=10**6).strip()
    return ",".join(names)


if __name__ == "__main__":
    for stream in filter(None, (sys.stdout, sys.stderr)):  # None where it was closed
        stream.reconfigure(errors="backslashreplace")  # a terminal that has no "…"
    sys.exit(main(sys.argv[1:]))

"""What comes from outside, dumps and base models: linked into data/, recorded by md5 where git carries it.

The stages depend on the record (data/raw.json for data/raw), not on the files. So a clone without a dump
knows that `data` is up to date, and a run that does read a file is sure that it is the recorded one. After
`dvc add --no-relink data/raw` the files themselves travel with `dvc push` and `dvc pull`.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable, Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path

from params.load import ParamsError
from params.schema import Params

RAW = Path("data/raw")
BASES = {
    "model.base": Path("data/base"),
    "reward.base": Path("data/reward_base"),
    "reward.judge_base": Path("data/judge_base"),
}
KEYS = {RAW: "data.source"} | {folder: key for key, folder in BASES.items()}
HUB = "hf://datasets/"  # not linked: the data stage streams it
KNOWN_HASHES = Path("scratch/inputs.json")  # of this machine: what was hashed need not be hashed again


@dataclass(frozen=True, slots=True)
class Recorded:
    """A file as it was when it was recorded: ``Recorded("0cc175b9c0f1b6a831c399e269772661", 1)``."""

    md5: str  # 32 hex digits, as DVC has it
    size: int  # bytes


Record = dict[str, Recorded]  # name in the folder -> what stood there
NOTHING = Recorded("", 0)  # of a file that is yet to be measured


def record_path(folder: Path) -> Path:
    """data/raw.json for data/raw."""
    return folder.with_name(f"{folder.name}.json")


def read_record(root: Path, folder: Path) -> Record:
    """The record of a folder; empty where there is none.

    Raises:
        ParamsError: it is no such record.
    """
    path = root / record_path(folder)
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        if any(Path(name).name != name for name in found):
            raise ValueError("a name with a folder in it")
        return {name: Recorded(str(one["md5"]), int(one["size"])) for name, one in found.items()}
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        again = f"`git checkout HEAD {record_path(folder)}` brings it back"
        raise ParamsError(f"{path} is no record of files; {again}") from None


def record_text(record: Record) -> str:
    """The file's text: names sorted, a line each."""
    plain = {name: asdict(record[name]) for name in sorted(record)}
    return json.dumps(plain, indent=2, ensure_ascii=False) + "\n"


def measure(path: Path, home: Path) -> Recorded:
    """Size and md5 of a file, links followed; what has not changed since is not read again.

    Args:
        path: the file.
        home: repository whose scratch/ remembers hashes by place, size and time of change.
    """
    status, place = path.stat(), str(path.resolve())
    now = [status.st_size, status.st_mtime_ns, status.st_ino]
    known = _known_hashes(home)
    if known.get(place, [])[:3] != now:
        with path.open("rb") as file:
            known[place] = [*now, hashlib.file_digest(file, "md5").hexdigest()]
        with suppress(OSError):  # a disk that takes nothing costs a second reading, no more
            replace_together({home / KNOWN_HASHES: json.dumps(known)})
    return Recorded(known[place][3], status.st_size)


def prepare(params: Params, root: Path, home: Path, records: Iterable[Path], reads: bool) -> None:
    """Before a stage: what it reads is there and is what was recorded.

    In a workspace of DVC's own (`dvc exp run --temp`, a queue) files that git does not carry are missing;
    they are linked to those of the repository from which it was made.

    Args:
        params: of the run.
        root: the workspace.
        home: the repository; the same as `root` but in a workspace of DVC's own.
        records: data/*.json among the stage's dependencies.
        reads: whether the stage reads the files; else one that is missing is no mistake.

    Raises:
        ParamsError: a file is not recorded, missing, or another one than was recorded.
    """
    for folder in (folder for folder in KEYS if record_path(folder) in set(records)):
        record = read_record(root, folder)
        for name in names_read(params, folder, record):
            path = root / folder / name
            if name not in record:
                raise ParamsError(f"{KEYS[folder]}: {unrecorded(root, folder, name)}")
            if not path.exists() and (home / folder / name).exists():
                path.parent.mkdir(parents=True, exist_ok=True)
                path.unlink(missing_ok=True)
                os.symlink((home / folder / name).resolve(), path)
            if path.exists():
                refuse_another(path, record[name], folder, home)
            elif reads:
                raise ParamsError(f"{KEYS[folder]}: {missing(root, folder, name, record[name])}")


def refuse_another(path: Path, recorded: Recorded, folder: Path, home: Path) -> None:
    """ParamsError unless the file is the recorded one."""
    found = measure(path, home)
    if found != recorded:
        raise ParamsError(
            f"{KEYS[folder]}: {folder / path.name} is not the file that {record_path(folder)} records (md5 "
            f"{found.md5} instead of {recorded.md5}); `python -m params record` takes it as it is now"
        )


def missing(root: Path, folder: Path, name: str, recorded: Recorded) -> str:
    """Where to get a file that is recorded and not here."""
    tracked = folder.with_name(f"{folder.name}.dvc")
    pull = f"`dvc pull {tracked}`, or " if (root / tracked).exists() else ""
    return (
        f"{folder / name} is not on this machine (recorded: {recorded.size} bytes, md5 {recorded.md5}); "
        f"{pull}`python -m params use … {KEYS[folder]}=<path>` brings it"
    )


def unrecorded(root: Path, folder: Path, name: str) -> str:
    """What to do about a file that the record does not know."""
    if (root / folder / name).exists():
        return f"{folder / name} is not recorded in {record_path(folder)}; `python -m params record` adds it"
    return f"{folder / name} is missing; `python -m params use … {KEYS[folder]}=<path>` links and records it"


def base_of(params: Params, folder: Path) -> str:
    """The base model whose files the folder is for, as params.yaml names it; empty for the dumps' folder."""
    named = {
        "model.base": params.model.base,
        "reward.base": params.reward.base,
        "reward.judge_base": params.reward.judge_base,
    }
    return next((named[key] for key, place in BASES.items() if place == folder), "")


def names_read(params: Params, folder: Path, record: Record) -> list[str]:
    """The files of `folder` that the run reads; ParamsError for a base model here that is not recorded."""
    if folder == RAW:
        source = params.data.source
        return [] if source == "sample" else [name for name in source if not name.startswith(HUB)]
    base = base_of(params, folder)
    if base != str(folder):
        if Path(base).is_dir() and base:
            use = f"`python -m params use … {KEYS[folder]}={base}` adds it"
            raise ParamsError(f"{KEYS[folder]}: {base} is a folder that no record knows; {use}")
        return []
    if not record:
        words = f"{record_path(folder)} records no files; `python -m params record` adds those in {folder}"
        raise ParamsError(f"{KEYS[folder]}: {words}")
    return sorted(record)


def replace_together(texts: Mapping[Path, str]) -> None:
    """Replace files by new texts once all are on the disk: a reader sees an old or a new one, never half."""
    staged = {path: path.with_name(f".{path.name}.{os.getpid()}.new") for path in texts}
    try:
        for path, new in staged.items():
            path.parent.mkdir(parents=True, exist_ok=True)
            with new.open("w", encoding="utf-8") as file:
                file.write(texts[path])
                file.flush()
                os.fsync(file.fileno())
        for path, new in staged.items():
            os.replace(new, path)
    finally:
        for new in staged.values():
            new.unlink(missing_ok=True)


def _known_hashes(home: Path) -> dict[str, list]:
    try:
        found = json.loads((home / KNOWN_HASHES).read_text(encoding="utf-8"))
        return found if isinstance(found, dict) else {}
    except (OSError, ValueError):
        return {}

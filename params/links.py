"""Files from anywhere, to be linked into data/raw (dumps) and data/*base (base models)."""

from __future__ import annotations

import os
import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import yaml

from params.inputs import HUB, RAW
from params.load import ParamsError

DUMP_SUFFIXES = (".7z", ".xz", ".gz", ".bz2", ".xml", ".jsonl", ".json", ".parquet")
# In a folder: the archive of a whole site, Posts alone and preference data; not the other tables of the dump.
# A .json may be anything there; such a file is named.
OTHER_TABLE = re.compile(r"(^|[.-])(Badges|Comments|PostHistory|PostLinks|Tags|Users|Votes)\.", re.IGNORECASE)
POSTS = re.compile(r"(\.7z|(^|[.-])Posts\.xml(\.(xz|gz|bz2))?|\.parquet|\.jsonl(\.(xz|gz|bz2))?)$")
MODEL_SUFFIXES = (".safetensors", ".json", ".txt", ".model", ".jinja")  # no pickles, no code


@dataclass(frozen=True, slots=True)
class Link:
    """`name` is to point to `target`: ``Link("unix.example.7z", Path("/dumps/unix.example.7z"))``."""

    name: str
    target: Path  # absolute


def dump_links(value: str, recorded: Collection[str] = ()) -> list[Link]:
    """The dump files that `data.source=<value>` names.

    Args:
        value: a path, several with commas between or as a YAML list, or a folder of dumps, or of folders with
            a Posts.xml each; names on the Hub are passed over, and recorded ones that are not here.
        recorded: names in data/raw that may stand for themselves.

    Returns:
        Links by name; a file called Posts.xml takes its folder's name: `<folder>.Posts.xml`. A PostLinks file
        beside a Posts file comes with it.

    Raises:
        ParamsError: a path is missing or of no known type, a folder holds no dump, or two files share a name.
    """
    links: dict[str, Link] = {}
    for part in _parts(value):
        if _is_recorded(part, recorded):
            if (RAW / part).exists():
                links[part] = Link(part, (RAW / part).resolve())
            continue
        for path in _dump_files(expanded(part)):
            is_bare = path.name.startswith(("Posts.", "PostLinks."))
            name = _text_name(f"{path.parent.absolute().name}.{path.name}" if is_bare else path.name)
            if name in links:
                raise ParamsError(f"data.source: {links[name].target} and {path} would both be {RAW / name}")
            links[name] = Link(name, path.resolve())
    if not _parts(value, hub=None):
        raise ParamsError("data.source is empty; name dump files: data.source=<path>[,<path> …]")
    return [links[name] for name in sorted(links)]


def expanded(path: str) -> Path:
    """With `~` as the home it stands for; a name may begin so and stand for none."""
    try:
        return Path(path).expanduser()
    except RuntimeError:
        return Path(path)


def recorded_names(value: str, recorded: Collection[str]) -> list[str]:
    """The names in `data.source=<value>` that stand for what is recorded, here or not."""
    return sorted({part for part in _parts(value) if _is_recorded(part, recorded)})


def _is_recorded(part: str, recorded: Collection[str]) -> bool:
    return part in recorded and not expanded(part).exists()


def _text_name(name: str) -> str:
    """A file name that YAML, JSON and git can carry: bytes that are no UTF-8 become %E9."""
    if not name.isprintable() and any(ord(letter) < 32 or ord(letter) == 127 for letter in name):
        raise ParamsError(f"data.source: {name!r} has a control character in its name; rename the file")
    return "".join(f"%{ord(c) - 0xDC00:02X}" if 0xDC80 <= ord(c) <= 0xDCFF else c for c in name)


def model_links(folder: Path, key: str) -> list[Link]:
    """The files of a base model's folder that matter to a run; `key` names it in messages.

    Raises:
        ParamsError: it has no config.json, or no weights in safetensors.
    """
    files = sorted(path for path in folder.iterdir() if path.suffix in MODEL_SUFFIXES and path.is_file())
    if not any(path.suffix == ".safetensors" for path in files):
        raise ParamsError(f"{key}: {folder} has no weights (*.safetensors)")
    if not any(path.name == "config.json" for path in files):
        raise ParamsError(f"{key}: {folder} has no config.json")
    return [Link(path.name, path.resolve()) for path in files if not path.name.startswith(".")]


@contextmanager
def relinked(wanted: Mapping[Path, Sequence[Link]]) -> Iterator[None]:
    """Make the links the only symbolic ones in their folders; real files there are the user's own and stay.

    Args:
        wanted: folder -> its links. When the block raises, the earlier links are back.

    Raises:
        ParamsError: a real file stands where a link to another should be; then nothing is changed.
    """
    for folder, links in wanted.items():
        for path in (folder / link.name for link in links if link.target != (folder / link.name).resolve()):
            if path.exists() and not path.is_symlink():
                raise ParamsError(f"{path} is a file of your own, in the way of a link of that name")
    before = {folder: [Link(p.name, Path(os.readlink(p))) for p in _symlinks(folder)] for folder in wanted}
    try:
        _relink(wanted)
        yield
    except BaseException:
        _relink(before)
        raise


def _relink(wanted: Mapping[Path, Sequence[Link]]) -> None:
    for folder, links in wanted.items():
        folder.mkdir(parents=True, exist_ok=True)
        for path in _symlinks(folder):
            path.unlink()
        for link in links:
            if not os.path.lexists(folder / link.name):  # else it is the file itself
                os.symlink(link.target, folder / link.name)


def _symlinks(folder: Path) -> list[Path]:
    return [path for path in folder.iterdir() if path.is_symlink()] if folder.is_dir() else []


def hub_names(value: str) -> list[str]:
    """The names on the Hub among those that `data.source=<value>` names."""
    return sorted(set(_parts(value, hub=True)))


def listed(key: str, value: str) -> list[str]:
    """The names in a setting: a YAML list, or one name, or several with commas between; blanks too."""
    if not (value.startswith("[") and value.endswith("]")):
        return [part.strip() for part in value.split(",")] if value else []
    try:
        parts = yaml.safe_load(value)
    except yaml.YAMLError:
        parts = None
    if not isinstance(parts, list) or not all(isinstance(part, str) for part in parts):
        raise ParamsError(f"{key}: {value!r} is no list of names")
    return parts


def _parts(value: str, hub: bool | None = False) -> list[str]:
    """The paths (or names on the Hub, or both) in a value: one path, several with commas, or a YAML list."""
    # a comma may be part of a name, and so may brackets
    is_list = value.startswith("[") and value.endswith("]")
    parts = [value] if not is_list and expanded(value).exists() else listed("data.source", value)
    parts = [part.strip() for part in parts if part.strip()]
    return [part for part in parts if hub is None or part.startswith(HUB) is hub]


def _dump_files(path: Path) -> list[Path]:
    """The dump files that a path stands for, each with the PostLinks file beside it."""
    files = _posts_files(path)
    links = [file.with_name(file.name.replace("Posts.", "PostLinks.")) for file in files]
    return [*files, *(link for link in links if link not in files and link.is_file())]


def _posts_files(path: Path) -> list[Path]:
    if path.is_dir():
        shown = [child for child in path.iterdir() if child.name[0] != "."]
        deeper = [file for child in shown if child.is_dir() for file in child.glob("Posts.xml*")]
        inside = sorted(child for child in (*shown, *deeper) if child.is_file())
        files = [file for file in inside if POSTS.search(file.name) and not OTHER_TABLE.search(file.name)]
        if not files:
            raise ParamsError(f"data.source: folder {path} holds no dump (*.7z, *Posts.xml, *Posts.xml.xz …)")
        return files
    if not path.is_file():
        raise ParamsError(f"data.source: {path} does not exist")
    if path.suffix not in DUMP_SUFFIXES:
        raise ParamsError(f"data.source: {path} is of no known type ({', '.join(DUMP_SUFFIXES)})")
    return [path]

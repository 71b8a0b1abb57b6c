"""Which files a run reads, which site each one is, and their bytes, unpacked as they stream by."""

from __future__ import annotations

import bz2
import gzip
import io
import lzma
import re
import zlib
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from pathlib import Path, PurePosixPath
from typing import BinaryIO

import py7zr
from py7zr.io import Py7zIO, WriterFactory

from tasks.data.sniff import refusal

CHUNK_BYTES = 1 << 18
OPENERS: dict[str, Callable[[Path], BinaryIO]] = {
    ".xml": lambda path: path.open("rb"),
    ".xz": lzma.open,
    ".gz": gzip.open,
    ".bz2": bz2.open,
}
SUFFIXES = (*OPENERS, ".7z", ".jsonl", ".json", ".parquet")
HUB = "hf://datasets/"
LINKS = re.compile(r"(^|[.-])PostLinks\.(xml|7z)")
TABLE = re.compile(r"\.(parquet|jsonl?(\.(xz|gz|bz2))?)$")
MEMBERS = {"posts": "Posts.xml", "postlinks": "PostLinks.xml"}

Sink = Callable[[bytes], object]


class DumpError(ValueError):
    """A dump cannot be used; the message is one line that names the file and the place."""


@dataclass(frozen=True, slots=True)
class Source:
    """One site to read: ``Source(Path("data/raw/unix.example.Posts.xml"), "unix.example")``.

    Attributes:
        path: of its posts, or of the archive of all its tables.
        site: host name.
        links: of its PostLinks.xml, where there is one; an archive holds its own.
        hub: `hf://datasets/owner/name[@revision]`, in place of a file.
    """

    path: Path
    site: str
    links: Path | None = None
    hub: str = ""

    @property
    def is_table(self) -> bool:
        """Whether it holds rows of a known shape; else it is a dump."""
        return bool(self.hub or TABLE.search(self.path.name))


def find_sources(names: tuple[str, ...], folder: Path) -> list[Source]:
    """Look up the dump files that data.source names.

    Args:
        names: file names, without folders.
        folder: data/raw.

    Returns:
        One source per name, sorted by site.

    Raises:
        DumpError: no names; a name with a folder in it, of no known type or missing; one site twice.
    """
    if not names:
        raise DumpError("data.source is an empty list: `python -m params use … data.source=<paths>` fills it")
    sources: dict[str, Source] = {}
    links: dict[str, Path] = {}
    for name in names:
        path = folder / name
        if name.startswith(HUB):
            sources[name] = Source(Path(name), name.removeprefix(HUB).partition("@")[0], hub=name)
            continue
        if PurePosixPath(name).name != name:
            raise DumpError(f"data.source: {name!r} must be the name of a file in data/raw, without folders")
        if path.suffix not in SUFFIXES:
            raise DumpError(f"data.source: {name!r} is of no known type ({', '.join(SUFFIXES)})")
        if not path.is_file():
            raise DumpError(f"data.source: {path} is missing; `python -m params use` links and records it")
        site = site_of(path)
        if LINKS.search(name):
            links[site] = path
            continue
        if site in sources:
            raise DumpError(f"data.source: {sources[site].path.name} and {name} are both the site {site}")
        sources[site] = Source(path, site)
    if lonely := sorted(set(links) - set(sources)):
        raise DumpError(f"data.source: {links[lonely[0]].name} belongs to no Posts file of {lonely[0]}")
    return [replace(sources[site], links=links.get(site)) for site in sorted(sources)]


def refuse_other_files(sources: Iterable[Source]) -> None:
    """Look at the first bytes of every file, before the first is read.

    Raises:
        DumpError: one is not what its name says, and what it is: UTF-16, gzip, a Git LFS pointer.
    """
    for source in sources:
        for path in [] if source.hub else filter(None, (source.path, source.links)):
            if words := refusal(path):
                raise DumpError(f"{path}: {words}")


def site_of(path: Path) -> str:
    """The site: unix.example for `unix.example.7z`, `unix.example.Posts.xml.xz`, `unix.example/Posts.xml`."""
    stem = re.sub(r"\.(xml|xz|gz|bz2|7z|jsonl?|parquet)$", "", path.name)
    stem = re.sub(r"\.(xml|jsonl?)$", "", stem)
    stem = re.sub(r"(^|[.-])Post(s|Links)$", "", stem)
    return stem or path.absolute().parent.name


def stream(path: Path, sink: Sink, table: str = "posts") -> None:
    """Hand the bytes of a table to `sink`, chunk by chunk; memory does not grow with the file.

    Args:
        path: the table's own file, or the .7z archive of a whole site.
        sink: takes the bytes.
        table: which member of an archive: "posts" or "postlinks".

    Raises:
        DumpError: the file is damaged, or an archive without Posts.xml. What `sink` raises passes through.
    """
    if path.suffix == ".7z":
        _stream_7z(path, sink, MEMBERS[table])
        return
    with OPENERS[path.suffix](path) as file:
        while chunk := _read(file, path, CHUNK_BYTES):
            sink(chunk)


class unpacked(io.RawIOBase):  # noqa: N801 - used like a function
    """A file whose damage is a DumpError, for io.BufferedReader."""

    def __init__(self, file: BinaryIO, path: Path) -> None:
        self._file, self._path = file, path

    def readable(self) -> bool:
        """Always."""
        return True

    def readinto(self, buffer: memoryview) -> int:
        """Fill the buffer from the front."""
        found = _read(self._file, self._path, len(buffer))
        buffer[: len(found)] = found
        return len(found)


def _read(file: BinaryIO, path: Path, size: int) -> bytes:
    try:
        return file.read(size)
    except (lzma.LZMAError, zlib.error, EOFError, OSError) as error:
        where = f"{path}: damaged or truncated {path.suffix} file, {file.tell():,} bytes unpacked"
        raise DumpError(f"{where}: {error}") from None


def has_links(archive: Path) -> bool:
    """Whether a readable .7z archive has a PostLinks.xml; not every one has."""
    with py7zr.SevenZipFile(archive) as file:
        return sum(PurePosixPath(name).name == MEMBERS["postlinks"] for name in file.getnames()) == 1


def _stream_7z(path: Path, sink: Sink, member: str) -> None:
    """Unpack the one member of that name; none is ever written to disk, so no other name in it matters."""
    out = _ToSink(sink)
    try:
        # A file object, not a path: py7zr then stays in this thread, and the sink's errors come back as such.
        with path.open("rb") as file, py7zr.SevenZipFile(file) as archive:
            members = [name for name in archive.getnames() if PurePosixPath(name).name == member]
            if len(members) != 1:
                names = ", ".join(sorted(archive.getnames())[:9])
                raise DumpError(f"{path}: {len(members) or 'no'} {member} among its members ({names})")
            archive.extract(targets=members, factory=out)
    except Exception as error:  # py7zr meets a damaged header with whatever Python raises on the way
        if error is out.error or isinstance(error, DumpError):
            raise
        words = " ".join(f"{type(error).__name__} {error}".split())
        raise DumpError(f"{path}: damaged, truncated or encrypted .7z file: {words}") from None


class _ToSink(WriterFactory, Py7zIO):
    """py7zr's idea of a file to write to; it hands on what it gets."""

    def __init__(self, sink: Sink) -> None:
        self.error: Exception | None = None  # what the sink raised, which is no fault of the archive
        self._sink = sink
        self._size = 0

    def create(self, filename: str) -> Py7zIO:
        return self

    def write(self, s: bytes | bytearray) -> int:
        try:
            for start in range(0, len(s), CHUNK_BYTES):
                self._sink(bytes(s[start : start + CHUNK_BYTES]))
        except Exception as error:
            self.error = error
            raise
        self._size += len(s)
        return len(s)

    def size(self) -> int:
        return self._size

    def read(self, size: int | None = None) -> bytes:
        return b""

    def seek(self, offset: int, whence: int = 0) -> int:
        return 0

    def flush(self) -> None:
        """Nothing is kept back."""

"""A dump cut into blocks of whole rows, so that several processes can parse it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from tasks.data.progress import Progress
from tasks.data.sources import DumpError, Source, stream

BLOCK_BYTES = 4_000_000
LONGEST_ROW = 64_000_000
PROBE_BYTES = 65_536
ROW = b"<row"


@dataclass(frozen=True, slots=True)
class Span:
    """Bytes of a file, from `start` up to `stop`: ``Span(Path("a.Posts.xml"), 21, 42)``."""

    path: Path
    start: int
    stop: int

    def read(self) -> bytes:
        """Them."""
        with self.path.open("rb") as file:
            file.seek(self.start)
            return file.read(self.stop - self.start)


@dataclass(frozen=True, slots=True)
class Block:
    r"""A run of whole rows: their bytes, or where in a file they are.

    Worked miniature: of `<posts><row Id="1"/>\n<row Id="2"/></posts>`, cut in two, the second is
    ``Block(b'<row Id="2"/></posts>', "posts", is_first=False, is_last=True)``.
    """

    content: bytes | Span
    table: str
    is_first: bool
    is_last: bool


def cut(source: Source, table: str, emit: Callable[[Block], object]) -> None:
    """Cut a table into blocks, and tell of the progress.

    Raises:
        DumpError: the file is damaged, or an archive without that table.
    """
    progress = Progress(f"reading {table} of {source.site}")
    if source.path.suffix == ".xml":  # whoever parses a block reads it, too
        for block in _spans(source.path, table):
            emit(block)
            progress.add(block.content.stop - block.content.start)
        progress.done()
        return
    cutter = _Cutter(source.path, table, emit)

    def feed(chunk: bytes) -> None:
        cutter.feed(chunk)
        progress.add(len(chunk))

    stream(source.path, feed, table)
    cutter.close()
    progress.done()


class _Cutter:
    """Takes the bytes of a file, hands on blocks. A cut is made where `<row` stands: no value has a `<`.

    (A comment with `<row` in it would be refused as not well-formed; dumps have none.)
    """

    def __init__(self, path: Path, table: str, emit: Callable[[Block], object]) -> None:
        self._path, self._table, self._emit = path, table, emit
        self._waiting: list[bytes] = []
        self._size = 0
        self._is_first = True

    def feed(self, chunk: bytes) -> None:
        """The next bytes.

        Raises:
            DumpError: no row begins within `LONGEST_ROW` bytes.
        """
        self._waiting.append(chunk)
        self._size += len(chunk)
        if self._size < BLOCK_BYTES:
            return
        content = b"".join(self._waiting)
        cut = content.rfind(ROW, 1)
        if cut > 0:
            self._hand_on(content[:cut], is_last=False)
            content = content[cut:]
        elif self._size > LONGEST_ROW:
            raise DumpError(f"{self._path}: no dump of {self._table}: {self._size:,} bytes without a <row>")
        self._waiting, self._size = [content], len(content)

    def close(self) -> None:
        """The file ends here."""
        self._hand_on(b"".join(self._waiting), is_last=True)

    def _hand_on(self, content: bytes, is_last: bool) -> None:
        self._emit(Block(content, self._table, self._is_first, is_last))
        self._is_first = False


def _spans(path: Path, table: str) -> Iterator[Block]:
    """A plain file, cut as `_Cutter` cuts it; only the borders are looked at."""
    size, start = path.stat().st_size, 0
    with path.open("rb") as file:
        while size - start > BLOCK_BYTES:
            stop = _row_after(file, start + BLOCK_BYTES, start + LONGEST_ROW)
            if stop is None:
                break
            yield Block(Span(path, start, stop), table, start == 0, is_last=False)
            start = stop
    if size - start > LONGEST_ROW:
        raise DumpError(f"{path}: no dump of {table}: {LONGEST_ROW:,} bytes without a <row>")
    yield Block(Span(path, start, size), table, start == 0, is_last=True)


def _row_after(file: BinaryIO, place: int, end: int) -> int | None:
    """Where the first row after a place begins; None where none does before the file's or the given end."""
    file.seek(place)
    window = b""
    while place < end and (chunk := file.read(PROBE_BYTES)):
        window = window[-len(ROW) + 1 :] + chunk
        found = window.find(ROW)
        if found >= 0:
            return place + len(chunk) - len(window) + found
        place += len(chunk)
    return None

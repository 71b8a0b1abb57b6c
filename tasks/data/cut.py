"""A dump cut into blocks of whole rows, so that several processes can parse it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from tasks.data import damage
from tasks.data.progress import Progress
from tasks.data.sniff import HEAD_BYTES, declared_encoding, what_is
from tasks.data.sources import DumpError, Source, stream

BLOCK_BYTES = 4_000_000
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

    Attributes:
        content: the bytes, or where they are.
        table: name of the root element.
        is_first: whether it begins with the file.
        is_last: whether it ends with the file.
        too_long: rows of more than `LONGEST_ROW` bytes right before it, which are left out.
        encoding: that the file declares, where that is not UTF-8.
    """

    content: bytes | Span
    table: str
    is_first: bool
    is_last: bool
    too_long: int = 0
    encoding: str = ""


def cut(source: Source, table: str, emit: Callable[[Block], object]) -> None:
    """Cut a table into blocks, and tell of the progress.

    Raises:
        DumpError: the file is damaged, an archive without that table, or holds no XML.
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

    A row of more than `LONGEST_ROW` bytes, from its `<row` to the next one or the end, is left out.
    (Where a comment has a `<row` in it and a cut is made there, that row is read and the one before it lost.)
    """

    def __init__(self, path: Path, table: str, emit: Callable[[Block], object]) -> None:
        self._path, self._table, self._emit = path, table, emit
        self._waiting: list[bytes] = []
        self._size = 0
        self._is_first = True
        self._skips = False  # whether a row is being left out
        self._too_long = 0  # since the last block
        self._encoding = ""

    def feed(self, chunk: bytes) -> None:
        """The next bytes.

        Raises:
            DumpError: no row begins within `LONGEST_ROW` bytes.
        """
        self._waiting.append(chunk)
        self._size += len(chunk)
        if self._size < BLOCK_BYTES:
            return
        content = self._without_long_row(b"".join(self._waiting))
        cut = content.rfind(ROW, 1)
        if cut > 0 and not self._skips:
            self._hand_on(content[:cut], is_last=False)
            content = content[cut:]
        self._waiting, self._size = [content], len(content)

    def close(self) -> None:
        """The file ends here."""
        content = self._without_long_row(b"".join(self._waiting))
        if self._skips:
            content = _end_of(content, self._table)
        self._hand_on(content, is_last=True)

    def _without_long_row(self, content: bytes) -> bytes:
        """Without the row at the front if it is too long, or what is left of such a one."""
        if not self._skips:
            if len(content) <= damage.LONGEST_ROW:
                return content
            stop = content.find(ROW, 1)
            if (stop if stop > 0 else len(content)) <= damage.LONGEST_ROW:
                return content
            if not content.startswith(ROW):
                raise _no_rows(self._path, self._table, content, len(content))
            self._too_long += 1
            content = content[len(ROW) :]
        stop = content.find(ROW)
        self._skips = stop < 0
        return content[-PROBE_BYTES:] if self._skips else content[stop:]

    def _hand_on(self, content: bytes, is_last: bool) -> None:
        if self._is_first:
            self._encoding = _encoding_of(self._path, content)
        self._emit(Block(content, self._table, self._is_first, is_last, self._too_long, self._encoding))
        self._is_first, self._too_long = False, 0


def _encoding_of(path: Path, content: bytes) -> str:
    """What a file that begins like that declares.

    Raises:
        DumpError: it begins like no text.
    """
    head = content[:HEAD_BYTES]
    if found := what_is(head):
        raise DumpError(f"{path}: {'is' if path.suffix == '.xml' else 'its content is'} {found}; no dump")
    return declared_encoding(head)


def _no_rows(path: Path, table: str, head: bytes, size: int) -> DumpError:
    _encoding_of(path, head)  # raises where that is why
    return DumpError(f"{path}: no dump of {table}: {size:,} bytes without a <row>")


def _end_of(content: bytes, table: str) -> bytes:
    """The root's end among the last bytes of a file, which belong to a row that is left out."""
    place = content.rfind(f"</{table}".encode())
    return content[place:] if place >= 0 else b""


def _spans(path: Path, table: str) -> Iterator[Block]:
    """A plain file, cut as `_Cutter` cuts it; only the borders are looked at."""
    size, start, too_long = path.stat().st_size, 0, 0
    with path.open("rb") as file:
        head = file.read(HEAD_BYTES)
        encoding = _encoding_of(path, head)
        while size - start > BLOCK_BYTES:
            stop = _row_after(file, start + BLOCK_BYTES, start + damage.LONGEST_ROW)
            if stop is None or stop - start > damage.LONGEST_ROW:
                last = _last_row(file, start, start + BLOCK_BYTES)
                if last is None:
                    raise _no_rows(path, table, head, damage.LONGEST_ROW)
                stop = _row_after(file, start + BLOCK_BYTES, size)
                if (stop or size) - last > damage.LONGEST_ROW:
                    if last > start:
                        yield Block(Span(path, start, last), table, start == 0, False, too_long, encoding)
                        too_long = 0
                    too_long += 1
                    start = stop or _end_place(file, max(last + 1, size - PROBE_BYTES), size, table)
                    continue
                if stop is None:
                    break
            yield Block(Span(path, start, stop), table, start == 0, False, too_long, encoding)
            start, too_long = stop, 0
    yield Block(Span(path, start, size), table, start == 0, True, too_long, encoding)


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


def _last_row(file: BinaryIO, start: int, stop: int) -> int | None:
    """Where the last row that begins between two places does so."""
    file.seek(start)
    found = file.read(stop - start + len(ROW) - 1).rfind(ROW)
    return start + found if found >= 0 else None


def _end_place(file: BinaryIO, start: int, size: int, table: str) -> int:
    file.seek(start)
    return size - len(_end_of(file.read(), table))

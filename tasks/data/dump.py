"""Rows of a dump table, `<posts><row Id="1" …/>…</posts>`: each block is parsed by lxml on its own."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping

from lxml import etree

from tasks.data.cut import Block, cut
from tasks.data.sources import DumpError, Source

LINES = re.compile(r",? line \d+(, column \d+)?")  # of the block, not of the file

Row = Mapping[str, str]


class BlockError(Exception):
    """A block that cannot be read: args are the rows of it that can, and what is wrong after them."""


def rows_of(block: Block) -> list[Row]:
    """The attributes of each row of a block.

    Raises:
        BlockError: not well-formed UTF-8 XML, a DOCTYPE, another table.
    """
    target = _Table(block.table)
    # 'internal', because with False libxml2 hands a target `&#38;` for `&amp;`. It opens no door:
    # entities are declared in a DOCTYPE, which `_Table.doctype` refuses before it is read.
    parser = etree.XMLParser(
        target=target, encoding="utf-8", resolve_entities="internal",
        no_network=True, load_dtd=False, dtd_validation=False, huge_tree=False,
    )  # fmt: skip
    try:
        if not block.is_first:
            parser.feed(f"<{block.table}>".encode())
        parser.feed(block.content if isinstance(block.content, bytes) else block.content.read())
        if not block.is_last:
            parser.feed(f"</{block.table}>".encode())
        parser.close()
    except etree.XMLSyntaxError as error:
        words = " ".join(LINES.sub("", error.msg or "empty file").split())
        raise BlockError(len(target.rows), f"not a well-formed UTF-8 dump ({words})") from None
    return target.rows


def read_rows(source: Source, table: str, on_row: Callable[[Row], object]) -> int:
    """Call `on_row` with the attributes of every row, in order; memory does not grow with the file.

    Args:
        source: the file.
        table: name of the root element, for instance "postlinks".
        on_row: called once per row; the mapping is its own to keep.

    Returns:
        The number of rows, at least one in "posts".

    Raises:
        DumpError: the file is damaged, not well-formed UTF-8 XML, declares a DOCTYPE, or is no such table.
    """
    count = 0

    def take(block: Block) -> None:
        nonlocal count
        try:
            rows = rows_of(block)
        except BlockError as error:
            raise refused(source, count, error) from None
        count += len(rows)
        for row in rows:
            on_row(row)

    cut(source, table, take)
    refuse_empty(source, table, count)
    return count


def refused(source: Source, rows: int, error: BlockError) -> DumpError:
    """The error of a block that comes after so many rows, for users."""
    more, what = error.args
    return DumpError(f"{source.path}: row {rows + more + 1}: {what}")


def refuse_empty(source: Source, table: str, rows: int) -> None:
    """Posts there must be; nobody need have linked anything."""
    if not rows and table == "posts":
        raise DumpError(f"{source.path}: <{table}> without a single <row>")


class _Table:
    """What the parser calls."""

    def __init__(self, table: str) -> None:
        self.rows: list[Row] = []
        self._table = table
        self._depth = 0

    def start(self, tag: str, attributes: Row) -> None:
        if self._depth == 1 and tag == "row":  # all but a few
            self.rows.append(attributes)
        elif self._depth or tag != self._table:
            wanted = (self._table, "row", "/row")[min(self._depth, 2)]
            raise BlockError(len(self.rows), f"no dump of {self._table}: <{tag}> instead of <{wanted}>")
        self._depth += 1

    def end(self, tag: str) -> None:
        self._depth -= 1

    def doctype(self, name: str, public_id: str | None, system_id: str | None) -> None:
        raise BlockError(0, f"declares a DOCTYPE ({name}); dumps have none, and it is refused")

    def close(self) -> None:
        """The rows stay where they are."""

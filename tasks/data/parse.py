"""`<posts><row Id="1" …/>…</posts>`, whole or a part of it, by lxml: no entities, no DOCTYPE, no files."""

from __future__ import annotations

import re
from collections.abc import Mapping

from lxml import etree

LINES = re.compile(r",? line \d+(, column \d+)?")  # of the block, not of the file

Row = Mapping[str, str]


class BlockError(Exception):
    """A block that cannot be read: args are the rows of it that can, and what is wrong after them."""


def parse(content: bytes, table: str, is_first: bool, is_last: bool) -> list[Row]:
    """The attributes of each row.

    Args:
        content: part of a dump.
        table: name of the root element.
        is_first: it begins with the root's start; else that is put before it.
        is_last: it ends with the root's end; else that is put after it.

    Raises:
        BlockError: not well-formed UTF-8 XML, a DOCTYPE, another table.
    """
    target = _Table(table)
    # 'internal', because with False libxml2 hands a target `&#38;` for `&amp;`. It opens no door:
    # entities are declared in a DOCTYPE, which `_Table.doctype` refuses before it is read.
    parser = etree.XMLParser(
        target=target, encoding="utf-8", resolve_entities="internal",
        no_network=True, load_dtd=False, dtd_validation=False, huge_tree=False,
    )  # fmt: skip
    try:
        if not is_first:
            parser.feed(f"<{table}>".encode())
        parser.feed(content)
        if not is_last:
            parser.feed(f"</{table}>".encode())
        parser.close()
    except etree.XMLSyntaxError as error:
        words = " ".join(LINES.sub("", error.msg or "empty file").split())
        raise BlockError(len(target.rows), f"not a well-formed UTF-8 dump ({words})") from None
    return target.rows


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

"""A dump table, as a stream of rows: `<posts><row Id="1" …/>…</posts>`, by lxml, in constant memory."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from lxml import etree

from tasks.data.progress import Progress
from tasks.data.sources import DumpError, Source, stream


def read_rows(source: Source, table: str, on_row: Callable[[Mapping[str, str]], None]) -> int:
    """Call `on_row` with the attributes of every row, in order.

    Args:
        source: the file.
        table: name of the root element, for instance "posts".
        on_row: called once per row; the mapping is its own to keep.

    Returns:
        The number of rows, at least one in "posts".

    Raises:
        DumpError: the file is damaged, not well-formed UTF-8 XML, declares a DOCTYPE, or is no such table.
    """
    target = _Table(source, table, on_row)
    progress = Progress(f"reading {table} of {source.site}")
    # 'internal', because with False libxml2 hands a target `&#38;` for `&amp;`. It opens no door: entities
    # are declared in a DOCTYPE, and `_Table.doctype` refuses that before its first declaration is read.
    parser = etree.XMLParser(
        target=target, encoding="utf-8", resolve_entities="internal",
        no_network=True, load_dtd=False, dtd_validation=False, huge_tree=False,
    )  # fmt: skip

    def feed(chunk: bytes) -> None:
        parser.feed(chunk)
        progress.add(len(chunk), target.rows)

    try:
        stream(source.path, feed, table)
        parser.close()
    except etree.XMLSyntaxError as error:
        raise DumpError(_not_xml(source, target.rows, error)) from None
    if not target.rows and table == "posts":  # nobody need have linked anything
        raise DumpError(f"{source.path}: <{table}> without a single <row>")
    progress.done(target.rows)
    return target.rows


def _not_xml(source: Source, rows: int, error: etree.XMLSyntaxError) -> str:
    message = " ".join((error.msg or "empty file").split())
    return f"{source.path}: row {rows + 1}: not a well-formed UTF-8 dump ({message})"


class _Table:
    """What the parser calls; it keeps nothing."""

    def __init__(self, source: Source, table: str, on_row: Callable[[Mapping[str, str]], None]) -> None:
        self.rows = 0
        self._path, self._table, self._on_row = source.path, table, on_row
        self._depth = 0

    def start(self, tag: str, attributes: Mapping[str, str]) -> None:
        wanted = (self._table, "row", "/row")[min(self._depth, 2)]
        if tag != wanted:
            place = f"{self._path}: row {self.rows + 1}"
            raise DumpError(f"{place}: no dump of {self._table}: <{tag}> instead of <{wanted}>")
        if self._depth == 1:
            self.rows += 1
            self._on_row(dict(attributes))
        self._depth += 1

    def end(self, tag: str) -> None:
        self._depth -= 1

    def doctype(self, name: str, public_id: str | None, system_id: str | None) -> None:
        raise DumpError(f"{self._path}: declares a DOCTYPE ({name}); dumps have none, and it is refused")

    def close(self) -> None:
        """Nothing was kept."""

"""Rows of a dump table, `<posts><row Id="1" …/>…</posts>`: each block is parsed by lxml on its own."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from tasks.data.cut import Block, cut
from tasks.data.damage import TOO_LONG, Damage, long_row
from tasks.data.parse import BlockError, Row, parse
from tasks.data.repair import repair
from tasks.data.sources import DumpError, Source

__all__ = ["BlockError", "Row", "Rows", "read_blocks", "read_rows", "refuse_empty", "refused", "rows_of"]


@dataclass(frozen=True, slots=True)
class Rows:
    """The rows of a block that can be read, the place of each among all of the block, and what was lost."""

    rows: list[Row]
    places: Sequence[int]
    damage: Damage


def rows_of(block: Block) -> Rows:
    """The attributes of each row of a block; one that does not parse is repaired row by row.

    Raises:
        BlockError: it is in another encoding or truncated, declares a DOCTYPE, or is another table.
    """
    content = block.content if isinstance(block.content, bytes) else block.content.read()
    try:
        rows, damage = parse(content, block.table, block.is_first, block.is_last), Damage()
        places: Sequence[int] = range(len(rows))
    except BlockError:
        (rows, places), damage = repair(content, block.table, block.is_first, block.is_last, block.encoding)
    if not block.too_long:
        return Rows(rows, places, damage)
    before = Damage()
    for number in range(block.too_long):
        before.drop(TOO_LONG, number + 1, long_row())
    before.add(damage, block.too_long)
    return Rows(rows, [place + block.too_long for place in places], before)


def read_rows(
    source: Source, table: str, on_row: Callable[[Row], object], damage: Damage | None = None
) -> int:
    """Call `on_row` with the attributes of every row, in order; memory does not grow with the file.

    Args:
        source: the file.
        table: name of the root element, for instance "postlinks".
        on_row: called once per row that can be read; the mapping is its own to keep.
        damage: gets what was lost.

    Returns:
        The number of rows that could be read, at least one in "posts".

    Raises:
        DumpError: the file is damaged, no UTF-8 XML, declares a DOCTYPE, is no such table, or none of its
            rows can be read.
    """
    count = 0

    def take(found: Rows, before: int) -> None:
        nonlocal count
        count += len(found.rows)
        for row in found.rows:
            on_row(row)

    lost = Damage() if damage is None else damage
    read_blocks(source, table, take, lost)
    refuse_empty(source, table, count, lost)
    return count


def read_blocks(source: Source, table: str, on_rows: Callable[[Rows, int], object], damage: Damage) -> None:
    """Call `on_rows` with the rows of every block, and how many rows came before it; `damage` grows.

    Raises:
        DumpError: a block cannot be read, see `rows_of`.
    """
    before = 0

    def take(block: Block) -> None:
        nonlocal before
        try:
            found = rows_of(block)
        except BlockError as error:
            raise refused(source, before, error) from None
        count = len(found.rows) + found.damage.drops.total()
        damage.add(found.damage, before)
        on_rows(found, before)
        before += count

    cut(source, table, take)


def refused(source: Source, rows: int, error: BlockError) -> DumpError:
    """The error of a block that comes after so many rows, for users."""
    more, what = error.args
    return DumpError(f"{source.path}: row {rows + more + 1}: {what}")


def refuse_empty(source: Source, table: str, rows: int, damage: Damage) -> None:
    """Posts there must be; nobody need have linked anything. But where rows are, some can be read."""
    lost = damage.drops.total()
    if not rows and lost:
        raise DumpError(f"{source.path}: none of its {lost:,} rows can be read; {damage.earliest()}")
    if not rows and table == "posts":
        raise DumpError(f"{source.path}: <{table}> without a single <row>")

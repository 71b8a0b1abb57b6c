"""Rows of Posts.xml -> questions and answers as the dump has them, still HTML; all else is counted."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import pyarrow as pa
import pyarrow.compute as pc

from tasks.data.cut import Block, cut
from tasks.data.damage import Damage
from tasks.data.dump import BlockError, Row, Rows, read_blocks, refuse_empty, refused, rows_of
from tasks.data.parallel import Crew
from tasks.data.shelf import ANSWER, POSTS, QUESTION, Book, Shelf, write_book
from tasks.data.sources import Source, has_links

LINK = ("PostId", "RelatedPostId", "LinkTypeId")
DUPLICATE = 3  # LinkTypeId
POST_TYPES = {"1": QUESTION, "2": ANSWER}  # 3 to 8 are wiki pages, tag excerpts, nominations and the like
# By date, for dumps older than the column ContentLicense.
LICENCES = (("2011-04-08", "CC BY-SA 2.5"), ("2018-05-02", "CC BY-SA 3.0"))
NEWEST_LICENCE = "CC BY-SA 4.0"
TIME = r"^[0-9]{4}-[0-9]{2}-[0-9]{2}T[0-9]{2}:[0-9]{2}:[0-9]{2}(\.[0-9]+)?$"
NUMBER = r"^-?[0-9]{1,18}$"  # fits int64; int() would take "1_0" and Arabic digits
MAX_VOTES = 2**31 - 1
TAG = re.compile(r"[^<>|]+")  # <a><b> until 2023, |a|b| since


def read_dump(source: Source, shelf: Shelf, crew: Crew) -> set[str]:
    """Put every row of a site's dump on the shelf, and the duplicates that its PostLinks names.

    Returns:
        The one site.

    Raises:
        DumpError: see `tasks.data.dump.read_rows`.
    """
    shelf.site = source.site
    before, damage = shelf.rows, Damage()

    def take(book: Book | BlockError) -> None:
        rows = shelf.rows - before + damage.drops.total()
        if isinstance(book, BlockError):
            raise refused(source, rows, book)
        damage.add(book.damage, rows)
        shelf.take(book)

    queue = crew.queue(_read, take)

    def put(block: Block) -> None:
        if not block.is_first:
            crew.start()
        queue.put(_Task(block, source.site, shelf.next_path()))

    cut(source, "posts", put)
    queue.close()
    refuse_empty(source, "posts", shelf.rows - before, damage)
    shelf.lose(source.path, damage)
    links = source.links
    if not links and source.path.suffix == ".7z" and has_links(source.path):
        links = source.path
    if links:
        _read_links(replace(source, path=links), shelf)
    return {source.site}


@dataclass(frozen=True, slots=True)
class _Task:
    block: Block
    site: str
    path: Path


def _read(task: _Task) -> Book | BlockError:
    """A block's posts, written where the task says; an error is returned, for it is raised in its turn."""
    try:
        found = rows_of(task.block)
    except BlockError as error:
        return error
    posts = posts_of(found.rows, task.site)
    _note_unreadable(found, posts)
    return write_book(posts, found.damage, task.path)


def _note_unreadable(found: Rows, posts: pa.Table) -> None:
    """Tell of the rows without an Id, which are left out, and of the first that will be for other reasons."""
    kept = range(len(found.rows))
    if len(posts) < len(found.rows):
        has_id = integers([row.get("Id") for row in found.rows]).is_valid().to_pylist()
        for place in (place for place in kept if not has_id[place]):
            words = _lacks(found.rows[place], ("Id",))
            found.damage.drop("row_without_id", found.places[place] + 1, words)
        kept = [place for place in kept if has_id[place]]
    kinds = integers([row.get("PostTypeId") for row in found.rows])
    if kinds.null_count:
        place = pc.index(kinds.is_valid(), False).as_py()
        words = _lacks(found.rows[place], ("PostTypeId",))
        found.damage.note("other_post_type", found.places[place] + 1, words)
    unreadable = pc.index(posts["what"], "unreadable_row").as_py()
    if unreadable >= 0:
        place = kept[unreadable]
        words = _lacks(found.rows[place], ("Score", "CreationDate", "ParentId"))
        found.damage.note("unreadable_row", found.places[place] + 1, words)


def _lacks(row: Row, names: Sequence[str]) -> str:
    """Which of its attributes cannot be read: "no readable Score ('many'); it has Id, PostTypeId, Score"."""
    wrong = [name for name in names if not _is_readable(name, row)]
    values = ", ".join(f"{name} ({row[name][:40]!r})" if name in row else name for name in wrong)
    return f"no readable {values}; it has {', '.join(row) or 'no attribute'}"


def _is_readable(name: str, row: Row) -> bool:
    if name == "CreationDate":
        return re.search(TIME, row.get(name, "")) is not None
    number = integers([row.get(name)])[0].as_py()
    if name == "ParentId" and POST_TYPES.get(row.get("PostTypeId", "")) != ANSWER:
        return True
    return number is not None and (name != "Score" or abs(number) <= MAX_VOTES)


def _read_links(source: Source, shelf: Shelf) -> None:
    """Put the duplicates that a PostLinks names on the shelf.

    Raises:
        DumpError: see `tasks.data.dump.read_blocks`; or none of its rows can be read.
    """
    damage, good = Damage(), 0

    def take(found: Rows, before: int) -> None:
        nonlocal good
        columns = [integers([row.get(name) for row in found.rows]).to_pylist() for name in LINK]
        for place, row, post, related, kind in zip(found.places, found.rows, *columns, strict=True):
            if post is None or related is None or kind is None:
                damage.drop("unreadable_link", before + place + 1, _lacks(row, LINK))
                continue
            good += 1
            if kind == DUPLICATE:
                shelf.add_link(post, related)

    read_blocks(source, "postlinks", take, damage)
    refuse_empty(source, "postlinks", good, damage)
    shelf.link_damage[source.path] = damage


def posts_of(rows: list[Row], site: str) -> pa.Table:
    """Rows as a table of `POSTS`; those without an Id are left out.

    `what` is "question" or "answer"; "other_post_type"; or "unreadable_row", where Score, CreationDate or an
    answer's ParentId is none. Of the last two only the id matters.
    """
    names = ("PostTypeId", "CreationDate", "ParentId", "AcceptedAnswerId", "OwnerUserId", "Score", "Id")
    raw = {name: pa.array([row.get(name) for row in rows], pa.string()) for name in names}
    kind = pc.index_in(raw["PostTypeId"], value_set=pa.array(list(POST_TYPES)))
    is_answer = pc.fill_null(pc.equal(kind, 1), False)
    votes, parent = integers(raw["Score"]), integers(raw["ParentId"])
    created = pc.fill_null(raw["CreationDate"], "")
    readable = pc.and_(
        pc.fill_null(pc.less_equal(pc.abs(votes), MAX_VOTES), False),
        pc.and_(pc.match_substring_regex(created, TIME), pc.or_(pc.invert(is_answer), parent.is_valid())),
    )
    what = pc.choose(kind, *POST_TYPES.values())
    what = pc.fill_null(pc.if_else(readable, what, pc.if_else(kind.is_valid(), "unreadable_row", None)),
                        "other_post_type")  # fmt: skip
    usable = pc.and_(kind.is_valid(), readable)
    texts = [
        row.get("Body", "") if kept else None for row, kept in zip(rows, usable.to_pylist(), strict=True)
    ]
    asked = pc.and_(usable, pc.invert(is_answer)).to_pylist()
    tags = [TAG.findall(row.get("Tags", "")) if asks else [] for row, asks in zip(rows, asked, strict=True)]
    licences = [row.get("ContentLicense") or None for row in rows]
    columns = {
        "site": pa.repeat(site, len(rows)),
        "id": integers(raw["Id"]),
        "what": what,
        "parent_id": pc.if_else(is_answer, parent, None),
        "accepted_id": pc.if_else(is_answer, None, integers(raw["AcceptedAnswerId"])),
        "votes": pc.if_else(usable, votes, None).cast(pa.int32()),
        "score": pa.nulls(len(rows), pa.int32()),
        "title": pa.array([" ".join(row.get("Title", "").split()) for row in rows], pa.string()),
        "text": pa.array(texts, pa.string()),
        "is_html": pa.repeat(True, len(rows)),
        "tags": pa.array(tags, pa.list_(pa.string())),
        "created": created,
        "owner_id": integers(raw["OwnerUserId"]),
        "licence": pc.coalesce(pa.array(licences, pa.string()), licence_of(created)),
    }
    table = pa.table([columns[name] for name in POSTS.names], schema=POSTS)
    return table.filter(table["id"].is_valid()) if table["id"].null_count else table


def licence_of(created: pa.Array) -> pa.Array:
    """The licences under which Stack Exchange published posts at those times."""
    found: pa.Array | str = NEWEST_LICENCE
    for until, name in reversed(LICENCES):
        found = pc.if_else(pc.less(created, until), name, found)
    return found


def integers(texts: pa.Array | list[str | None]) -> pa.Array:
    """Plain decimal numbers; null for anything else."""
    array = pa.array(texts, pa.string()) if isinstance(texts, list) else texts
    return pc.if_else(pc.match_substring_regex(array, NUMBER), array, None).cast(pa.int64())

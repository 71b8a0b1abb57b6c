"""Rows of Posts.xml -> questions and answers as the dump has them, still HTML; all else is counted."""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from pathlib import Path

import pyarrow as pa
import pyarrow.compute as pc

from tasks.data.cut import Block, cut
from tasks.data.dump import BlockError, Row, read_rows, refuse_empty, refused, rows_of
from tasks.data.parallel import Crew
from tasks.data.shelf import ANSWER, POSTS, QUESTION, Book, Shelf, write_book
from tasks.data.sources import Source, has_links

DUPLICATE = "3"  # LinkTypeId
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
    before = shelf.rows

    def take(book: Book | BlockError) -> None:
        if isinstance(book, BlockError):
            raise refused(source, shelf.rows - before, book)
        shelf.take(book)

    queue = crew.queue(_read, take)

    def put(block: Block) -> None:
        if not block.is_first:
            crew.start()
        queue.put(_Task(block, source.site, shelf.next_path()))

    cut(source, "posts", put)
    queue.close()
    refuse_empty(source, "posts", shelf.rows - before)
    links = source.links
    if not links and source.path.suffix == ".7z" and has_links(source.path):
        links = source.path
    if links:
        read_rows(replace(source, path=links), "postlinks", lambda row: _link(row, shelf))
    return {source.site}


@dataclass(frozen=True, slots=True)
class _Task:
    block: Block
    site: str
    path: Path


def _read(task: _Task) -> Book | BlockError:
    """A block's posts, written where the task says; an error is returned, for it is raised in its turn."""
    try:
        rows = rows_of(task.block)
    except BlockError as error:
        return error
    return write_book(posts_of(rows, task.site), len(rows), task.path)


def _link(row: Row, shelf: Shelf) -> None:
    post, related = integers([row.get("PostId"), row.get("RelatedPostId")]).to_pylist()
    if row.get("LinkTypeId") == DUPLICATE and post is not None and related is not None:
        shelf.add_link(post, related)


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

"""Rows of Posts.xml -> questions and answers as the dump has them, still HTML; all else is counted."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import replace

from tasks.data.dump import read_rows
from tasks.data.records import Post
from tasks.data.shelf import Shelf
from tasks.data.sources import Source, has_links

DUPLICATE = "3"  # LinkTypeId
QUESTION, ANSWER = "1", "2"  # PostTypeId; 3 to 8 are wiki pages, tag excerpts, nominations and the like
# By date, for dumps older than the column ContentLicense.
LICENCES = (("2011-04-08", "CC BY-SA 2.5"), ("2018-05-02", "CC BY-SA 3.0"))
NEWEST_LICENCE = "CC BY-SA 4.0"
TIME = re.compile(r"[0-9]{4}-[0-9]{2}-[0-9]{2}T[0-9]{2}:[0-9]{2}:[0-9]{2}(\.[0-9]+)?")
MAX_DIGITS = 18  # fits int64
NUMBER = re.compile(rf"-?[0-9]{{1,{MAX_DIGITS}}}")
MAX_VOTES = 2**31 - 1
TAG = re.compile(r"[^<>|]+")  # <a><b> until 2023, |a|b| since


def read_dump(source: Source, shelf: Shelf) -> set[str]:
    """Put every row of a site's dump on the shelf, and the duplicates that its PostLinks names.

    Returns:
        The one site.

    Raises:
        DumpError: see `tasks.data.dump.read_rows`.
    """
    shelf.site = source.site

    def take(row: Mapping[str, str]) -> None:
        number = integer(row.get("Id"))
        if number is None:
            shelf.add_drop("row_without_id")
        elif row.get("PostTypeId") not in (QUESTION, ANSWER):
            shelf.add_other(number, "other_post_type")
        elif (post := post_of(number, row)) is None:
            shelf.add_other(number, "unreadable_row")
        else:
            shelf.add(post)

    def link(row: Mapping[str, str]) -> None:
        post, related = integer(row.get("PostId")), integer(row.get("RelatedPostId"))
        if row.get("LinkTypeId") == DUPLICATE and post is not None and related is not None:
            shelf.add_link(post, related)

    read_rows(source, "posts", take)
    links = source.links
    if not links and source.path.suffix == ".7z" and has_links(source.path):
        links = source.path
    if links:
        read_rows(replace(source, path=links), "postlinks", link)
    return {source.site}


def post_of(number: int, row: Mapping[str, str]) -> Post | None:
    """A question's or an answer's row as a Post; None where its score, time or parent cannot be read."""
    is_answer = row.get("PostTypeId") == ANSWER
    votes, parent = integer(row.get("Score")), integer(row.get("ParentId"))
    created = row.get("CreationDate", "")
    if votes is None or abs(votes) > MAX_VOTES or not TIME.fullmatch(created):
        return None
    if is_answer and parent is None:
        return None
    return Post(
        id=number,
        parent_id=parent if is_answer else None,
        accepted_id=None if is_answer else integer(row.get("AcceptedAnswerId")),
        votes=votes,
        title=" ".join(row.get("Title", "").split()),
        text=row.get("Body", ""),
        tags=() if is_answer else tuple(TAG.findall(row.get("Tags", ""))),
        created=created,
        owner_id=integer(row.get("OwnerUserId")),
        licence=row.get("ContentLicense") or licence_of(created),
    )


def licence_of(created: str) -> str:
    """The licence under which Stack Exchange published posts at that time."""
    return next((name for until, name in LICENCES if created < until), NEWEST_LICENCE)


def integer(text: str | None) -> int | None:
    """A plain decimal number; None for anything else (int() would take "1_0" and Arabic digits)."""
    if text is None:
        return None
    if text.isdigit() and text.isascii() and len(text) <= MAX_DIGITS:  # nearly all, and faster than NUMBER
        return int(text)
    return int(text) if NUMBER.fullmatch(text) else None

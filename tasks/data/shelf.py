"""Posts on disk, as they come: a Parquet file with the texts, so that memory does not grow with the dump."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from types import TracebackType

import pyarrow as pa
import pyarrow.parquet as pq

from tasks.data.records import Post

CHARACTERS_PER_GROUP = 8_000_000
QUESTION, ANSWER = "question", "answer"  # of the column `what`; else the reason why the row is dropped
POSTS = pa.schema(
    [
        ("row", pa.int64()),  # running number over all sites
        ("site", pa.string()),
        ("id", pa.int64()),
        ("what", pa.string()),
        ("parent_id", pa.int64()),
        ("accepted_id", pa.int64()),
        ("votes", pa.int32()),
        ("score", pa.int32()),
        ("title", pa.string()),
        ("text", pa.string()),
        ("is_html", pa.bool_()),
        ("tags", pa.list_(pa.string())),
        ("created", pa.string()),
        ("owner_id", pa.int64()),
        ("licence", pa.string()),
    ]
)
LINKS = pa.schema([("site", pa.string()), ("a", pa.int64()), ("b", pa.int64())])
_OTHER = (None, None, None, None, None, None, None, None, None, None, None)


class Shelf:
    """Takes posts in any order; a context, after which `posts` and `links` can be read.

    Attributes:
        posts: Parquet file of `POSTS`.
        folder: theirs, with room for more.
        links: Parquet file of `LINKS`: questions a and b of a site are duplicates.
        site: whose posts come next.
        rows: taken so far, dropped ones included.
        characters: of all texts.
        drops: rows without an id, by reason; all others are on the shelf.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.posts, self.links = folder / "posts.parquet", folder / "links.parquet"
        self.site = ""
        self.rows = self.characters = 0
        self.drops: Counter[str] = Counter()
        self._rows: list[tuple] = []
        self._waiting = 0
        self._linked: list[tuple] = []

    def __enter__(self) -> Shelf:
        # texts repeat too rarely for a dictionary, which costs as much as all the rest
        self._posts = pq.ParquetWriter(self.posts, POSTS, compression="lz4", use_dictionary=["site", "what"])
        self._links = pq.ParquetWriter(self.links, LINKS, compression="lz4")
        return self

    def __exit__(self, *error: type[BaseException] | BaseException | TracebackType | None) -> None:
        self._flush()
        self._posts.close()
        self._links.close()

    def add(self, post: Post) -> None:
        """A question or an answer of `site`."""
        what = QUESTION if post.parent_id is None else ANSWER
        self._put(
            (self.rows, self.site, post.id, what, post.parent_id, post.accepted_id, post.votes, post.score,
             post.title, post.text, post.is_html, post.tags, post.created, post.owner_id, post.licence)
        )  # fmt: skip
        self.characters += len(post.text)
        self._waiting += len(post.text)
        if self._waiting > CHARACTERS_PER_GROUP:
            self._flush()

    def add_other(self, number: int, reason: str) -> None:
        """A row with an id that will be dropped for `reason`; a later row with its id is a duplicate."""
        self._put((self.rows, self.site, number, reason, *_OTHER))

    def add_drop(self, reason: str) -> None:
        """A row without an id."""
        self.drops[reason] += 1
        self.rows += 1

    def add_link(self, a: int, b: int) -> None:
        """Questions a and b of `site` ask the same."""
        self._linked.append((self.site, a, b))

    def _put(self, row: tuple) -> None:
        self._rows.append(row)
        self.rows += 1
        if len(self._rows) > 50_000:
            self._flush()

    def _flush(self) -> None:
        for writer, schema, rows in (
            (self._posts, POSTS, self._rows),
            (self._links, LINKS, self._linked),
        ):
            if rows:
                columns = [pa.array(c, f.type) for c, f in zip(zip(*rows, strict=True), schema, strict=True)]
                writer.write_table(pa.Table.from_arrays(columns, schema=schema))
        self._rows, self._linked, self._waiting = [], [], 0

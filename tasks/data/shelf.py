"""Posts on disk, as they come: books of them and a list of all; memory does not grow with the dump."""

from __future__ import annotations

from collections import Counter
from dataclasses import asdict, dataclass
from pathlib import Path
from types import TracebackType

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from tasks.data.records import Post

CHARACTERS_PER_BOOK = 8_000_000
QUESTION, ANSWER = "question", "answer"
POSTS = pa.schema(
    [
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
LISTED = ("site", "id", "what", "parent_id")
WHAT = (QUESTION, ANSWER, "other_post_type", "unreadable_row")  # else the reason why the row is dropped
LIST = pa.schema(  # numbers alone: a hash table of names would take three times the memory
    [
        ("row", pa.int64()),  # running number
        ("site", pa.int32()),  # place in `Shelf.sites`
        ("id", pa.int64()),
        ("what", pa.int8()),  # place in WHAT
        ("parent_id", pa.int64()),
    ]
)
LINKS = pa.schema([("site", pa.string()), ("a", pa.int64()), ("b", pa.int64())])
LZ4 = pa.ipc.IpcWriteOptions(compression="lz4")


@dataclass(frozen=True, slots=True)
class Book:
    """What a shelf knows of some posts: ``Book(Path("work/000007.arrow"), table, 3, 1_200_000)``.

    Attributes:
        path: Arrow file of `POSTS`.
        listed: its columns `LISTED`.
        without_id: rows that are not in it.
        characters: of its texts.
    """

    path: Path
    listed: pa.Table
    without_id: int
    characters: int


def write_book(posts: pa.Table, rows: int, path: Path) -> Book:
    """Write posts of `POSTS`, which come from so many rows."""
    with pa.ipc.new_file(path, POSTS, options=LZ4) as file:
        file.write_table(posts)
    characters = pc.sum(pc.utf8_length(posts["text"])).as_py() or 0
    return Book(path, posts.select(LISTED), rows - len(posts), characters)


class Shelf:
    """Takes posts in any order; a context, after which `posts`, `links` and the books can be read.

    Attributes:
        posts: Parquet file of `LIST`: all posts.
        books: where the posts are, and the numbers of those in each.
        folder: theirs, with room for more.
        links: Parquet file of `LINKS`: questions a and b of a site are duplicates.
        sites: all so far.
        site: whose posts come next.
        rows: taken so far, dropped ones included.
        characters: of all texts.
        drops: rows without an id, by reason; all others are on the shelf.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.posts, self.links = folder / "posts.parquet", folder / "links.parquet"
        self.books: list[tuple[Path, range]] = []
        self.sites: list[str] = []
        self.site = ""
        self.rows = self.characters = 0
        self.drops: Counter[str] = Counter()
        self._paths = self._listed = 0
        self._waiting: list[dict] = []
        self._size = 0
        self._linked: list[dict] = []

    def __enter__(self) -> Shelf:
        self._posts = pq.ParquetWriter(self.posts, LIST, compression="lz4")
        self._links = pq.ParquetWriter(self.links, LINKS, compression="lz4")
        return self

    def __exit__(self, *error: type[BaseException] | BaseException | TracebackType | None) -> None:
        self.flush()
        self._posts.close()
        self._links.close()

    def next_path(self) -> Path:
        """Where a book may be written that `take` will get."""
        self._paths += 1
        return self.folder / f"{self._paths:06}.arrow"

    def take(self, book: Book) -> None:
        """A book, after all that came before it."""
        posts, count = book.listed, len(book.listed)
        numbers = range(self._listed, self._listed + count)
        self.sites += [site for site in pc.unique(posts["site"]).to_pylist() if site not in self.sites]
        columns = {
            "row": pa.array(np.arange(numbers.start, numbers.stop)),
            "site": pc.index_in(posts["site"], value_set=pa.array(self.sites, pa.string())),
            "id": posts["id"],
            "what": pc.index_in(posts["what"], value_set=pa.array(WHAT)).cast(pa.int8()),
            "parent_id": posts["parent_id"],
        }
        self._posts.write_table(pa.table(columns, schema=LIST))
        self.books.append((book.path, numbers))
        self._listed += count
        self.rows += count + book.without_id
        self.characters += book.characters
        if book.without_id:
            self.drops["row_without_id"] += book.without_id

    def add(self, post: Post) -> None:
        """A question or an answer of `site`."""
        what = QUESTION if post.parent_id is None else ANSWER
        self._waiting.append({"site": self.site, "what": what, **asdict(post)})
        self._size += len(post.text)
        if self._size > CHARACTERS_PER_BOOK:
            self.flush()

    def add_drop(self, reason: str) -> None:
        """A row that cannot be read."""
        self.drops[reason] += 1
        self.rows += 1

    def add_link(self, a: int, b: int) -> None:
        """Questions a and b of `site` ask the same."""
        self._linked.append({"site": self.site, "a": a, "b": b})
        if len(self._linked) == 50_000:
            self.flush()

    def flush(self) -> None:
        """Write what was added; to be called before `take`."""
        if self._waiting:
            posts = pa.Table.from_pylist(self._waiting, schema=POSTS)
            self.take(write_book(posts, len(posts), self.next_path()))
        self._links.write_table(pa.Table.from_pylist(self._linked, schema=LINKS))
        self._waiting, self._linked, self._size = [], [], 0

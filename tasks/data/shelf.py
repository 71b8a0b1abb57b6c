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

from tasks.data.damage import Damage, total
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
    """What a shelf knows of some posts: ``Book(Path("work/000007.arrow"), table, 1_200_000, Damage())``.

    Attributes:
        path: Arrow file of `POSTS`.
        listed: its columns `LISTED`.
        characters: of its texts.
        damage: what was lost of the rows that it was made of.
    """

    path: Path
    listed: pa.Table
    characters: int
    damage: Damage


def write_book(posts: pa.Table, damage: Damage, path: Path) -> Book:
    """Write posts of `POSTS`."""
    with pa.ipc.new_file(path, POSTS, options=LZ4) as file:
        file.write_table(posts)
    characters = pc.sum(pc.utf8_length(posts["text"])).as_py() or 0
    return Book(path, posts.select(LISTED), characters, damage)


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
        damage: what was lost of each source, by its path; rows that were left out are not on the shelf.
        link_damage: the same of its PostLinks.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.posts, self.links = folder / "posts.parquet", folder / "links.parquet"
        self.books: list[tuple[Path, range]] = []
        self.sites: list[str] = []
        self.site = ""
        self.rows = self.characters = 0
        self.damage: dict[Path, Damage] = {}
        self.link_damage: dict[Path, Damage] = {}
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
        self.rows += count
        self.characters += book.characters

    def add(self, post: Post) -> None:
        """A question or an answer of `site`."""
        what = QUESTION if post.parent_id is None else ANSWER
        self._waiting.append({"site": self.site, "what": what, **asdict(post)})
        self._size += len(post.text)
        if self._size > CHARACTERS_PER_BOOK:
            self.flush()

    def lose(self, path: Path, damage: Damage) -> None:
        """What was lost of a source, once it has been read."""
        self.damage[path] = damage
        self.rows += damage.drops.total()

    @property
    def drops(self) -> Counter[str]:
        """Rows that are not on the shelf, by reason."""
        return total(self.damage.values()).drops

    def add_link(self, a: int, b: int) -> None:
        """Questions a and b of `site` ask the same."""
        self._linked.append({"site": self.site, "a": a, "b": b})
        if len(self._linked) == 50_000:
            self.flush()

    def flush(self) -> None:
        """Write what was added; to be called before `take`."""
        if self._waiting:
            posts = pa.Table.from_pylist(self._waiting, schema=POSTS)
            self.take(write_book(posts, Damage(), self.next_path()))
        self._links.write_table(pa.Table.from_pylist(self._linked, schema=LINKS))
        self._waiting, self._linked, self._size = [], [], 0

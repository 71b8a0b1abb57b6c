"""Posts that stay -> Markdown, dealt into buckets: each takes a range of questions with their answers."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from tasks.data.html import to_markdowns
from tasks.data.shelf import LZ4, POSTS

CHARACTERS_PER_BUCKET = 8_000_000  # of the dump
DEALT = POSTS.append(pa.field("place", pa.int64()))  # the text is Markdown, null where it cannot be converted


@dataclass(frozen=True, slots=True)
class Deal:
    """One book's part: ``Deal(Path("work/000007.arrow"), rows, places, Path("work/buckets"), 512)``.

    Attributes:
        path: of the book.
        rows: int64 [posts], which of its posts stay.
        places: int64 [posts], the places of their questions.
        folder: of the buckets.
        per_bucket: places.
    """

    path: Path
    rows: np.ndarray
    places: np.ndarray
    folder: Path
    per_bucket: int


def deal(task: Deal) -> int:
    """Convert what stays of a book and append it to its buckets; the book goes. Returns the characters."""
    with pa.memory_map(str(task.path)) as source:
        posts = pa.ipc.open_file(source).read_all().take(pa.array(task.rows))
        posts = posts.set_column(posts.schema.get_field_index("text"), DEALT.field("text"), _markdown(posts))
        posts = posts.append_column(DEALT.field("place"), pa.array(task.places))
    task.path.unlink()
    buckets = task.places // task.per_bucket
    different = np.unique(buckets).tolist()
    for bucket in different:
        # No two processes write one file; a file takes a stream after the other.
        path = task.folder / f"{bucket:06}.{os.getpid()}"
        with path.open("ab") as file, pa.ipc.new_stream(file, DEALT, options=LZ4) as stream:
            stream.write_table(posts if len(different) == 1 else posts.filter(pa.array(buckets == bucket)))
    return pc.sum(pc.utf8_length(posts["text"])).as_py() or 0


def buckets(folder: Path) -> Iterator[list[Path]]:
    """The files of each bucket, in the order of places."""
    found: dict[str, list[Path]] = {}
    for path in sorted(folder.iterdir()):
        found.setdefault(path.stem, []).append(path)
    yield from found.values()


def read_bucket(paths: list[Path]) -> pa.Table:
    """A bucket's posts: each question and then its answers by id; questions are sorted by place."""
    tables = []
    for path in paths:
        with path.open("rb") as file:
            end = file.seek(0, os.SEEK_END)
            file.seek(0)
            while file.tell() < end:
                tables.append(pa.ipc.open_stream(file).read_all())
        path.unlink()
    posts = pa.concat_tables(tables).combine_chunks()
    keys = pa.table(
        [posts["place"], posts["parent_id"].is_valid(), posts["id"]], ["place", "is_answer", "id"]
    )
    return posts.take(pc.sort_indices(keys, [(name, "ascending") for name in keys.column_names]))


def _markdown(posts: pa.Table) -> pa.Array:
    texts, is_html = posts["text"].to_pylist(), posts["is_html"].to_pylist()
    converted = iter(to_markdowns([text for text, yes in zip(texts, is_html, strict=True) if yes]))
    both = zip(texts, is_html, strict=True)
    return pa.array([next(converted) if yes else text.strip() for text, yes in both], pa.string())

"""Small dumps written by hand, and a working directory to run the stage in."""

import os
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from xml.sax.saxutils import quoteattr

import pyarrow as pa
import pytest

from tasks.data.engine import connect
from tasks.data.join import join
from tasks.data.parallel import Crew
from tasks.data.posts import read_dump
from tasks.data.shelf import Shelf
from tasks.data.sources import Source, site_of
from tasks.data.stage import convert
from tasks.run.layout import Layout

REPOSITORY = Path(__file__).parents[2]
TIME = "2020-01-02T03:04:05.000"
Rows = list[dict[str, object]]


def _xml(rows: Rows, root: str = "posts", newline: str = "\n", bom: bool = False) -> bytes:
    lines = [
        "  <row " + " ".join(f"{k}={quoteattr(str(v), {chr(10): '&#xA;'})}" for k, v in row.items()) + " />"
        for row in rows
    ]
    text = newline.join(['<?xml version="1.0" encoding="utf-8"?>', f"<{root}>", *lines, f"</{root}>"])
    return (b"\xef\xbb\xbf" if bom else b"") + text.encode()


def _question(number: int, **more: object) -> dict[str, object]:
    post = {"Id": number, "PostTypeId": 1, "CreationDate": TIME, "Score": 1, "Title": f"How to do {number}?"}
    return post | {"Body": f"<p>Tell me about {number}, please.</p>"} | more


def _answer(number: int, parent: int, **more: object) -> dict[str, object]:
    post = {"Id": number, "PostTypeId": 2, "ParentId": parent, "CreationDate": TIME, "Score": number % 5 - 1}
    return post | {"Body": f"<p>Answer {number}.</p>"} | more


def _site(questions: int, answers: int = 2, first: int = 1) -> Rows:
    rows: Rows = []
    for i in range(questions):
        number = first + i * (answers + 1)
        rows += [_question(number), *(_answer(number + 1 + j, number) for j in range(answers))]
    return rows


@pytest.fixture(scope="session")
def xml() -> Callable[..., bytes]:
    """xml(rows, root="posts", newline="\\n", bom=False): the bytes of a dump."""
    return _xml


@pytest.fixture(scope="session")
def question() -> Callable[..., dict[str, object]]:
    """question(number, **attributes): a row."""
    return _question


@pytest.fixture(scope="session")
def answer() -> Callable[..., dict[str, object]]:
    """answer(number, parent, **attributes): a row."""
    return _answer


@pytest.fixture(scope="session")
def site() -> Callable[..., Rows]:
    """site(questions, answers=2, first=1): rows of a whole site."""
    return _site


@pytest.fixture
def layout(tmp_path: Path) -> Layout:
    """An empty project: data/raw, and as much of dvc.yaml as a fingerprint needs."""
    (tmp_path / "data" / "raw").mkdir(parents=True)
    (tmp_path / "dvc.yaml").write_text("stages:\n  data: {cmd: none, deps: [data/raw], params: [seed]}\n")
    (tmp_path / "params.yaml").write_text("seed: 0\n")
    return Layout(tmp_path, tmp_path)


@pytest.fixture(scope="session")
def dumps() -> Path:
    """The folder of real StackExchange dumps."""
    default = REPOSITORY.parent / "shared" / "data"
    folder = Path(os.environ.get("STACKRL_SHARED_DATA", default)) / "stackexchange"
    if not folder.is_dir():
        pytest.skip(f"no real dumps: {folder} does not exist (set STACKRL_SHARED_DATA)")
    return folder


@dataclass
class Site:
    """What became of a site's posts: the raw rows too, as they stand on the shelf.

    Questions, and their answers, have an attribute for each column.
    """

    rows: int
    posts: dict[int, dict]
    questions: list[SimpleNamespace]
    drops: Counter[str]


def _read(path: Path) -> list[dict]:
    with pa.ipc.open_file(path) as file:
        return file.read_all().to_pylist()


def _shelved(path: Path, work: Path) -> tuple[Shelf, list[dict]]:
    with Shelf(work) as shelf, Crew(1) as crew:
        read_dump(Source(path, site_of(path)), shelf, crew)
    return shelf, [row for book, _ in shelf.books for row in _read(book)]


@pytest.fixture(scope="session")
def shelved(tmp_path_factory: pytest.TempPathFactory) -> Callable[[Path], tuple[Shelf, list[dict]]]:
    """shelved(path): a dump read: the shelf, and all rows on it."""
    return lambda path: _shelved(path, tmp_path_factory.mktemp("shelf"))


@pytest.fixture(scope="session")
def assembled(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Site]:
    """assembled(path, min_answers=2): a dump read, joined and converted as the stage does it."""

    def function(path: Path, min_answers: int = 2) -> Site:
        work = tmp_path_factory.mktemp("work")
        shelf, rows = _shelved(path, work)
        found = Site(shelf.rows, {row["id"]: row for row in rows}, [], Counter())
        with connect(work, threads=1) as base, Crew(1) as crew:
            found.drops += join(base, shelf, min_answers)
            parts, drops = convert(base, shelf, min_answers, crew)
        found.drops += drops
        for question in (row for part in parts for row in _read(part)):
            question["answers"] = [SimpleNamespace(**answer) for answer in question["answers"]]
            found.questions.append(SimpleNamespace(**question))
        return found

    return function

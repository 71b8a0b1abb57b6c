import bz2
import gzip
import lzma
import random
from pathlib import Path

import py7zr
import pytest

from tasks.data.sources import DumpError, Source, find_sources, site_of, stream

DATA = random.Random(0).randbytes(300_000) + b"posts" * 200_000


def seven_zip(path: Path, members: dict[str, bytes]) -> None:
    with py7zr.SevenZipFile(path, "w") as archive:
        for name, content in members.items():
            archive.writestr(content, name)


def write(path: Path, content: bytes) -> Path:
    match path.suffix:
        case ".xml":
            path.write_bytes(content)
        case ".xz":
            path.write_bytes(lzma.compress(content))
        case ".gz":
            path.write_bytes(gzip.compress(content))
        case ".bz2":
            path.write_bytes(bz2.compress(content))
        case ".7z":
            seven_zip(path, {"Users.xml": b"u" * 1000, "Posts.xml": content, "Votes.xml": b"v" * 1000})
    return path


def read(path: Path) -> list[bytes]:
    chunks: list[bytes] = []
    stream(path, chunks.append)
    return chunks


ROADS = [".xml", ".xml.xz", ".xml.gz", ".xml.bz2", ".7z"]


@pytest.mark.parametrize("suffix", ROADS)
def test_every_road_gives_the_same_bytes_in_chunks(tmp_path, suffix):
    chunks = read(write(tmp_path / f"a{suffix}", DATA))
    assert b"".join(chunks) == DATA
    assert max(map(len, chunks)) <= 2**20


def test_several_xz_streams_in_one_file(tmp_path):
    path = tmp_path / "a.xml.xz"
    path.write_bytes(lzma.compress(b"<posts>") + lzma.compress(b"</posts>"))
    assert b"".join(read(path)) == b"<posts></posts>"


@pytest.mark.parametrize("suffix", ROADS[1:])
@pytest.mark.parametrize("share", [0.0, 0.1, 0.5, 0.999])
def test_truncated(tmp_path, suffix, share):
    path = write(tmp_path / f"a{suffix}", DATA)
    content = path.read_bytes()
    path.write_bytes(content[: int(share * len(content))])
    try:
        chunks = read(path)
    except DumpError as error:
        assert "damaged" in str(error)
        assert str(path) in str(error)
        assert "\n" not in str(error)
    else:
        assert chunks == []  # an empty gz, xz or bz2 file; the XML parser refuses it
        assert share == 0.0


@pytest.mark.parametrize("suffix", ROADS[1:])
def test_no_such_archive_at_all(tmp_path, suffix):
    path = tmp_path / f"a{suffix}"
    path.write_bytes(b"<posts></posts>")
    with pytest.raises(DumpError, match=rf"a{suffix}: damaged, truncated|a{suffix}: damaged or truncated"):
        read(path)


def test_7z_without_posts_lists_what_it_has(tmp_path):
    seven_zip(tmp_path / "a.7z", {"Users.xml": b"<users/>", "Votes.xml": b"<votes/>"})
    with pytest.raises(DumpError, match=r"a\.7z: no Posts\.xml among its members \(Users\.xml, Votes\.xml\)"):
        read(tmp_path / "a.7z")


def test_7z_with_two_posts_is_refused(tmp_path):
    seven_zip(tmp_path / "a.7z", {"x/Posts.xml": b"<posts/>", "y/Posts.xml": b"<posts/>"})
    with pytest.raises(DumpError, match=r"a\.7z: 2 Posts\.xml"):
        read(tmp_path / "a.7z")


def test_7z_in_a_folder_inside(tmp_path):
    seven_zip(tmp_path / "a.7z", {"unix.example/Posts.xml": b"<posts/>"})
    assert b"".join(read(tmp_path / "a.7z")) == b"<posts/>"


def test_7z_with_a_password(tmp_path):
    with py7zr.SevenZipFile(tmp_path / "a.7z", "w", password="x") as archive:
        archive.writestr(b"<posts/>", "Posts.xml")
    with pytest.raises(DumpError, match=r"a\.7z: damaged, truncated or encrypted .* PasswordRequired"):
        read(tmp_path / "a.7z")


@pytest.mark.parametrize("error", [DumpError("row 7: bad"), KeyError("mine")])
def test_what_the_sink_raises_is_not_blamed_on_the_archive(tmp_path, error):
    def fail(chunk: bytes) -> None:
        raise error

    for suffix in ROADS:
        with pytest.raises(type(error)) as caught:
            stream(write(tmp_path / f"a{suffix}", b"<posts/>"), fail)
        assert caught.value is error


@pytest.mark.parametrize(
    ("path", "site"),
    [
        ("devops.stackexchange.com.Posts.xml.xz", "devops.stackexchange.com"),
        ("beer.stackexchange.com.7z", "beer.stackexchange.com"),
        ("stackoverflow.com-Posts.7z", "stackoverflow.com"),
        ("unix.example/Posts.xml", "unix.example"),
        ("unix.example/Posts.xml.gz", "unix.example"),
        ("meta.mathoverflow.net.xml.bz2", "meta.mathoverflow.net"),
        ("beer.xml", "beer"),
        ("MyPosts.xml", "MyPosts"),
    ],
)
def test_site_of(path, site):
    assert site_of(Path("/dumps") / path) == site


def test_find_sources_sorts_by_site(tmp_path):
    for name in ("b.example.7z", "a.example.Posts.xml"):
        (tmp_path / name).touch()
    a, b = (tmp_path / "a.example.Posts.xml"), (tmp_path / "b.example.7z")
    assert find_sources((b.name, a.name), tmp_path) == [Source(a, "a.example"), Source(b, "b.example")]


@pytest.mark.parametrize(
    ("names", "message"),
    [
        ((), "data.source is an empty list"),
        (("gone.7z",), "gone.7z is missing"),
        (("folder.7z",), "folder.7z is missing"),
        (("../there.xml",), "'../there.xml' must be the name of a file in data/raw"),
        (("/there.xml",), "'/there.xml' must be the name"),
        (("there.zip",), "'there.zip' is of no known type"),
        (("there.xml", "there.Posts.xml.gz"), "there.xml and there.Posts.xml.gz are both the site there"),
        (("dangling.xml",), "dangling.xml is missing"),
    ],
)
def test_find_sources_errors_name_the_key(tmp_path, names, message):
    (tmp_path / "folder.7z").mkdir()
    (tmp_path / "dangling.xml").symlink_to(tmp_path / "nowhere.xml")
    for name in ("there.xml", "there.Posts.xml.gz", "there.zip"):
        (tmp_path / name).touch()
    with pytest.raises(DumpError, match=r"^data\.source") as caught:
        find_sources(names, tmp_path)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)

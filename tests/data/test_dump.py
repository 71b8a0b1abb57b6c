import lzma

import py7zr
import pytest

from tasks.data import cut, dump
from tasks.data.dump import read_rows
from tasks.data.sources import DumpError, Source


@pytest.fixture
def read(tmp_path):
    """read(content, table="posts"): the rows of a file with that content."""

    def function(content: bytes | str, table: str = "posts") -> list[dict[str, str]]:
        path = tmp_path / "unix.example.Posts.xml"
        path.write_bytes(content.encode() if isinstance(content, str) else content)
        rows: list[dict[str, str]] = []
        assert read_rows(Source(path, "unix.example"), table, rows.append) == len(rows)
        return rows

    return function


ROW = '<posts><row Id="1" Body="{}"/></posts>'


@pytest.mark.parametrize(
    ("written", "meant"),
    [  # HTML in XML: one layer of escapes comes off, the other stays
        ("&lt;p&gt;a &amp;lt; b&lt;/p&gt;", "<p>a &lt; b</p>"),
        ("&amp;amp;&amp;#38;", "&amp;&#38;"),
        ("&quot;x&apos;", "\"x'"),
        ("a&#xA;b&#x9;c&#13;", "a\nb\tc\r"),
        ("&#x1F600; é 中", "😀 é 中"),
        ("", ""),
    ],
)
def test_attribute_values(read, written, meant):
    assert read(ROW.format(written)) == [{"Id": "1", "Body": meant}]


@pytest.mark.parametrize("newline", ["\n", "\r\n"])
@pytest.mark.parametrize("bom", [False, True])
def test_rows_in_order(read, xml, newline, bom):
    rows = [{"Id": str(i), "Body": f"text {i} €"} for i in range(500)]
    assert read(xml(rows, newline=newline, bom=bom)) == rows


def test_chunk_borders_do_not_matter(read, xml, monkeypatch):
    rows = [{"Id": "1", "Body": "é&amp; <x>\n€ 😀"}, {"Id": "2"}]
    for size in (1, 2, 3, 7, 64):
        monkeypatch.setattr("tasks.data.sources.CHUNK_BYTES", size)
        assert read(xml(rows, bom=True)) == rows


@pytest.mark.parametrize("suffix", [".xml", ".xml.xz"])
@pytest.mark.parametrize("size", [1, 40, 100, 1000])
def test_where_it_is_cut_does_not_matter(tmp_path, xml, monkeypatch, suffix, size):
    rows = [{"Id": str(i), "Body": "é <row> " * (i % 7)} for i in range(60)]
    path = tmp_path / f"unix.example.Posts{suffix}"
    content = xml(rows, newline="\r\n", bom=True)
    path.write_bytes(lzma.compress(content) if suffix == ".xml.xz" else content)
    monkeypatch.setattr(cut, "BLOCK_BYTES", size)
    monkeypatch.setattr(cut, "PROBE_BYTES", 7)
    monkeypatch.setattr("tasks.data.sources.CHUNK_BYTES", 64)
    blocks, found = [], []
    cut.cut(Source(path, "unix.example"), "posts", blocks.append)
    assert len(blocks) > (1 if size == 1000 else 10)
    assert [blocks[0].is_first, blocks[-1].is_last] == [True, True]
    assert b"".join(b if isinstance(b := block.content, bytes) else b.read() for block in blocks) == content
    assert read_rows(Source(path, "unix.example"), "posts", found.append) == 60
    assert found == rows


def test_an_error_counts_the_rows_of_all_blocks_before(tmp_path, xml, monkeypatch):
    path = tmp_path / "unix.example.Posts.xml"
    content = xml([{"Id": str(i)} for i in range(60)])
    monkeypatch.setattr(cut, "BLOCK_BYTES", 100)
    for bad in (content.replace(b'Id="50"', b'Id="&nbsp;"'), content.replace(b'<row Id="50"', b"<line")):
        path.write_bytes(bad)
        with pytest.raises(DumpError, match=r"unix\.example\.Posts\.xml: row 51: "):
            read_rows(Source(path, "unix.example"), "posts", lambda row: None)


@pytest.mark.parametrize("suffix", [".xml", ".xml.xz"])
def test_a_file_without_rows_is_not_read_to_its_end(tmp_path, monkeypatch, suffix):
    path = tmp_path / f"unix.example.Posts{suffix}"
    content = b"<posts>" + b" " * 10_000
    path.write_bytes(lzma.compress(content) if suffix == ".xml.xz" else content)
    monkeypatch.setattr(cut, "BLOCK_BYTES", 100)
    monkeypatch.setattr(cut, "LONGEST_ROW", 1000)
    monkeypatch.setattr("tasks.data.sources.CHUNK_BYTES", 500)
    with pytest.raises(DumpError, match=r"no dump of posts: 1,[05]00 bytes without a <row>"):
        read_rows(Source(path, "unix.example"), "posts", lambda row: None)


def test_another_table(read):
    assert read('<postlinks><row Id="3"/></postlinks>', table="postlinks") == [{"Id": "3"}]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "row 1: not a well-formed UTF-8 dump"),
        (b"hello", "row 1: not a well-formed UTF-8 dump"),
        (b'<posts>\n<row Id="1"/>\n<row Id="2"/>', "row 3: .*Premature end of data in tag posts\\)"),
        (b'<posts>\n<row Id="1"/>\n<row Id="2', "row 2: not a well-formed UTF-8 dump"),
        (b'<posts><row Id="1"/></posts>junk', "row 2: .*Extra content"),
        (b'<posts><row Id="1" Id="2"/></posts>', "row 1: .*redefined"),
        (b'<posts><row Id="&nbsp;"/></posts>', "row 1: .*nbsp"),
        (b'<posts><row Id="\x01"/></posts>', "row 1"),
        ('<posts><row Id="1" Body="é"/></posts>'.encode("latin-1"), "row 1: not a well-formed UTF-8 dump"),
        (
            '<?xml version="1.0" encoding="ISO-8859-1"?><posts><row Body="é"/></posts>'.encode("latin-1"),
            "row 1: not a well-formed UTF-8 dump",
        ),
        ('<posts><row Id="1"/></posts>'.encode("utf-16"), "row 1: not a well-formed UTF-8 dump"),
        (b"<!DOCTYPE posts><posts><row/></posts>", r"declares a DOCTYPE \(posts\)"),
        (b'<!DOCTYPE posts SYSTEM "http://127.0.0.1/x.dtd"><posts><row/></posts>', "declares a DOCTYPE"),
        (b"<html><p/></html>", "row 1: no dump of posts: <html> instead of <posts>"),
        (b'<users><row Id="1"/></users>', "no dump of posts: <users> instead of <posts>"),
        (b'<posts><row Id="1"/><line/></posts>', "row 2: no dump of posts: <line> instead of <row>"),
        (b'<posts><row Id="1"><b/></row></posts>', "row 2: no dump of posts: <b> instead of </row>"),
        (b"<posts></posts>", "<posts> without a single <row>"),
    ],
)
def test_errors_are_one_line_with_file_and_row(read, content, message):
    with pytest.raises(DumpError, match=rf"^\S*unix\.example\.Posts\.xml: [^\n]*{message}[^\n]*$"):
        read(content)


def test_entities_are_refused_before_they_are_declared(read):
    """A billion laughs, a local file: neither is ever expanded, for the DOCTYPE itself ends the reading."""
    laughs = "".join(f'<!ENTITY l{i} "{f"&l{i - 1};" * 10}">' for i in range(1, 10))
    for declared in ('<!ENTITY l0 "ha">' + laughs, '<!ENTITY l9 SYSTEM "file:///etc/hostname">'):
        with pytest.raises(DumpError, match="declares a DOCTYPE"):
            read(f'<!DOCTYPE posts [{declared}]><posts><row Body="&l9;"/></posts>')


def test_comments_and_instructions_are_nothing(read):
    text = '<?xml version="1.0"?><!-- a --><posts><!-- b --><row Id="1"/><?c d?></posts>'
    assert read(text) == [{"Id": "1"}]


def test_long_reading_shows_progress(read, xml, monkeypatch, capsys):
    monkeypatch.setattr("tasks.data.progress.EVERY_SECONDS", 0.0)
    monkeypatch.setattr(cut, "BLOCK_BYTES", 1000)
    read(xml([{"Id": "1", "Body": "x" * 50}] * 100))
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) > 5
    assert lines[-1].startswith("data: reading posts of unix.example: 0.0 MB, ")


def test_what_the_row_handler_raises_passes_through(tmp_path, xml):
    def fail(row):
        raise KeyError("mine")

    path = tmp_path / "a.xml"
    path.write_bytes(xml([{"Id": "1"}]))
    with pytest.raises(KeyError, match="mine"):
        dump.read_rows(Source(path, "a"), "posts", fail)


def test_bad_xml_inside_an_archive_is_not_blamed_on_the_archive(tmp_path):
    with py7zr.SevenZipFile(tmp_path / "unix.example.7z", "w") as archive:
        archive.writestr(b'<posts><row Id="1"/>', "Posts.xml")
    with pytest.raises(DumpError, match=r"row 2: not a well-formed UTF-8 dump \(Premature end"):
        read_rows(Source(tmp_path / "unix.example.7z", "unix.example"), "posts", lambda row: None)

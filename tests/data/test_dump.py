import gzip
import lzma

import py7zr
import pytest

from tasks.data import cut, dump
from tasks.data.damage import LONGEST_ROW, Damage
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
    path.write_bytes(content.replace(b'Id="7"', b'Id="&nbsp;"')[:-40])
    with pytest.raises(DumpError, match=r"unix\.example\.Posts\.xml: row 59: .*Premature end"):
        read_rows(Source(path, "unix.example"), "posts", lambda row: None)


@pytest.mark.parametrize("suffix", [".xml", ".xml.xz"])
def test_a_file_without_rows_is_not_read_to_its_end(tmp_path, monkeypatch, suffix):
    path = tmp_path / f"unix.example.Posts{suffix}"
    content = b"<posts>" + b" " * 10_000
    path.write_bytes(lzma.compress(content) if suffix == ".xml.xz" else content)
    monkeypatch.setattr(cut, "BLOCK_BYTES", 100)
    monkeypatch.setattr("tasks.data.damage.LONGEST_ROW", 1000)
    monkeypatch.setattr("tasks.data.sources.CHUNK_BYTES", 500)
    with pytest.raises(DumpError, match=r"no dump of posts: 1,[05]00 bytes without a <row>"):
        read_rows(Source(path, "unix.example"), "posts", lambda row: None)


def test_another_table(read):
    assert read('<postlinks><row Id="3"/></postlinks>', table="postlinks") == [{"Id": "3"}]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "is empty"),
        (b"\n \0\n", "is empty"),
        (b"hello", "row 1: not a well-formed UTF-8 dump"),
        (b'<posts>\n<row Id="1"/>\n<row Id="2"/>', "row 3: .*Premature end of data in tag posts\\)"),
        (b'<posts>\n<row Id="1"/>\n<row Id="2', "row 2: not a well-formed UTF-8 dump"),
        (b'<posts><row Id="1"/></posts>junk', "row 2: .*Extra content"),
        (b'<posts><row Id="1" Id="2"/></posts>', "none of its 1 rows can be read; row 1: .*redefined"),
        (b'<posts><row Id="&nbsp;"/></posts>', "row 1: .*nbsp"),
        ('<posts><row Id="1" Body="é"/></posts>'.encode("latin-1"), "row 1: .*0xe9: as in Latin-1 or Wind"),
        ('<posts><row Id="1" Body="“"/></posts>'.encode("cp1252"), "row 1: .*0x93: as in Windows-1252"),
        (
            '<?xml version="1.0" encoding="ISO-8859-1"?><posts><row Body="é"/></posts>'.encode("latin-1"),
            "row 1: .*declares the encoding ISO-8859-1",
        ),
        *(
            ('<posts><row Id="1"/></posts>'.encode(name), "is UTF-16")
            for name in ("utf-16", "utf-16-le", "utf-16-be")
        ),
        ('<posts><row Id="1"/></posts>'.encode("utf-32"), "is UTF-32"),
        (gzip.compress(b"<posts/>", mtime=0), "is gzip"),
        (b"PK\x03\x04" + bytes(30), "is a zip archive"),
        (
            b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n",
            "is a Git LFS pointer: the file",
        ),
        (b"\n<!doctype html><title>Sign in</title>", "is an HTML page"),
        (b"<!DOCTYPE posts><posts><row/></posts>", r"declares a DOCTYPE \(posts\)"),
        (b'<!DOCTYPE posts SYSTEM "http://127.0.0.1/x.dtd"><posts><row/></posts>', "declares a DOCTYPE"),
        (b"<html><p/></html>", "is an HTML page"),
        (b"<Error><Code>x</Code></Error>", "row 1: no dump of posts: <Error> instead of <posts>"),
        (b'<users><row Id="1"/></users>', "no dump of posts: <users> instead of <posts>"),
        (b"<posts><line/></posts>", "row 1: no dump of posts: <line> instead of <row>"),
        (b'<posts><row Id="1"><b/></row></posts>', "row 1: no dump of posts: <b> instead of </row>"),
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


FORBIDDEN = [  # however a character is written that XML 1.0 has not
    b"&#xE;", b"&#xB;",
    b"&#x0E;", b"&#x0e;", b"&#14;", b"&#0014;", b"&#X0E;", b"&#x0;", b"&#0;", b"&#x000000000;", b"&#x1F;",
    b"&#xFFFE;", b"&#xffff;", b"&#65534;", b"&#xD800;", b"&#xDFFF;", b"&#57343;", b"&#x110000;",
    b"&#" + b"9" * 5000 + b";", b"&#x" + b"0" * 5000 + b"b;", b"&#x100000041;",
    *(bytes([code]) for code in range(32) if code not in (9, 10, 13)),
    b"\xef\xbf\xbe", b"\xef\xbf\xbf", b"\xed\xa0\x80", b"\xed\xbf\xbf",
]  # fmt: skip


def read_with_damage(path, content: bytes) -> tuple[list[dict[str, str]], Damage]:
    path.write_bytes(lzma.compress(content) if path.suffix == ".xz" else content)
    rows: list[dict[str, str]] = []
    damage = Damage()
    read_rows(Source(path, "unix.example"), "posts", lambda row: rows.append(dict(row)), damage)
    return rows, damage


@pytest.mark.parametrize("bad", FORBIDDEN, ids=lambda bad: repr(bad[:12]))
def test_what_xml_forbids_is_dropped_and_counted_wherever_it_stands(tmp_path, bad):
    raw = not bad.startswith(b"&")
    places = [  # before the root, in a name and after the root a reference is no reference
        b'%s<posts><row Id="1" Body="a%sb &#xA;&amp;#14; \xef\xbf\xbd"/>' % (bad * raw, bad),
        b'<ro%sw Id="2"/>%s' % (bad * raw, bad),
        b'<row Id="%s3%s"/></posts>%s' % (bad, bad, bad * raw),
    ]
    rows, damage = read_with_damage(tmp_path / "unix.example.Posts.xml", b"\n".join(places))
    assert rows == [{"Id": "1", "Body": "ab \n&#14; \ufffd"}, {"Id": "2"}, {"Id": "3"}]
    assert (damage.dropped_characters, damage.replaced_characters, damage.drops) == (4 + 3 * raw, 0, {})


@pytest.mark.parametrize("suffix", [".xml", ".xml.xz"])
@pytest.mark.parametrize("size", [1, 40, 100, 1000])
def test_forbidden_characters_in_every_block(tmp_path, xml, monkeypatch, suffix, size):
    rows = [{"Id": str(i), "Body": f"é {i}"} for i in range(40)]
    monkeypatch.setattr(cut, "BLOCK_BYTES", size)
    monkeypatch.setattr("tasks.data.sources.CHUNK_BYTES", 3)  # every reference crosses a border of chunks
    content = (
        xml(rows, bom=True).replace(b"\xc3\xa9 ", b"\xc3\xa9&#x0000E; ").replace(b"</posts>", b"\x00</posts>")
    )
    found, damage = read_with_damage(tmp_path / f"unix.example.Posts{suffix}", content)
    assert found == rows
    assert damage.dropped_characters == 41


MALFORMED = [
    (b'<row Id="2" Body="&nbsp;"/>', 1, "row 2: not well-formed"),
    (b'<row Id="2" Id="2"/>', 1, "row 2: not well-formed"),
    (b'<row Id="2" Body="a < b"/>', 1, "row 2: not well-formed"),
    (b'<row Id="2" Body="no end/>', 1, "row 2: not well-formed"),
    (b'<row Id="2"><b/></row>', 1, "row 2: no dump of posts: <b> instead of </row>"),
    (b"<line/>", 1, "row 2: no dump of posts: <line> instead of <row>"),
    (b"</posts><posts>", 1, "row 2: not well-formed"),
    (b'<row Id="2" Body="&#xE"/><row Id="3" &/>', 2, "row 2: not well-formed"),
    (b'<!-- <row Id="7"/> --> <row Id="2" Body=&/> <?x <row?>', 1, "row 2: not well-formed"),
]


@pytest.mark.parametrize("size", [1, 10**6])
@pytest.mark.parametrize(("bad", "count", "words"), MALFORMED)
def test_a_malformed_row_is_left_out_and_counted(tmp_path, monkeypatch, bad, count, words, size):
    if size > 1 or b"<!--" not in bad:  # a comment with a row in it must not be cut
        monkeypatch.setattr(cut, "BLOCK_BYTES", size)
        content = b'<posts>\n<row Id="1"/>' + bad + b'<row Id="9" Body="&#xB;"/>\n</posts>'
        rows, damage = read_with_damage(tmp_path / "unix.example.Posts.xml", content)
        assert [row["Id"] for row in rows] == ["1", "9"]
        assert damage.drops == {"malformed_row": count}
        assert damage.earliest().startswith(words)
        assert damage.dropped_characters == 1


@pytest.mark.parametrize("suffix", [".xml", ".xml.xz"])
@pytest.mark.parametrize("places", [(0,), (1,), (0, 1), (7, 8), (19,), (0, 10, 19), (5, 6, 7)])
def test_rows_too_long_to_be_read_are_left_out(tmp_path, xml, monkeypatch, suffix, places):
    monkeypatch.setattr(cut, "BLOCK_BYTES", 100)
    monkeypatch.setattr(cut, "PROBE_BYTES", 64)
    monkeypatch.setattr("tasks.data.damage.LONGEST_ROW", 1000)
    monkeypatch.setattr("tasks.data.sources.CHUNK_BYTES", 50)
    rows = [
        {"Id": str(i), "Body": "x" * (3000 if i in places else 900 if i % 5 == 4 else 30)} for i in range(20)
    ]
    found, damage = read_with_damage(
        tmp_path / f"unix.example.Posts{suffix}", xml(rows, newline="\r\n", bom=True)
    )
    assert found == [row for row in rows if len(row["Body"]) < 1000]
    assert damage.drops == {"too_long_row": len(places)}
    assert damage.earliest() == f"row {places[0] + 1}: longer than 1,000 bytes"


def test_a_row_of_the_greatest_length_is_read(tmp_path):
    """The bound is libxml2's: what is not left out, it reads."""
    longest = b'<row Id="1" Body="%s"/>' % (b"x" * (LONGEST_ROW - 30))
    content = b'<posts><row Id="0"/>%s<row Id="2"/></posts>' % longest
    rows, damage = read_with_damage(tmp_path / "unix.example.Posts.xml", content)
    assert [row["Id"] for row in rows] == ["0", "1", "2"]
    assert damage == Damage()


def test_stray_bytes_are_replaced_and_another_encoding_is_not(tmp_path, xml):
    path = tmp_path / "unix.example.Posts.xml"
    rows = [{"Id": str(i), "Body": "café" if i < 9 else "coffee"} for i in range(200)]
    content = xml(rows)
    stray = content.replace(b"\xc3\xa9", b"\xe9", 2).replace(b"coffee", b"c\xc0\x80ffee\xff", 1)
    found, damage = read_with_damage(path, stray)
    assert [row["Body"] for row in found[:3]] == ["caf\ufffd", "caf\ufffd", "café"]
    assert found[9]["Body"] == "c\ufffdffee\ufffd"
    assert (damage.replaced_characters, damage.dropped_characters, damage.drops) == (4, 0, {})
    with pytest.raises(
        DumpError, match=r"unix\.example\.Posts\.xml: row 1: .*byte 0xe9: as in Latin-1 or Windows"
    ):
        read_with_damage(path, content.decode().encode("latin-1"))
    declared = content.replace(b'encoding="utf-8"', b'encoding="iso-8859-1"')
    assert read_with_damage(path, declared)[0] == rows  # what it says is wrong, and nothing is lost
    with pytest.raises(DumpError, match=r"row 1: .*declares the encoding iso-8859-1"):
        read_with_damage(path, declared.replace(b"\xc3\xa9", b"\xe9", 1))

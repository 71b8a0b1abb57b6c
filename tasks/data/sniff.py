"""What a file really is, where it is not what its name says: told by its first bytes."""

from __future__ import annotations

import re
from pathlib import Path

HEAD_BYTES = 4096
MAGIC = (
    (b"\x1f\x8b", "gzip"),
    (b"BZh", "bzip2"),
    (b"\xfd7zXZ\x00", "xz"),
    (b"7z\xbc\xaf\x27\x1c", "a 7z archive"),
    (b"PK\x03\x04", "a zip archive"),
    (b"PK\x05\x06", "an empty zip archive"),
    (b"\x28\xb5\x2f\xfd", "zstandard"),
    (b"Rar!", "a rar archive"),
    (b"PAR1", "Parquet"),
    (b"SQLite format 3\x00", "an SQLite database"),
    (b"%PDF-", "a PDF document"),
    (b"\xff\xfe\x00\x00", "UTF-32 text"),
    (b"\x00\x00\xfe\xff", "UTF-32 text"),
    (b"\xff\xfe", "UTF-16 text"),
    (b"\xfe\xff", "UTF-16 text"),
)
OF_SUFFIX = {
    ".gz": "gzip", ".bz2": "bzip2", ".xz": "xz", ".7z": "a 7z archive", ".parquet": "Parquet",
}  # fmt: skip
POINTER = "pointer: the file itself was not downloaded"
TEXTS = (
    (re.compile(rb"version https://git-lfs\.github\.com/spec/"), f"a Git LFS {POINTER} (git lfs pull)"),
    (re.compile(rb"(?:\.\./)*(?:\.git|/?annex)/(?:annex/)?objects/"), f"a git-annex {POINTER}"),
    (re.compile(rb"(?i)<!doctype\s+html|<html[\s>]"), "an HTML page"),
)
BLANK = b"\xef\xbb\xbf \t\r\n"
ENCODING = re.compile(rb"""^[\xef\xbb\xbf\s]*<\?xml[^>]*?\bencoding\s*=\s*["']([A-Za-z0-9._-]+)""")
READ_AS_UTF8 = re.compile(r"(?i)utf-?8|us-ascii|ascii|utf-?16.*|ucs-?2|unicode")  # .NET's writers say utf-16


def what_is(head: bytes) -> str:
    """What begins like that: "gzip", "UTF-16 text", "a Git LFS pointer: …"; "" if it may be text."""
    if not head:
        return "empty"
    for magic, name in MAGIC:
        if head.startswith(magic):
            return name
    if head[257:262] == b"ustar":
        return "a tar archive"
    if width := _width(head):
        return f"UTF-{width} text"
    start = head.lstrip(BLANK)
    if not start.strip(b"\0") and (len(head) < HEAD_BYTES or not head.strip(b"\0")):
        return "empty (blank or zero bytes)"
    return next((name for pattern, name in TEXTS if pattern.match(start)), "")


def refusal(path: Path) -> str:
    """Why a file as it lies there cannot be read, in words after its name; "" if it can."""
    with path.open("rb") as file:
        found = what_is(file.read(HEAD_BYTES))
    wanted = OF_SUFFIX.get(path.suffix)
    if (
        found.startswith("empty")
        or "pointer" in found
        or found in ("an HTML page", "UTF-16 text", "UTF-32 text")
    ):
        return f"is {found}"
    if found and found != wanted:
        return f"is {found} under the name of {_article(path.suffix)} file"
    if wanted and not found:
        return f"is no {wanted.removeprefix('a ')}, or damaged from its first byte on"
    return ""


def declared_encoding(head: bytes) -> str:
    """The encoding that an XML declaration names, where its bytes cannot be read as UTF-8 all the same."""
    found = ENCODING.match(head)
    name = found[1].decode() if found else ""
    return "" if READ_AS_UTF8.fullmatch(name) else name


def _width(head: bytes) -> int:
    """16 or 32, where a byte order mark is missing but every second byte is zero; else 0."""
    head = head[: len(head[:64]) // 4 * 4]
    if len(head) < 8:
        return 0
    zeros = [not any(head[place::4]) for place in range(4)]
    if sum(zeros) == 3:
        return 32
    return 16 if zeros in ([True, False, True, False], [False, True, False, True]) else 0


def _article(suffix: str) -> str:
    return f"an {suffix}" if suffix in (".xz", ".xml") else f"a {suffix}"

"""Whatever bytes stand in data/raw: a ValueError of one line, or a good result; never half a result."""

import lzma
import random
import re

import py7zr
import pytest

from params.schema import Params
from tasks.data import run

ROUNDS = 40
SUFFIXES = (".Posts.xml", ".Posts.xml.xz", ".7z")


def packed(tmp_path, suffix: str, content: bytes) -> bytes:
    if suffix == ".7z":
        path = tmp_path / "pack.7z"
        with py7zr.SevenZipFile(path, "w") as archive:
            archive.writestr(b"<users/>", "Users.xml")
            archive.writestr(content, "Posts.xml")
        return path.read_bytes()
    return lzma.compress(content) if suffix.endswith(".xz") else content


def truncate(content: bytes, draw: random.Random) -> bytes:
    return content[: draw.randrange(len(content))]


def flip(content: bytes, draw: random.Random) -> bytes:
    damaged = bytearray(content)
    for _ in range(draw.choice((1, 1, 2, 20))):
        damaged[draw.randrange(len(damaged))] ^= 1 << draw.randrange(8)
    return bytes(damaged)


def splice(content: bytes, draw: random.Random) -> bytes:
    start, stop = sorted(draw.randrange(len(content)) for _ in range(2))
    return content[:start] + content[stop:] + content[start:stop]


def strip(content: bytes, draw: random.Random) -> bytes:
    """Some attributes taken away, which compressed bytes have none of."""
    return re.sub(rb' \w+="[^"]*"', lambda found: b"" if draw.random() < 0.02 else found.group(), content)


@pytest.mark.parametrize(
    ("suffix", "damage"),
    [*((suffix, damage) for suffix in SUFFIXES for damage in (truncate, flip, splice)), (SUFFIXES[0], strip)],
)
def test_damaged_files(layout, tmp_path, xml, site, suffix, damage, monkeypatch):
    monkeypatch.setattr(
        "tasks.data.cut.BLOCK_BYTES", 5000
    )  # damage in the first block, a later one, the last
    path = layout.root / "data" / "raw" / f"unix.example{suffix}"
    whole = packed(tmp_path, suffix, xml(site(60), bom=True))
    equal = dict.fromkeys(("sft", "reward", "rl", "eval"), 1.0)
    one = {"threads": 1}  # to start other processes for every block of every round would take minutes
    params = Params.model_validate({"machine": one, "data": {"source": [path.name], "split": equal}})
    path.write_bytes(whole)
    run(params, layout)
    draw = random.Random(f"{suffix} {damage.__name__}")
    refused = good = 0
    for _ in range(ROUNDS):
        path.write_bytes(damage(whole, draw))
        before = {file: file.read_bytes() for file in layout.root.glob("artifacts/**/*") if file.is_file()}
        try:
            metrics = run(params, layout).metrics
        except ValueError as error:
            refused += 1
            assert "\n" not in str(error)
            assert path.name in str(error)
            after = {file: file.read_bytes() for file in layout.root.glob("artifacts/**/*") if file.is_file()}
            assert after == before
        else:
            good += 1
            drops = sum(value for key, value in metrics.items() if key.startswith("drops/"))
            assert metrics["rows"] == metrics["questions"] + metrics["answers"] + drops
    assert refused > 0 or damage is strip  # what a row lacks is counted
    assert good > 0 or suffix != ".Posts.xml" or damage is not flip  # nothing but plain text survives damage

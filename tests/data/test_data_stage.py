import gzip
import hashlib
import lzma

import py7zr
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from params.schema import Params
from tasks.data import run, stage
from tasks.data.split import split_of
from tasks.run.parquet import TableWriter

SPLITS = ("sft", "reward", "rl", "eval")
OUTS = {*(f"{name}.parquet" for name in SPLITS), "card.md"}
SHARES = {"sft": 0.3, "reward": 0.45, "rl": 0.13, "eval": 0.12}


def params(*source: str, **data: object) -> Params:
    return Params.model_validate({"data": {"source": source or "sample", "split": SHARES, **data}})


def outs(layout) -> dict[str, str]:
    """The name and sha256 of everything under artifacts/."""
    files = (path for path in layout.root.glob("artifacts/**/*") if path.is_file())
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def tables(layout) -> dict[str, list[dict]]:
    return {name: pq.read_table(layout.artifact("data", f"{name}.parquet")).to_pylist() for name in SPLITS}


@pytest.fixture
def two_sites(layout, xml, site, answer) -> Params:
    raw = layout.root / "data" / "raw"
    litter = [answer(9001, 9000), {"Id": 9002, "PostTypeId": 4}, answer(9003, 1, Body="")]
    (raw / "unix.example.Posts.xml").write_bytes(xml([*site(60), *litter], bom=True, newline="\r\n"))
    with py7zr.SevenZipFile(raw / "art.example.7z", "w") as archive:
        archive.writestr(xml(site(40, answers=3)).replace(b"How to do", b"How to paint"), "Posts.xml")
    return params("unix.example.Posts.xml", "art.example.7z")


def test_columns(layout, two_sites):
    run(two_sites, layout)
    schema = pq.read_schema(layout.artifact("data", "eval.parquet"))
    types = {field.name: str(field.type) for field in schema if field.name != "answers"}
    assert types == {
        "site": "string", "id": "int64", "title": "string", "text": "string", "created": "string",
        "owner_id": "int64", "licence": "string", "tags": "list<element: string>",
        "cluster": "string", "kind": "string", "expected": "string", "wording": "string", "misleads": "bool",
        "wrong": "list<element: string>",
    }  # fmt: skip
    answer = {field.name: str(field.type) for field in schema.field("answers").type.value_type}
    assert answer == {
        "id": "int64", "text": "string", "score": "int32", "votes": "int32", "accepted": "bool",
        "created": "string", "owner_id": "int64", "licence": "string", "style": "string",
    }  # fmt: skip
    assert all(pq.read_schema(layout.artifact("data", f"{name}.parquet")) == schema for name in SPLITS)


def test_rows_metrics_and_card_agree(layout, two_sites):
    metrics = run(two_sites, layout).metrics
    found = tables(layout)
    questions = [row for rows in found.values() for row in rows]
    assert len(questions) == metrics["questions"] == 100
    assert sum(len(row["answers"]) for row in questions) == metrics["answers"] == 60 * 2 + 40 * 3
    for name, rows in found.items():
        assert metrics[f"{name}/questions"] == len(rows) > 0
        assert rows == sorted(rows, key=lambda row: (row["site"], row["id"]))
        assert all(row["answers"] == sorted(row["answers"], key=lambda a: a["id"]) for row in rows)
        assert all(split_of(row["site"], row["id"], SHARES) == name for row in rows)  # no two look alike here
        assert {row["kind"] for row in rows} == {row["expected"] for row in rows} == {None}
    drops = {key.removeprefix("drops/"): value for key, value in metrics.items() if key.startswith("drops/")}
    assert {key: value for key, value in drops.items() if value} == {
        "orphan_answer": 1, "other_post_type": 1, "empty_answer": 1,
    }  # fmt: skip
    assert metrics["rows"] == metrics["questions"] + metrics["answers"] + sum(drops.values())
    assert [metrics[f"overlap/{kind}"] for kind in ("id", "title", "body")] == [0, 0, 0]
    assert all(type(value) is float for value in metrics.values())


def test_card(layout, two_sites):
    metrics = run(two_sites, layout).metrics
    card = layout.artifact("data", "card.md").read_text()
    counts = " | ".join(f"{metrics[f'eval/{what}']:.0f}" for what in ("questions", "answers", "pairs"))
    assert f"\n| **all** | eval | {counts} |\n" in card
    painted = [row for row in tables(layout)["sft"] if row["site"] == "art.example"]
    assert f"\n| art.example | sft | {len(painted)} | {3 * len(painted)} | " in card
    assert "answer to no question of the file | 1 |" in card
    assert "CC BY-SA 4.0: 340 posts" in card


def test_one_question_by_hand(layout, xml, site, question, answer):
    rows = [*site(60), question(999, Title="List files", Body="<p>How?</p>", AcceptedAnswerId=1001)]
    rows += [answer(1000, 999, Score=0), answer(1001, 999, Score=2, OwnerUserId=5)]
    (layout.root / "data/raw/unix.example.Posts.xml").write_bytes(xml(rows))
    run(params("unix.example.Posts.xml"), layout)
    (row,) = [row for rows in tables(layout).values() for row in rows if row["id"] == 999]
    time, licence = "2020-01-02T03:04:05.000", "CC BY-SA 4.0"
    both = {"created": time, "licence": licence, "style": None}
    unknown = dict.fromkeys(("kind", "expected", "wording", "misleads", "wrong"))  # for the sample site alone
    zero = {"score": 0, "votes": 0, "accepted": False, "owner_id": None}
    assert row == {
        "site": "unix.example", "id": 999, "title": "List files", "text": "List files\n\nHow?", "tags": [],
        "owner_id": None, "created": time, "licence": licence, "cluster": "unix.example/999", **unknown,
        "answers": [
            both | zero | {"id": 1000, "text": "Answer 1000."},
            both | {"id": 1001, "text": "Answer 1001.", "score": 3, "votes": 2, "accepted": True}
            | {"owner_id": 5},
        ],
    }  # fmt: skip


def test_twice_the_same_bytes(layout, two_sites):
    first = run(two_sites, layout).metrics
    before = outs(layout)
    assert set(before) == OUTS
    assert (run(two_sites, layout).metrics, outs(layout)) == (first, before)


def test_order_of_the_names_does_not_matter(layout, two_sites):
    run(two_sites, layout)
    before = outs(layout)
    run(params(*two_sites.data.source[::-1]), layout)
    assert outs(layout) == before


def test_another_site_moves_no_question(layout, two_sites):
    run(params("unix.example.Posts.xml"), layout)
    alone = {row["id"]: name for name, rows in tables(layout).items() for row in rows}
    run(two_sites, layout)
    together = {
        row["id"]: name
        for name, rows in tables(layout).items()
        for row in rows
        if row["site"] == "unix.example"
    }
    assert together == alone


def test_look_alikes_share_a_split(layout, xml, site, question, answer):
    alike = [question(5000 + 10 * i, Title=f"{2010 + i} moderator election!") for i in range(9)]
    answers = [answer(post["Id"] + j, post["Id"]) for post in alike for j in (1, 2)]
    (layout.root / "data/raw/unix.example.Posts.xml").write_bytes(xml([*site(60), *alike, *answers]))
    run(params("unix.example.Posts.xml"), layout)
    homes = {name for name, rows in tables(layout).items() for row in rows if row["id"] >= 5000}
    assert homes == {split_of("unix.example", 5000, SHARES)}


def test_min_answers(layout, two_sites):
    metrics = run(params("art.example.7z", min_answers=3), layout).metrics
    assert metrics["questions"] == 40
    with pytest.raises(ValueError, match=r"unix\.example\.Posts\.xml: none of its 60 questions has 3 usable"):
        run(params(*two_sites.data.source, min_answers=3), layout)


BAD = {
    "truncated": (lambda text: text[: len(text) // 2], r"row 91: not a well-formed"),
    "doctype": (lambda text: text.replace(b"<posts>", b"<!DOCTYPE posts><posts>"), "declares a DOCTYPE"),
    "encoding": (lambda text: text.replace(b"Answer ", b"R\xe9ponse "), "row 2: not a well-formed UTF-8"),
    "no dump": (lambda text: text.replace(b"posts>", b"users>"), "<users> instead of <posts>"),
    "lonely": (lambda text: text.replace(b'ParentId="', b'ParentId="999'), "none of its 60 questions has 2"),
    "empty": (lambda text: b"", "is empty"),
    "no ids": (
        lambda text: text.replace(b" Id=", b" id="),
        "none of its 180 rows can be read; row 1: no readable Id",
    ),
    "no kinds": (
        lambda text: text.replace(b"PostTypeId=", b"Type="),
        "left out first: row 1: no readable PostTypeId",
    ),
    "no votes": (
        lambda text: text.replace(b"Score=", b"score="),
        "left out first: row 1: no readable Score; it has",
    ),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_one_line_and_leaves_earlier_outs(layout, two_sites, xml, site, case):
    run(two_sites, layout)
    before = outs(layout)
    damage, message = BAD[case]
    path = layout.root / "data/raw/zoo.example.Posts.xml"  # read last, when the good ones have been
    path.write_bytes(damage(xml(site(60))))
    with pytest.raises(ValueError, match=rf"^\S*zoo\.example\.Posts\.xml: [^\n]*{message}[^\n]*$"):
        run(params(*two_sites.data.source, path.name), layout)
    assert outs(layout) == before


def test_what_is_lost_while_reading_is_counted_and_said(layout, xml, site, capsys):
    """One bad character, byte, row or link of a site is lost alone; the rest comes out as without it."""
    raw = layout.root / "data" / "raw"
    good, links = (
        xml(site(60)),
        xml([{"PostId": 1, "RelatedPostId": 4, "LinkTypeId": 3}] * 9, root="postlinks"),
    )
    (raw / "a.example.Posts.xml").write_bytes(good)
    run(params("a.example.Posts.xml"), layout)
    before = outs(layout)
    bad = good.replace(b"Answer 2.", b"Answer &#x0E;2.").replace(b"Answer 3.", b"An\x00swer 3.")
    bad = bad.replace(b"</posts>", b'<row Id="5000" PostTypeId="2" & />\n</posts>')
    (raw / "a.example.Posts.xml").write_bytes(bad)
    metrics = run(params("a.example.Posts.xml"), layout).metrics
    assert {k: v for k, v in outs(layout).items() if k != "card.md"} == {
        k: v for k, v in before.items() if k != "card.md"
    }
    assert (metrics["dropped_characters"], metrics["drops/malformed_row"]) == (2, 1)
    said = "a.example.Posts.xml: row 181: not well-formed"
    assert f"data: {said}" in capsys.readouterr().out
    card = layout.artifact("data", "card.md").read_text()
    assert f"\n- {said}" in card
    assert "\n- characters that XML forbids, dropped: 2\n" in card
    assert "\n| row that is no well-formed XML, no JSON object, or cannot be decoded | 1 |\n" in card
    damaged = links.replace(b'<row PostId="1"', b'<row PostId="one"', 1)
    damaged = damaged.replace(b'LinkTypeId="3" />', b'LinkTypeId="3" X="&#1;" />', 1).replace(
        b"</post", b"<row &/></post"
    )
    (raw / "a.example.PostLinks.xml").write_bytes(damaged)
    with_links = params("a.example.Posts.xml", "a.example.PostLinks.xml")
    metrics = run(with_links, layout).metrics
    assert (metrics["dropped_characters"], metrics["dropped_links"]) == (3, 2)
    assert metrics["rows"] == metrics["questions"] + metrics["answers"] + sum(
        value for key, value in metrics.items() if key.startswith("drops/")
    )
    for bad, words in (
        (
            links.replace(b"RelatedPostId", b"relatedpostid"),
            "none of its 9 rows can be read; row 1: no readable Rel",
        ),
        (links.decode().encode("utf-16"), "is UTF-16 text"),
        (links.replace(b"postlinks", b"links"), "no dump of postlinks: <links> instead of <postlinks>"),
    ):
        (raw / "a.example.PostLinks.xml").write_bytes(bad)
        with pytest.raises(ValueError, match=rf"^\S*a\.example\.PostLinks\.xml: [^\n]*{words}[^\n]*$"):
            run(with_links, layout)


OTHER_FILES = {
    "a.example.7z": (
        b"version https://git-lfs.github.com/spec/v1\n",
        "is a Git LFS pointer: the file itself was not",
    ),
    "a.example.Posts.xml.xz": (b"<html><body>404</body></html>", "is an HTML page"),
    "a.example.Posts.xml.gz": (lzma.compress(b"<posts/>"), r"is xz under the name of a \.gz file"),
    "a.example.Posts.xml.bz2": (b"<posts/>", "is no bzip2, or damaged from its first byte on"),
    "a.example.Posts.xml": (
        b"7z\xbc\xaf\x27\x1c" + bytes(99),
        r"is a 7z archive under the name of an \.xml file",
    ),
    "my.parquet": (b"", "is empty"),
    "my.jsonl": ('{"prompt": "a"}\n'.encode("utf-16"), "is UTF-16 text"),
    "my.jsonl.gz": (gzip.compress(gzip.compress(b"{}")), "its content is gzip, no JSON"),
    "b.example.Posts.xml.gz": (
        gzip.compress("<posts/>".encode("utf-16")),
        "its content is UTF-16 text; no dump",
    ),
    "my.json": (b"PAR1" + bytes(99), r"is Parquet under the name of a \.json file"),
}


@pytest.mark.parametrize("name", OTHER_FILES)
def test_a_file_that_is_something_else_is_called_by_its_name(layout, xml, site, name):
    content, words = OTHER_FILES[name]
    (layout.root / "data/raw" / name).write_bytes(content)
    with pytest.raises(ValueError, match=rf"^\S*{name}: {words}[^\n]*$"):
        run(params(name), layout)


def test_missing_file_and_empty_list(layout):
    with pytest.raises(ValueError, match=r"^data\.source: \S*gone\.7z is missing"):
        run(params("gone.7z"), layout)
    nothing = Params.model_construct(data=Params().data.model_copy(update={"source": ()}))
    with pytest.raises(ValueError, match=r"^data\.source is an empty list"):
        run(nothing, layout)
    assert outs(layout) == {}


def test_an_empty_split_is_an_error(layout, xml, site):
    (layout.root / "data/raw/a.example.xml").write_bytes(xml(site(4)))
    with pytest.raises(ValueError, match=r"^data\.split\.\w+: .*\(sft \d, reward \d, rl \d, eval \d\)$"):
        run(params("a.example.xml"), layout)
    (layout.root / "data/raw/a.example.xml").write_bytes(xml(site(100)))
    tiny = {"sft": 1.0, "reward": 1e-12, "rl": 1.0, "eval": 1.0}
    with pytest.raises(ValueError, match=r"^data\.split\.reward: .*reward 0"):
        run(params("a.example.xml", split=tiny), layout)
    assert outs(layout) == {}


@pytest.mark.parametrize("failing", range(4))
def test_a_full_disk_leaves_all_earlier_outs(layout, two_sites, monkeypatch, failing):
    run(two_sites, layout)
    before = outs(layout)
    calls = []

    class Full(TableWriter):
        def __exit__(self, error, *more):
            super().__exit__(error, *more)
            calls.append(error)
            if error is None and len(calls) > failing:
                raise OSError(28, "No space left on device")

    monkeypatch.setattr(stage, "TableWriter", Full)
    with pytest.raises(OSError, match="No space left"):
        run(params("unix.example.Posts.xml"), layout)
    assert outs(layout) == before


def test_sample_site(layout, capsys):
    small = params(sample={"questions": 300})
    metrics = run(small, layout).metrics
    found = tables(layout)
    assert metrics["questions"] > 250
    assert metrics["sample/ceiling"] > 0.9
    assert "ceiling 0.9" in capsys.readouterr().out
    for name in ("sft", "reward", "rl"):
        assert {(row["kind"], row["expected"]) for row in found[name]} == {(None, None)}
    assert all(row["kind"] and row["expected"] for row in found["eval"])
    right = [row for row in found["eval"] if any(f"`{row['expected']}`" in a["text"] for a in row["answers"])]
    assert len(right) > len(found["eval"]) / 2
    assert not list(layout.scratch("data").glob("*"))
    before = outs(layout)
    run(small, layout)
    assert outs(layout) == before
    run(small.model_copy(update={"seed": 1}), layout)
    assert outs(layout) != before


def test_parquet_says_nothing_that_varies(layout, two_sites):
    run(two_sites, layout)
    file = pq.ParquetFile(layout.artifact("data", "sft.parquet"))
    assert file.metadata.row_group(0).column(3).compression == "ZSTD"
    assert file.schema_arrow.metadata is None
    assert file.metadata.created_by == f"parquet-cpp-arrow version {pa.__version__}"
    assert set(file.metadata.metadata or {}) <= {b"ARROW:schema"}


def test_the_proof_reads_what_was_written(layout, two_sites, monkeypatch):
    """A router that ignores clusters is caught, and nothing takes its place."""
    run(two_sites, layout)
    before = outs(layout)
    raw = layout.root / "data" / "raw"
    (raw / "zoo.example.xml").write_bytes((raw / "unix.example.Posts.xml").read_bytes())
    wrong = {"unix.example": "sft", "zoo.example": "eval", "art.example": "rl"}
    odd = {0: "reward"}
    monkeypatch.setattr(stage.Homes, "next", lambda self, site, number: odd.get(number % 5, wrong[site]))
    with pytest.raises(RuntimeError, match="stand in two splits"):
        run(params(*two_sites.data.source, "zoo.example.xml"), layout)
    assert outs(layout) == before


@pytest.mark.parametrize("processes", [1, 2])
def test_other_processes_change_nothing(layout, two_sites, monkeypatch, processes):
    run(two_sites, layout)
    before = outs(layout)
    monkeypatch.setattr(stage, "INLINE_CHARACTERS", 0)
    monkeypatch.setattr("tasks.data.cut.BLOCK_BYTES", 5000)
    monkeypatch.setattr("tasks.data.deal.CHARACTERS_PER_BUCKET", 1000)
    threads = two_sites.machine.model_copy(update={"threads": processes})
    run(two_sites.model_copy(update={"machine": threads}), layout)
    assert outs(layout) == before


def test_what_is_joined_in_parts_is_as_if_in_one(layout, xml, site, answer, monkeypatch):
    """Ids far apart, negative and given twice: each falls into some part, and into one."""
    rows = [row for start in range(1, 60_000, 5000) for row in site(6, first=start)]
    rows += [answer(-70_000, 1), answer(90_001, 5001), answer(90_001, 10_001), answer(90_002, 77_777)]
    (layout.root / "data/raw/unix.example.Posts.xml").write_bytes(xml(rows))
    given = params("unix.example.Posts.xml", split=dict.fromkeys(SPLITS, 1.0))
    metrics = run(given, layout).metrics
    before = outs(layout)
    assert (metrics["questions"], metrics["answers"]) == (72, 2 * 72 + 2)
    assert (metrics["drops/duplicate_id"], metrics["drops/orphan_answer"]) == (1, 1)
    monkeypatch.setattr("tasks.data.engine.ROWS_PER_PART", 20)
    assert run(given, layout).metrics == metrics
    assert outs(layout) == before


def test_card_and_lineage_go_to_the_run(layout, two_sites, monkeypatch):
    logged = []
    monkeypatch.setattr(stage, "log_artifact", lambda path: logged.append((path, path.exists())))
    monkeypatch.setattr(stage, "log_dataset", lambda path, *more: logged.append((path, path.exists(), *more)))
    metrics = run(two_sites, layout).metrics
    assert logged[0] == (layout.artifact("data", "card.md"), True)
    origin = "unix.example.Posts.xml, art.example.7z"
    for name, found in zip(SPLITS, logged[1:5], strict=True):
        counts = {what: metrics[f"{name}/{what}"] for what in ("questions", "answers", "pairs")}
        assert found == (layout.artifact("data", f"{name}.parquet"), True, name, origin, counts)
    raw = layout.root / "data" / "raw"
    sources = (("art.example", "art.example.7z"), ("unix.example", "unix.example.Posts.xml"))
    wanted = [
        (raw / file, True, "raw", site, {"bytes": (raw / file).stat().st_size}) for site, file in sources
    ]
    assert logged[5:] == wanted

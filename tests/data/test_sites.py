"""Whole sites held out, on made sites and on real ones."""

import json
import random
from collections import Counter

import pytest
from test_data_stage import SHARES, SPLITS, outs, params, tables

from tasks.data import run, stage
from tasks.data.split import marks, split_of

TRAINING = {name: share for name, share in SHARES.items() if name != "eval"}
BODY = "<p>One two three four five six seven {}.</p>"


def by_site(*source: str, held_out: tuple[str, ...], **data: object):
    return params(*source, split_by="site", eval_sites=held_out, **data)


@pytest.fixture
def write(layout, xml, question, answer):
    """write("art.example", {1: (title, body), …}): a dump in data/raw, two answers to each -> its name."""

    def function(site: str, questions: dict[int, tuple[str, str]]) -> str:
        asked = [question(n, Title=title, Body=body) for n, (title, body) in questions.items()]
        answers = [answer(10_000 + 2 * n + place, n) for n in questions for place in (0, 1)]
        (layout.root / "data/raw" / f"{site}.Posts.xml").write_bytes(xml([*asked, *answers]))
        return f"{site}.Posts.xml"

    return function


def plain(site: str, count: int) -> dict[int, tuple[str, str]]:
    return {number: (f"{site} {number}", "<p>How?</p>") for number in range(1, count + 1)}


@pytest.fixture
def three_sites(write) -> tuple[str, ...]:
    """art's 90 asks as unix's 90 does, which asks as its 91; zoo's 90 and 91 ask the same; 40 more each."""
    art = plain("art", 40) | {90: ("Which brush?", BODY.format("eight"))}
    unix = plain("unix", 40) | {90: ("A", BODY.format("EIGHT")), 91: ("a!", BODY.format("nine"))}
    zoo = plain("zoo", 40) | {90: ("Which cage?", "<p>x</p>"), 91: ("Which cage", "<p>y</p>")}
    return write("art.example", art), write("unix.example", unix), write("zoo.example", zoo)


@pytest.mark.parametrize("held_out", [("art.example",), ("unix.example",), ("zoo.example", "art.example")])
def test_eval_is_all_of_the_held_out_sites_and_nothing_else(layout, three_sites, held_out):
    metrics = run(by_site(*three_sites, held_out=held_out), layout).metrics
    found = tables(layout)
    sizes = {"art.example": 41, "unix.example": 42, "zoo.example": 42}
    assert Counter(row["site"] for row in found["eval"]) == {site: sizes[site] for site in held_out}
    learnt = {(row["site"], row["id"]): name for name in TRAINING for row in found[name]}
    assert not {site for site, _ in learnt} & set(held_out)
    alike = {("unix.example", 90), ("unix.example", 91), ("art.example", 90)}
    left_out = alike if {"art.example", "unix.example"} & set(held_out) else set()
    wanted = {(site, n) for site in sizes if site not in held_out for n in (*range(1, 41), 90, 91)}
    assert learnt.keys() == wanted - left_out - {("art.example", 91)}
    first = {key: key for key in learnt} | {("zoo.example", 91): ("zoo.example", 90)}
    if not left_out:
        first |= dict.fromkeys(alike, ("art.example", 90))
    assert learnt == {key: split_of(*first[key], TRAINING) for key in learnt}
    assert metrics["moved"] == sum(split_of(*key, TRAINING) != name for key, name in learnt.items())


def test_what_is_left_out_is_counted_and_said(layout, three_sites):
    metrics = run(by_site(*three_sites, held_out=("art.example",)), layout).metrics
    drops = {key.removeprefix("drops/"): n for key, n in metrics.items() if key.startswith("drops/") and n}
    assert drops == {"like_held_out": 2, "answer_of_dropped_question": 4}
    assert metrics["rows"] == metrics["questions"] + metrics["answers"] + sum(drops.values())
    assert metrics["held_out/art.example"] == metrics["eval/questions"] == 41
    assert [metrics[f"overlap/{kind}"] for kind in ("id", "title", "body")] == [0, 0, 0]
    card = layout.artifact("data", "card.md").read_text()
    assert "split by site. **Held out:** eval is all of art.example and nothing else" in card
    assert "left out of training (2)." in card
    assert "\n| question that resembles one of a held-out site (data.eval_sites) | 2 |\n" in card
    run(params(*three_sites), layout)
    assert "eld out:" not in layout.artifact("data", "card.md").read_text()


def test_no_look_alike_of_a_held_out_question_is_learnt_from(layout, write):
    """Titles and bodies at random, shared a lot; what may be learnt from is found by hand, mark by mark."""
    draw = random.Random(1)
    sites = {site: {} for site in ("a.example", "b.example", "c.example")}
    for questions in sites.values():
        for number in range(1, 121):
            body = f"one two three four five six seven b{draw.randrange(600)}"
            questions[number] = (f"t{draw.randrange(600)}", body)
    files = [write(site, found) for site, found in sites.items()]
    metrics = run(by_site(*files, held_out=("b.example",)), layout).metrics
    of_key = {(site, n): set(marks([q])[0]) for site, found in sites.items() for n, q in found.items()}
    near = {key for key in of_key if key[0] == "b.example"}
    size = 0
    while len(near) > size:  # whoever shares a title or a body with one of them, and so on
        size, shared = len(near), set().union(*(of_key[key] for key in near))
        near |= {key for key, found in of_key.items() if found & shared}
    learnt = {(row["site"], row["id"]) for name in TRAINING for row in tables(layout)[name]}
    assert learnt == of_key.keys() - near
    assert metrics["drops/like_held_out"] == len(near) - 120 > 50 < len(learnt)


SITES = r"art\.example, unix\.example, zoo\.example"
BAD = {
    "no such site": (("art.example", "Unix"), f"'Unix' is no site of data.source, which has {SITES}"),
    "a file's name": (("art.example.Posts.xml",), "'art.example.Posts.xml' is no site of data.source, which"),
    "all of them": (
        ("zoo.example", "art.example", "unix.example"),
        rf"every site of data\.source is held out \({SITES}\); none is left",
    ),
}


@pytest.mark.parametrize("case", BAD)
def test_a_site_is_refused_before_a_dump_is_read(layout, three_sites, monkeypatch, case):
    run(params(*three_sites), layout)
    before = outs(layout)
    held_out, words = BAD[case]
    monkeypatch.setattr(stage, "read_dump", None)
    with pytest.raises(ValueError, match=rf"^data\.eval_sites: {words}[^\n]*$"):
        run(by_site(*three_sites, held_out=held_out), layout)
    assert outs(layout) == before


def test_an_empty_split_names_what_was_held_out(layout, three_sites, write):
    run(params(*three_sites), layout)
    before = outs(layout)
    tiny = write("tiny.example", plain("tiny", 2))
    words = (
        r"no question fell into it with data\.eval_sites \(art\.example\) held out \(sft \d, .* eval 41\)$"
    )
    with pytest.raises(ValueError, match=rf"^data\.split\.\w+: {words}"):
        run(by_site(three_sites[0], tiny, held_out=("art.example",)), layout)
    assert outs(layout) == before


def rows_of(site: str, count: int = 40) -> list[dict]:
    answers = [{"text": "Yes.", "score": 2}, {"text": "No.", "score": 1}]
    return [{"site": site, "question": f"{site} {n}", "answers": answers} for n in range(count)]


def test_sites_that_stand_in_the_rows(layout):
    raw = layout.root / "data/raw/mine.jsonl"
    lonely = [{"site": "c.example", "question": "alone", "answers": [{"text": "Yes.", "score": 2}]}]
    alike = [row | {"site": "a.example"} for row in rows_of("b.example", 3)]
    rows = [*rows_of("b.example"), *rows_of("a.example"), *rows_of(""), *lonely, *alike]
    raw.write_text("\n".join(map(json.dumps, rows)))
    metrics = run(by_site("mine.jsonl", held_out=("b.example",)), layout).metrics
    found = tables(layout)
    assert Counter(row["site"] for row in found["eval"]) == {"b.example": 40}
    assert Counter(row["site"] for n in TRAINING for row in found[n]) == {"a.example": 40, "mine": 40}
    assert metrics["drops/like_held_out"] == 3
    before = outs(layout)
    for site, words in {
        "d.example": r"'d\.example' is no site of data\.source, which has a\..*, b\..*, c\.example, mine$",
        "c.example": r"none of the 1 questions of c\.example has 2 usable answers \(data\.min_answers\)$",
    }.items():
        with pytest.raises(ValueError, match=rf"^data\.eval_sites: {words}"):
            run(by_site("mine.jsonl", held_out=("b.example", site)), layout)
    assert outs(layout) == before


@pytest.mark.parametrize("held_out", ["coffee.stackexchange.com", "datascience.meta.stackexchange.com"])
def test_real_sites(layout, dumps, held_out):
    names = ["main/3dprinting", "main/datascience.meta", "small/coffee"]
    for name in names:
        path = dumps / f"{name}.stackexchange.com.Posts.xml.xz"
        (layout.root / "data/raw" / path.name).symlink_to(path)
    files = sorted(path.name for path in (layout.root / "data/raw").iterdir())
    everything = run(params(*files), layout).metrics["questions"]
    metrics = run(by_site(*files, held_out=(held_out,)), layout).metrics
    found = tables(layout)
    assert {row["site"] for row in found["eval"]} == {held_out}
    assert held_out not in {row["site"] for name in TRAINING for row in found[name]}
    assert metrics["questions"] + metrics["drops/like_held_out"] == everything
    assert {name for name in SPLITS if not found[name]} == set()

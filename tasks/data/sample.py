"""The sample site: a deterministic StackExchange site in the official dump format.

A program can check its answers.

The world is small on purpose: eight kinds of question over 36 *keys* each (a town's river, 3 × 7, the last
letter of a word …; `tasks/data/world.py`), asked in ever new wordings (`tasks/data/wordings.py`). A model of
one million parameters can learn these keys from a few thousand answers; it cannot learn arithmetic. Held out
are, for each key, *new wordings*, which no training split holds for any key, and a *known wording* in which
training never asks for this key.

Half of the answers are right. For every second key one *misconception* is more frequent than the truth, so
that imitation (SFT) repeats it and only the votes tell it apart. Quality orders answers by correctness
first, then, a little, by style (clear, plain, padded); styles have equal lengths, so that longer is not
better, and values are right as often as wrong, so that an answer does not say what it is worth to a reader
who skips the question. Votes are `2^(quality + noise) − 1`: the published score `round(log2(1 + votes))`
then sees quality through noise.
"""

from __future__ import annotations

import json
import math
import random
from datetime import datetime, timedelta
from itertools import combinations
from pathlib import Path
from xml.sax.saxutils import quoteattr

from tasks.data.wordings import BODIES, KNOWN, NEW, OPENERS
from tasks.data.world import Key, world

SITE = "sample.stackrl.example"
QUALITY_NOISE = 0.3  # standard deviation of log2(1 + votes) around the true quality
RIGHT, STYLE = 3.0, 0.1  # quality of a right answer, and of a step in style
RIGHT_SHARE = {False: 0.65, True: 0.35}  # of the answers; True: the key has a misconception
MISCONCEPTION_SHARE = {False: 0.15, True: 0.50}  # the rest is spread over the other wrong values
NEW_SHARE = 2 / 3  # of the held-out questions: asked in a new wording

# Three lengths of each style, the same on average in every style: longer is not better.
STYLES = {
    "clear": (
        "<p>It is <code>{0}</code>.</p>",
        "<p>The answer is <code>{0}</code>.</p>",
        "<p>I checked: it is <code>{0}</code>.</p>",
    ),
    "plain": (
        "<p>I say <code>{0}</code>.</p>",
        "<p>As I recall <code>{0}</code>.</p>",
        "<p>From memory I say <code>{0}</code>.</p>",
    ),
    "padded": (
        "<p>Um, <code>{0}</code>.</p>",
        "<p>Hm, perhaps <code>{0}</code>?</p>",
        "<p>Well, who can say, <code>{0}</code>?</p>",
    ),
}
STEPS = {"clear": 1, "plain": 0, "padded": -1}


def draw_value(key: Key, draw: random.Random) -> str:
    """A value someone would answer: right, the key's misconception, or another wrong one."""
    chance = draw.random()
    if chance < RIGHT_SHARE[key.misleads]:
        return key.value
    if chance < RIGHT_SHARE[key.misleads] + MISCONCEPTION_SHARE[key.misleads]:
        return key.wrong[0]
    return draw.choice(key.wrong[1:])


def votes_of(quality: float, noise: float) -> int:
    """Net votes such that log2(1 + votes) is quality + noise; the worst answers go below zero."""
    level = quality + noise
    return round(2**level) - 1 if level > -0.5 else -max(1, round(-2 * level))


def quality_of(is_right: bool, style: str) -> float:
    """What votes see through noise, log2(1 + votes)."""
    return RIGHT * is_right + STYLE * STEPS[style]


def asked(questions: int, held_out: float, draw: random.Random) -> list[tuple[Key, str, str, bool]]:
    """Key, title, wording (known or new) and whether it is held out, of each question, shuffled.

    Args:
        questions: how many.
        held_out: share of them; of these two thirds are asked in a new wording.
        draw: shuffles.

    Raises:
        ValueError: more questions than there are different titles.
    """
    titles: dict[str, list[tuple[Key, str]]] = {"training": [], "known": [], "new": []}
    for number, key in enumerate(world()):
        apart = number % len(KNOWN[key.kind])  # the known wording in which training never asks for this key
        for place, wording in enumerate((*KNOWN[key.kind], *NEW[key.kind])):
            part = "known" if place == apart else "training" if place < len(KNOWN[key.kind]) else "new"
            titles[part] += [(key, opener + wording.format(*key.slots)) for opener in OPENERS]
    kept_back = round(questions * held_out)
    new = round(kept_back * NEW_SHARE)
    counts = {"training": questions - kept_back, "known": kept_back - new, "new": new}
    found = []
    for part, count in counts.items():
        if count > len(titles[part]):
            raise ValueError(
                f"data.sample.questions ({questions}) asks for {count} titles ({part}), the sample site has "
                f"{len(titles[part])}"
            )
        wording = "new" if part == "new" else "known"
        found += [(*one, wording, part != "training") for one in draw.sample(titles[part], count)]
    return draw.sample(found, len(found))


def write_site(folder: Path, questions: int, seed: int, held_out: float = 0.1) -> dict[str, float]:
    """Write `<folder>/sample.stackrl.example/Posts.xml` and, beside it, `expected.jsonl`.

    `expected.jsonl` holds one row per question: {"question_id", "kind", "expected", "cluster",
    "wording", "misleads", "wrong", "styles" (by answer id), "held_out"}. The dump has what real sites have:
    owners, deleted owners, tags, acceptance, code blocks, negative answers, orphans, wiki posts.

    Args:
        folder: where the site's folder is made.
        questions: how many questions; every title is new.
        seed: the same seed writes the same bytes.
        held_out: share of the questions that no training split may hold.

    Returns:
        What the site is: questions, answers, share of right answers, and `ceiling`, the accuracy of the true
        order of quality on pairs whose published scores differ; where qualities tie it guesses, right half
        the time.

    Raises:
        ValueError: more questions than there are different titles.
    """
    draw = random.Random(seed)
    site = _Site(draw)
    for key, title, wording, is_held_out in asked(questions, held_out, draw):
        site.ask(key, title, wording, is_held_out)
    site.litter()
    target = folder / SITE
    target.mkdir(parents=True, exist_ok=True)
    (target / "Posts.xml").write_text(site.dump(), encoding="utf-8", newline="")
    (target / "expected.jsonl").write_text(
        "".join(json.dumps(row) + "\n" for row in site.expected), encoding="utf-8"
    )
    return site.facts()


class _Site:
    """Posts as they are written, in order of their ids."""

    def __init__(self, draw: random.Random) -> None:
        self.draw = draw
        self.rows: list[dict[str, str]] = []
        self.expected: list[dict[str, object]] = []
        self.groups: list[list[tuple[float, int]]] = []  # of each answer: true quality, published score
        self.right = 0
        self.clock = datetime(2020, 1, 1)

    def _post(self, kind: int, score: int, body: str, **more: str) -> dict[str, str]:
        self.clock += timedelta(minutes=self.draw.randint(1, 50))
        owner = {"OwnerUserId": str(self.draw.randint(1, 400))}
        if self.draw.random() < 0.02:
            owner = {"OwnerDisplayName": f"user{self.draw.randint(1000, 9999)}"}
        row = {"Id": str(len(self.rows) + 1), "PostTypeId": str(kind), **more}
        row |= {
            "CreationDate": self.clock.isoformat(timespec="milliseconds"),
            "Score": str(score),
            "Body": body,
            **owner,
        }
        self.rows.append(row | {"ContentLicense": "CC BY-SA 4.0"})
        return self.rows[-1]

    def ask(self, key: Key, title: str, wording: str, is_held_out: bool) -> None:
        """One question with two to five answers."""
        draw = self.draw
        question = self._post(
            1, draw.randint(-1, 9), draw.choice(BODIES), Title=title, Tags=f"<{key.kind}><sample>"
        )
        answers, styles = [], {}
        for _ in range(draw.choice((2, 3, 3, 4, 4, 5))):
            value, style = draw_value(key, draw), draw.choice(tuple(STYLES))
            quality = quality_of(value == key.value, style)
            votes = votes_of(quality, draw.gauss(0, QUALITY_NOISE))
            body = draw.choice(STYLES[style]).format(value)
            row = self._post(2, votes, body, ParentId=question["Id"])
            answers.append((quality, votes, row["Id"]))
            styles[row["Id"]] = style
            self.right += value == key.value
        right = [number for quality, _, number in answers if quality > RIGHT / 2]
        accepted = right[0] if len(right) == 1 and draw.random() < 0.6 else None  # of two, style would decide
        if accepted:
            question["AcceptedAnswerId"] = accepted
        question["AnswerCount"] = str(len(answers))
        self.groups.append([(q, _score(v, i == accepted)) for q, v, i in answers])
        self.expected.append(
            {
                "question_id": int(question["Id"]),
                "kind": key.kind,
                "expected": key.value,
                "cluster": key.name,
                "wording": wording,
                "misleads": key.misleads,
                "wrong": sorted(set(key.wrong)),
                "styles": styles,
                "held_out": is_held_out,
            }
        )

    def litter(self) -> None:
        """What real dumps have besides questions and answers: orphans, tag wikis, an empty answer."""
        count = max(1, len(self.groups) // 300)
        for _ in range(count):
            self._post(
                2, 1, "<p>Deleted question.</p>", ParentId=str(10_000_000 + self.draw.randint(0, 10**6))
            )
            self._post(4, 0, "<p>About this tag.</p>")
            self._post(5, 0, "<p>A longer text about this tag.</p>")
        self._post(2, 0, "", ParentId=str(self.expected[0]["question_id"]))

    def dump(self) -> str:
        """The official format: one `row` element per post, CRLF, a byte-order mark."""
        lines = [
            "  <row " + " ".join(f"{k}={quoteattr(v, _ESCAPES)}" for k, v in row.items()) + " />"
            for row in self.rows
        ]
        return "\ufeff" + "\r\n".join(
            ['<?xml version="1.0" encoding="utf-8"?>', "<posts>", *lines, "</posts>", ""]
        )

    def facts(self) -> dict[str, float]:
        """Counts and the ceiling."""
        pairs = [(a, b) for group in self.groups for a, b in combinations(group, 2) if a[1] != b[1]]
        agree = sum(
            0.5 * (1 + math.copysign(1, a[1] - b[1]) * ((a[0] > b[0]) - (a[0] < b[0]))) for a, b in pairs
        )
        answers = sum(map(len, self.groups))
        return {"questions": len(self.groups), "answers": answers, "right_share": self.right / answers,
                "pairs": len(pairs), "ceiling": agree / len(pairs) if pairs else math.nan}  # fmt: skip


_ESCAPES = {"\n": "&#xA;", "\r": "&#xD;", "\t": "&#x9;"}


def _score(votes: int, accepted: bool) -> int:
    """The published score, for the ceiling alone (the stage computes its own)."""
    return -1 if votes < 0 else round(math.log2(1 + votes)) + accepted

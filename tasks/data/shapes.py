"""Public shapes of preference data -> posts. A new shape is one function and one line in `SHAPES`.

A shape without ids gets them from its texts by hash, so that they are the same in every file and order; one
without votes carries its score in their place.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from hashlib import sha256
from typing import Any

from tasks.data.damage import Damage
from tasks.data.dialogue import Turn, Unreadable, answered, question_of, string
from tasks.data.pairs import Pairs, levels, site_of_row
from tasks.data.posts import licence_of
from tasks.data.records import Post
from tasks.data.shelf import Shelf
from tasks.data.sources import DumpError, Source
from tasks.data.tables import read_table

Row = Mapping[str, Any]
Group = tuple[str, list[Post]]  # site ("" for the file's own), the question and its answers
Shape = Callable[[Row], Group]
UNSTATED = "unstated"
SCORES = (
    ("score_chosen", "score_rejected"),
    ("chosen_rating", "rejected_rating"),
    ("chosen-rating", "rejected-rating"),
)
DATE = re.compile(r"[0-9]{4}([-/])[0-9]{2}\1[0-9]{2}(?![0-9])")
FORBIDDEN = re.compile("[\x00-\x08\x0b\x0c\x0e-\x1f\ud800-\udfff\ufffe\uffff]")  # as in a dump (`repair`)


def read_shape(source: Source, shelf: Shelf) -> set[str]:
    """Put every row of a table on the shelf; returns the sites met.

    Raises:
        DumpError: see `tasks.data.tables.read_table`; or not one row can be read, and what the first lacks.
    """
    damage, sites = Damage(), set()
    for number, row, shape in _shaped(read_table(source, damage), shelf, damage):
        try:
            site, posts = shape(row)
        except (KeyError, TypeError, ValueError, AttributeError, OverflowError) as error:
            damage.drop(*_fault(error, number, row))
            continue
        shelf.site = FORBIDDEN.sub("", site) or source.site
        sites.add(shelf.site)
        for post in posts:
            shelf.add(_without_forbidden(post, damage))
    shelf.flush()
    shelf.lose(source.path, damage)
    if not sites:
        lost = damage.drops.total()
        words = f"none of its {lost:,} rows can be read; {damage.earliest()}" if lost else "no row at all"
        raise DumpError(f"{source.path}: {words}")
    return sites


def _shaped(
    rows: Iterator[tuple[int, Row]], shelf: Shelf, damage: Damage
) -> Iterator[tuple[int, Row, Shape]]:
    """Each row with its number and shape; rows of one pair last, a question's together."""
    pairs: Pairs | None = None
    for number, row in rows:
        has = {name: value for name, value in row.items() if value is not None}
        shape = next((shape for columns, shape in SHAPES if columns <= set(has)), None)
        if shape is None:
            known = "; ".join(", ".join(sorted(columns)) for columns, _ in SHAPES)
            null = "".join(f"; null: {name}" for name in row if name not in has)
            damage.drop(
                "unreadable_row", number, f"its columns ({', '.join(has)}{null}) are none of: {known}"
            )
        elif shape is paired:
            pairs = pairs or Pairs(shelf.folder)
            try:
                pairs.add(number, row)
            except ValueError as error:
                damage.drop(*_fault(error, number, row))
        else:
            yield number, row, shape
    for number, row in pairs.questions() if pairs else ():
        yield number, row, paired


def _fault(error: Exception, number: int, row: Row) -> tuple[str, int, str]:
    """Reason, row and words of a row that a shape cannot read."""
    reason, words = "unreadable_row", f"{type(error).__name__} {error}"
    if isinstance(error, Unreadable):
        reason, words = error.args
    elif isinstance(error, KeyError):
        words = f"no {error}"
    return reason, number, f"{words}; its columns are {', '.join(map(str, row))}"


def _without_forbidden(post: Post, damage: Damage) -> Post:
    for name in ("title", "text", "created", "licence"):
        value, count = FORBIDDEN.subn("", getattr(post, name))
        if count:
            damage.dropped_characters += count
            post = replace(post, **{name: value})
    return post


def preferences(row: Row) -> Group:
    """HuggingFaceH4/stack-exchange-preferences: HTML, scores as published."""
    created, site = _date(row), site_of_row(row)
    answers = list(row["answers"])
    accepted = next((int(answer["answer_id"]) for answer in answers if answer["selected"]), None)
    question = _post(int(row["qid"]), row["question"], created, True, accepted_id=accepted)
    return site, [
        question,
        *(
            _post(int(a["answer_id"]), a["text"], created, True, question.id, int(a["pm_score"]),
                  owner_id=_owner(a.get("author_id")))
            for a in answers
        ),
    ]  # fmt: skip


def paired(row: Row) -> Group:
    """lvwerra/stack-exchange-paired: all pairs of a question; an answer scores how many others lie below."""
    created = _date(row)
    number = int(row["qid"])
    site = site_of_row(row)
    try:
        scores = levels([(j, k) for j, k in row["pairs"]])
    except ValueError as error:
        raise Unreadable("contradictory_scores", str(error)) from None
    answers = (
        _post(_hash(site, number, text), text, created, False, number, score)
        for text, score in scores.items()
    )
    return site, [_post(number, row["question"], created, False), *answers]


def grouped(row: Row) -> Group:
    """{question, answers: [{text, score}]}, and title, id, site and licence where there are any."""
    title, text = str(row.get("title") or ""), string(row["question"], "question")
    number = int(row["id"]) if row.get("id") is not None else _hash("question", title, text)
    answers = [(string(answer["text"], "text"), _finite(answer["score"])) for answer in row["answers"]]
    ranks = {score: rank for rank, score in enumerate(sorted({score for _, score in answers}))}
    whole = all(score.is_integer() and abs(score) < 2**31 for score in ranks)  # else only their order travels
    licence = str(row.get("licence") or row.get("license") or UNSTATED)
    posts = [_post(number, text, "", False, title=title, licence=licence)]
    for place, (answer, score) in enumerate(answers):
        posts.append(
            _post(_hash(number, place, answer), answer, "", False, number,
                  int(score) if whole else ranks[score], licence=licence)
        )  # fmt: skip
    return site_of_row(row), posts


def preferred(row: Row) -> Group:
    """A prompt, chosen and rejected, as texts, transcripts or messages (docs/data.md)."""
    names = ("chosen", "rejected")
    values = [row[name] for name in names] if row.get("chosen") is not None else row["output"]
    if not isinstance(values, list) or len(values) != 2:
        raise Unreadable("unreadable_row", "'output' is not a list of two answers, the better and the worse")
    (before, chosen), (other, rejected) = (answered(row, *pair) for pair in zip(values, names, strict=True))
    if _stripped(before) != _stripped(other):
        raise Unreadable("different_prompts", "chosen and rejected part before their last turn")
    prompt = question_of(before)
    number = _hash(prompt, chosen, rejected)
    answers = [_post(_hash(number, 1), chosen, "", False, number, 1)]
    answers.append(_post(_hash(number, 0), rejected, "", False, number, _score_of_rejected(row)))
    return site_of_row(row), [_post(number, prompt, "", False), *answers]


def _stripped(turns: list[Turn]) -> list[Turn]:
    return [(who, what.strip()) for who, what in turns]


def _score_of_rejected(row: Row) -> int:
    """0 beside the chosen one's 1; 1, a tie, where the scores of ultrafeedback or of argilla say so."""
    for better, worse in SCORES:
        chosen, rejected = row.get(better), row.get(worse)
        if not all(isinstance(score, int | float) and math.isfinite(score) for score in (chosen, rejected)):
            continue
        if chosen < rejected:
            raise Unreadable("contradictory_scores", f"{better} {chosen} < {worse} {rejected}")
        return int(chosen == rejected)
    return 0


def rated(row: Row) -> Group:
    """KTO: one answer and whether it is good, `label` or `kto_tag`; answers to one prompt come together."""
    label = row["label"] if row.get("label") is not None else row["kto_tag"]
    if label not in (True, False):
        raise Unreadable("unreadable_row", f"the label is neither true nor false: {label!r}")
    name = next((name for name in ("completion", "response", "output") if row.get(name) is not None), None)
    name = name or ("messages" if row.get("messages") is not None else "conversations")
    rest = {column: value for column, value in row.items() if column != name}
    before, answer = answered(rest, row[name], name)
    prompt = question_of(before)
    number = _hash("prompt", prompt)
    reply = _post(_hash(number, answer, bool(label)), answer, "", False, number, int(label))
    return site_of_row(row), [_post(number, prompt, "", False), reply]


SHAPES: tuple[tuple[frozenset[str], Shape], ...] = (
    (frozenset({"qid", "question", "answers"}), preferences),
    (frozenset({"qid", "question", "response_j", "response_k"}), paired),
    (frozenset({"question", "answers"}), grouped),
    (frozenset({"chosen", "rejected"}), preferred),
    (frozenset({"messages", "label"}), rated),
    (frozenset({"messages", "kto_tag"}), rated),
    (frozenset({"conversations", "label"}), rated),
    (frozenset({"conversations", "kto_tag"}), rated),
    (frozenset({"prompt", "completion", "label"}), rated),
    (frozenset({"prompt", "response", "label"}), rated),
    (frozenset({"instruction", "output", "kto_tag"}), rated),
    (frozenset({"instruction", "output", "label"}), rated),
    (frozenset({"instruction", "output"}), preferred),
)


def _post(
    number: int, text: str, created: str, is_html: bool, parent_id: int | None = None,
    score: int | None = None, *, accepted_id: int | None = None, owner_id: int | None = None,
    title: str = "", licence: str = "",
) -> Post:  # fmt: skip
    for value, bits in ((number, 63), (accepted_id, 63), (owner_id, 63), (score, 31)):
        if value is not None and not -(2**bits) <= value < 2**bits:
            raise Unreadable("unreadable_row", f"{value} takes more than {bits + 1} bits")
    return Post(
        id=number, parent_id=parent_id, accepted_id=accepted_id, votes=score or 0,
        title=" ".join(title.split()), text=string(text, "text"), tags=(), created=created, owner_id=owner_id,
        licence=licence or (licence_of(created).as_py() if created else UNSTATED),
        score=score, is_html=is_html,
    )  # fmt: skip


def _finite(value: Any) -> float:
    number = float(value)
    if not math.isfinite(number):
        raise Unreadable("unreadable_row", f"a score of {number}")
    return number


def _date(row: Row) -> str:
    date = string(row["date"], "date")
    if not DATE.match(date):
        raise Unreadable("unreadable_row", f"'date' is no date: {date!r}")
    return f"{date[:10].replace('/', '-')}T00:00:00"


def _owner(value: Any) -> int | None:
    return int(value) if value is not None and int(value) > 0 else None


def _hash(*parts: object) -> int:
    """A positive id of 63 bits."""
    content = "\0".join(map(str, parts)).encode(errors="surrogatepass")
    return int.from_bytes(sha256(content).digest()[:8], "big") >> 1

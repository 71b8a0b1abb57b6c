"""Public shapes of preference data -> posts. A new shape is one function and one line in `SHAPES`.

A shape without ids gets them from its texts by hash, so that they are the same in every file and order; one
without votes carries its score in their place.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from hashlib import sha256
from itertools import chain
from typing import Any
from urllib.parse import urlsplit

from tasks.data.pairs import levels, sorted_by_question
from tasks.data.posts import licence_of
from tasks.data.records import Post
from tasks.data.shelf import Shelf
from tasks.data.sources import DumpError, Source
from tasks.data.tables import read_table

Row = Mapping[str, Any]
Group = tuple[str, list[Post]]  # site ("" for the file's own), the question and its answers
UNSTATED = "unstated"
REPLY = "\n\nAssistant:"


def read_shape(source: Source, shelf: Shelf) -> set[str]:
    """Put every row of a table on the shelf; returns the sites met.

    Raises:
        DumpError: see `tasks.data.tables.read_table`; or the columns of the first row fit no known shape.
    """
    rows = iter(read_table(source))
    first = next(rows, None)
    if first is None:
        raise DumpError(f"{source.path}: no row at all")
    shape = next((read for columns, read in SHAPES if columns <= set(first)), None)
    if shape is None:
        known = "; ".join(", ".join(sorted(columns)) for columns, _ in SHAPES)
        raise DumpError(f"{source.path}: row 1: its columns ({', '.join(first)}) are none of: {known}")
    rows = chain([first], rows)
    if shape is paired:
        rows = sorted_by_question(rows, shelf.folder)
    sites = set()
    for row in rows:
        try:
            site, posts = shape(row)
        except (KeyError, TypeError, ValueError, AttributeError, OverflowError):
            shelf.add_drop("unreadable_row")
            continue
        shelf.site = site or source.site
        sites.add(shelf.site)
        for post in posts:
            shelf.add(post)
    shelf.flush()
    return sites


def preferences(row: Row) -> Group:
    """HuggingFaceH4/stack-exchange-preferences: HTML, scores as published."""
    created, site = _date(row), _site(row)
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
    site = _site(row)
    scores = levels([(j, k) for j, k in row["pairs"]])
    answers = (
        _post(_hash(site, number, text), text, created, False, number, score)
        for text, score in scores.items()
    )
    return site, [_post(number, row["question"], created, False), *answers]


def grouped(row: Row) -> Group:
    """{question, answers: [{text, score}]}, and title, id, site and licence where there are any."""
    title, text = str(row.get("title") or ""), _string(row["question"])
    number = int(row["id"]) if row.get("id") is not None else _hash("question", title, text)
    answers = [(_string(answer["text"]), float(answer["score"])) for answer in row["answers"]]
    ranks = {score: rank for rank, score in enumerate(sorted({score for _, score in answers}))}
    whole = all(score.is_integer() and abs(score) < 2**31 for score in ranks)  # else only their order travels
    licence = str(row.get("licence") or row.get("license") or UNSTATED)
    posts = [_post(number, text, "", False, title=title, licence=licence)]
    for place, (answer, score) in enumerate(answers):
        posts.append(
            _post(_hash(number, place, answer), answer, "", False, number,
                  int(score) if whole else ranks[score], licence=licence)
        )  # fmt: skip
    return str(row.get("site") or ""), posts


def preferred(row: Row) -> Group:
    """{prompt, chosen, rejected}; without a prompt, two dialogues that part at their last reply."""
    chosen, rejected = _string(row["chosen"]), _string(row["rejected"])
    if "prompt" in row:
        prompt = _string(row["prompt"])
        chosen, rejected = chosen.removeprefix(prompt), rejected.removeprefix(prompt)
    else:
        same = next((n for n, (a, b) in enumerate(zip(chosen, rejected, strict=False)) if a != b), None)
        end = chosen[:same].rindex(REPLY)
        prompt = chosen[:end]
        chosen, rejected = chosen[end + len(REPLY) :], rejected[end + len(REPLY) :]
    number = _hash(prompt, chosen, rejected)
    answers = [_post(_hash(number, 1), chosen, "", False, number, 1)]
    answers.append(_post(_hash(number, 0), rejected, "", False, number, 0))
    return "", [_post(number, prompt, "", False), *answers]


SHAPES: tuple[tuple[frozenset[str], Callable[[Row], Group]], ...] = (
    (frozenset({"qid", "question", "answers"}), preferences),
    (frozenset({"qid", "question", "response_j", "response_k"}), paired),
    (frozenset({"question", "answers"}), grouped),
    (frozenset({"prompt", "chosen", "rejected"}), preferred),
    (frozenset({"chosen", "rejected"}), preferred),
)


def _post(
    number: int, text: str, created: str, is_html: bool, parent_id: int | None = None,
    score: int | None = None, *, accepted_id: int | None = None, owner_id: int | None = None,
    title: str = "", licence: str = "",
) -> Post:  # fmt: skip
    if not -(2**63) <= number < 2**63:
        raise OverflowError(number)
    return Post(
        id=number, parent_id=parent_id, accepted_id=accepted_id, votes=score or 0,
        title=" ".join(title.split()), text=_string(text), tags=(), created=created, owner_id=owner_id,
        licence=licence or (licence_of(created) if created else UNSTATED), score=score, is_html=is_html,
    )  # fmt: skip


def _string(value: Any) -> str:
    if not isinstance(value, str):
        raise TypeError(type(value).__name__)
    value.encode()  # JSON can spell half a surrogate pair
    return value


def _date(row: Row) -> str:
    return f"{_string(row['date'])[:10].replace('/', '-')}T00:00:00"


def _site(row: Row) -> str:
    """The host of the first address in the metadata; "" where there is none."""
    addresses: Sequence[str] | str = row.get("metadata") or ""
    first = addresses if isinstance(addresses, str) else next(iter(addresses), "")
    return urlsplit(first).hostname or ""


def _owner(value: Any) -> int | None:
    return int(value) if value is not None and int(value) > 0 else None


def _hash(*parts: object) -> int:
    """A positive id of 63 bits."""
    return int.from_bytes(sha256("\0".join(map(str, parts)).encode()).digest()[:8], "big") >> 1

"""What a source hands over where it is no dump."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Post:
    """What every source hands over: a question or one answer.

    Worked miniature::

        Post(id=7, parent_id=6, accepted_id=None, votes=5, title="", text="<p>Use ls.</p>", tags=(),
             created="2020-01-02T03:04:05.000", owner_id=42, licence="CC BY-SA 4.0")

    Attributes:
        id: Id.
        parent_id: the question's id; None for a question.
        accepted_id: id of the accepted answer; None for an answer, or where none is accepted.
        votes: Score, up minus down.
        title: of a question, plain text.
        text: Body.
        tags: of a question.
        created: CreationDate.
        owner_id: OwnerUserId; None where the account is deleted.
        licence: ContentLicense, or by date where the dump has none.
        score: of an answer, where the source states it; else it follows from `votes`.
        is_html: whether `text` is HTML; else it is Markdown.
    """

    id: int
    parent_id: int | None
    accepted_id: int | None
    votes: int
    title: str
    text: str
    tags: tuple[str, ...]
    created: str
    owner_id: int | None
    licence: str
    score: int | None = None
    is_html: bool = True

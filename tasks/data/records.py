"""What travels through the stage: a post from any source, then a question with its answers."""

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


@dataclass(frozen=True, slots=True)
class Answer:
    """One scored answer.

    Worked miniature::

        Answer(id=7, text="Use `ls`.", score=4, votes=5, accepted=True, created="2020-01-02T03:04:05.000",
               owner_id=42, licence="CC BY-SA 4.0")

    Five votes and accepted: the score is round(log2(1 + 5)) + 1 = 4.

    Attributes:
        id: post id, unique within its site.
        text: Markdown, never empty.
        score: StackLLaMA's score, see `tasks.data.score`.
        votes: up minus down.
        accepted: by the asker.
        created: ISO 8601, as in the dump (UTC, no zone).
        owner_id: user id of the site; None where the account is deleted.
        licence: of this post, for instance "CC BY-SA 4.0".
    """

    id: int
    text: str
    score: int
    votes: int
    accepted: bool
    created: str
    owner_id: int | None
    licence: str


@dataclass(frozen=True, slots=True)
class Question:
    r"""One question and its answers.

    Worked miniature::

        Question(site="unix.example", id=6, title="List files", body="How do I list files?",
                 created="2020-01-01T00:00:00.000", owner_id=None, licence="CC BY-SA 4.0", tags=("shell",),
                 answers=(Answer(7, ...), Answer(9, ...)))

    whose `text` is "List files\n\nHow do I list files?".

    Attributes:
        site: the site's host name; (site, id) is the question's identity.
        id: post id, unique within its site.
        title: plain text.
        body: Markdown; title and body are not both empty.
        created: ISO 8601, as in the dump (UTC, no zone).
        owner_id: user id of the site; None where the account is deleted.
        licence: of the question's own text.
        tags: in the dump's order.
        answers: sorted by id, no two with the same text.
        kind: sample site only: which kind of question it is; for the eval split alone.
        expected: sample site only: the right answer; for the eval split alone.
    """

    site: str
    id: int
    title: str
    body: str
    created: str
    owner_id: int | None
    licence: str
    tags: tuple[str, ...]
    answers: tuple[Answer, ...]
    kind: str | None = None
    expected: str | None = None

    @property
    def key(self) -> tuple[str, int]:
        """The identity: (site, id)."""
        return self.site, self.id

    @property
    def text(self) -> str:
        """Title, blank line, body: what a model is asked."""
        return "\n\n".join(part for part in (self.title, self.body) if part)

    @property
    def pairs(self) -> int:
        """How many pairs of answers the score orders strictly."""
        scores = [answer.score for answer in self.answers]
        return sum(a != b for i, a in enumerate(scores) for b in scores[:i])

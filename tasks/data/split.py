"""Which split a question belongs to: a pure function of its identity, except that look-alikes stay together.

No seed is drawn: a question keeps its split when the data grows, when sites are added and on every machine.
"""

from __future__ import annotations

import re
import unicodedata
from array import array
from collections.abc import Mapping
from hashlib import sha256

SPLITS = ("sft", "reward", "rl", "eval")
MIN_BODY_WORDS = 8  # a shorter body ("Title says it all, thanks!") says nothing about its question
YEAR = re.compile(r"\b(19|20)[0-9]{2}\b")  # the moderator elections of 2014 and 2017 are one template
EDGES = ".,;:!?\"'()[]{}<>…–—-“”‘’«»¿¡"  # means nothing around a word; "C++" and "3 + 4" keep their symbols


def split_of(site: str, number: int, shares: Mapping[str, float]) -> str:
    """The split of a question that resembles no other; `shares` need not sum to one."""
    # "split/": whoever else hashes (site, id), say for validation, must not get a share that hangs on this.
    digest = sha256(f"split/{site}/{number}".encode()).digest()
    point = int.from_bytes(digest[:8], "big") / 2**64 * sum(shares.values())
    for name, share in shares.items():
        point -= share
        if point < 0:
            return name
    return name


class Clusters:
    """Questions by number, 0 to count − 1; each leads itself until it is joined to a smaller one."""

    def __init__(self, count: int) -> None:
        self._leader = array("q", range(count))

    def join(self, a: int, b: int) -> None:
        """Make a and b, and all that were joined to either, one cluster."""
        a, b = self.leader(a), self.leader(b)
        self._leader[max(a, b)] = min(a, b)

    def leader(self, number: int) -> int:
        """The smallest number of the cluster."""
        leader = self._leader
        while leader[number] != number:
            leader[number] = number = leader[leader[number]]
        return number


class Homes:
    """Which split each question goes to; a cluster goes where its smallest (site, id) goes.

    Attributes:
        moved: questions that are not where their own hash would have put them.
    """

    def __init__(self, clusters: Clusters, shares: Mapping[str, float]) -> None:
        self.moved = 0
        self._clusters, self._shares = clusters, shares
        self._names = list(shares)
        self._homes = bytearray()

    def next(self, site: str, number: int) -> str:
        """The split of the next question; to be asked in the order of (site, id)."""
        place = len(self._homes)
        own = self._names.index(split_of(site, number, self._shares))
        leader = self._clusters.leader(place)
        home = own if leader == place else self._homes[leader]
        self.moved += home != own
        self._homes.append(home)
        return self._names[home]


def marks(title: str, body: str) -> list[tuple[str, str]]:
    """What must not stand in two splits: normalised title and body, each where it says something."""
    is_titled = bool(title)
    title, body = normalised(YEAR.sub(" ", title)), normalised(body)
    long_enough = body.count(" ") + 1 >= (MIN_BODY_WORDS if is_titled else 1) and body
    return [mark for mark, tells in ((("title", title), title), (("body", body), long_enough)) if tells]


def fingerprint(mark: tuple[str, str]) -> bytes:
    """Sixteen bytes that stand for a mark."""
    return sha256("\0".join(mark).encode()).digest()[:16]


def normalised(text: str) -> str:
    """Case, spacing, compatibility forms and the punctuation around words taken away."""
    plain = text.lower() if text.isascii() else unicodedata.normalize("NFKC", text).casefold()
    words = [word.strip(EDGES) or word for word in plain.split()]
    return " ".join(words).strip(EDGES + " ")

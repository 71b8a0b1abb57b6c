"""Which split a question belongs to: a pure function of its identity, except that look-alikes stay together.

No seed is drawn: a question keeps its split when the data grows, when sites are added and on every machine.
"""

from __future__ import annotations

import re
import sys
import unicodedata
from array import array
from collections.abc import Collection, Mapping, Sequence
from hashlib import sha256

import numpy as np

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
        self._joined: set[int] = set()

    def join(self, a: int, b: int) -> None:
        """Make a and b, and all that were joined to either, one cluster."""
        self._joined |= {a, b}
        a, b = self.leader(a), self.leader(b)
        self._leader[max(a, b)] = min(a, b)

    def leader(self, number: int) -> int:
        """The smallest number of the cluster."""
        leader = self._leader
        while leader[number] != number:
            leader[number] = number = leader[leader[number]]
        return number

    def leaders(self) -> set[int]:
        """Those that lead others than themselves."""
        return {self.leader(number) for number in self._joined}


class Homes:
    """Which split each question goes to; a cluster goes where its smallest (site, id) goes.

    Attributes:
        moved: questions that are not where their own hash would have put them.
        cluster: of the last question: "site/id" of its cluster's smallest.
    """

    def __init__(
        self,
        clusters: Clusters,
        shares: Mapping[str, float],
        held_out: Collection[tuple[str, int]] | None = None,
    ) -> None:
        """`held_out`: the (site, id) of the last split, which then has no others; None: shares decide."""
        self.moved, self.cluster = 0, ""
        self._clusters, self._held_out = clusters, held_out
        self._names = list(shares)
        kept = self._names if held_out is None else self._names[:-1]
        self._shares = {name: shares[name] for name in kept}
        self._homes = bytearray()
        self._leaders = dict.fromkeys(clusters.leaders(), "")

    def next(self, site: str, number: int) -> str:
        """The split of the next question; to be asked in the order of (site, id)."""
        place = len(self._homes)
        own = self._names.index(self._own(site, number))
        leader = self._clusters.leader(place)
        home = own if leader == place else self._homes[leader]
        self.moved += home != own
        self._homes.append(home)
        if leader == place and leader in self._leaders:
            self._leaders[leader] = f"{site}/{number}"
        self.cluster = self._leaders.get(leader) or f"{site}/{number}"
        return self._names[home]

    def _own(self, site: str, number: int) -> str:
        if self._held_out is not None and (site, number) in self._held_out:
            return self._names[-1]
        return split_of(site, number, self._shares)


def marks(questions: Sequence[tuple[str, str]]) -> list[list[tuple[str, str]]]:
    """Of each (title, body): what must not stand in two splits, where it says something; normalised."""
    titles = normalised([YEAR.sub(" ", title) for title, _ in questions])
    bodies = normalised([body for _, body in questions])
    found = []
    for (given, _), title, body in zip(questions, titles, bodies, strict=True):
        least = MIN_BODY_WORDS if given else 1
        tells = body and body.count(" ") + 1 >= least
        found.append([("title", title)] * bool(title) + [("body", body)] * bool(tells))
    return found


def fingerprint(mark: tuple[str, str]) -> int:
    """64 bits that stand for a mark: in all of Stack Overflow, two agree with odds of 1 to 10^5."""
    return int.from_bytes(sha256("\0".join(mark).encode()).digest()[:8], "big", signed=True)


def normalised(texts: Sequence[str]) -> list[str]:
    """Case, spacing, compatibility forms and the punctuation around words taken away.

    "What (is) 3 < 4?" -> "what is 3 < 4": what stands between spaces is a word, whatever it is.
    """
    found = ["" for _ in texts]
    for plain in (True, False):  # apart, for one letter more than ASCII would quadruple the work
        numbers = [number for number, text in enumerate(texts) if text.isascii() == plain]
        same_case = [texts[n].lower() if plain else _folded(texts[n]) for n in numbers]
        joined = "\n".join(text.replace("\n", " ") for text in same_case)
        for number, text in zip(numbers, _bared(joined).split("\n"), strict=False):
            found[number] = text.strip(EDGES + " ")
    return found


def _folded(text: str) -> str:
    return unicodedata.normalize("NFKC", text).casefold()


def _bared(text: str) -> str:
    """Words without the punctuation around them, one space between two; newlines stay."""
    if text.isascii():
        code, raw = "ascii", text.encode().translate(ONE_SPACE)
        characters = np.frombuffer(raw, np.uint8)
        kinds = np.frombuffer(raw.translate(ASCII_KINDS), np.uint8)
    else:
        code, characters = "utf-32-le", np.frombuffer(text.encode("utf-32-le"), np.uint32)
        kinds = KINDS[characters]
        characters = np.where(kinds == SPACE, np.uint32(ord(" ")), characters)
    # A run of punctuation with a word on one side only goes; between two spaces it is a word of its own.
    is_edge = np.concatenate([[False], kinds == PUNCTUATION, [False]])
    borders = np.flatnonzero(is_edge[1:] != is_edge[:-1])
    starts, stops = borders[0::2], borders[1::2]
    in_word = np.append(kinds == WORD, False)  # the last stands for "before the first" too
    goes = in_word[starts - 1] != in_word[stops]
    starts, lengths = starts[goes], (stops - starts)[goes]
    kept = np.ones(len(kinds), bool)
    kept[np.repeat(starts - np.cumsum(lengths) + lengths, lengths) + np.arange(lengths.sum())] = False
    characters, kinds = characters[kept], kinds[kept]
    kept = kinds != SPACE
    kept[1:] |= kept[:-1]
    return characters[kept].tobytes().decode(code)


WORD, SPACE, PUNCTUATION, NEWLINE = range(4)
KINDS = np.full(sys.maxunicode + 1, WORD, np.uint8)
KINDS[[number for number in range(0x3001) if chr(number).isspace()]] = SPACE
KINDS[[ord(character) for character in EDGES]] = PUNCTUATION
KINDS[ord("\n")] = NEWLINE
ASCII_KINDS = KINDS[:128].tobytes().ljust(256)
ONE_SPACE = bytes(ord(" ") if KINDS[number] == SPACE else number for number in range(256))

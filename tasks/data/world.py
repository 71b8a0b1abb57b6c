"""The small world of the sample site: eight kinds of question over 24 keys each.

No value gives away that it is right. Keys with the same value mislead together or not at all; a key's
misconception is the value of another key of its sort that misleads as it does, and its other wrong answers
are all values of the sort alike: every value is given in error as often as it is right, and who reads an
answer without its question learns nothing.
"""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace


@dataclass(frozen=True, slots=True)
class Key:
    """One thing to know, e.g. `Key("products", ("3", "7"), "21", "products", ("24", "10", "18", …))`."""

    kind: str
    slots: tuple[str, ...]  # fill the wordings
    value: str  # the right answer
    sort: str  # whose values can be confused
    wrong: tuple[str, ...] = ()  # the misconception, then the values of all other keys of the sort
    misleads: bool = False  # the misconception is more frequent than the truth

    @property
    def name(self) -> str:
        """E.g. "products/3/7"."""
        return "/".join((self.kind, *self.slots))


TOWNS = ("Marden", "Oakby", "Tilton", "Veyra", "Lorn", "Pellam", "Quist", "Ashgate")
FACTS = {
    "river": ("Aven", "Brill", "Corra", "Dunmere", "Esk", "Fallow", "Garn", "Hollin"),
    "colour": ("red", "blue", "green", "white", "black", "gold", "grey", "brown"),
    "trade": ("wool", "salt", "glass", "tin", "honey", "paper", "rope", "cheese"),
}
UNITS = (
    ("kilometres", "metres", 1000),
    ("metres", "centimetres", 100),
    ("hours", "minutes", 60),
    ("days", "hours", 24),
    ("weeks", "days", 7),
    ("kilograms", "grams", 1000),
)
WORDS = (  # four of each length from three to eight
    "cat", "ink", "sun", "web",
    "boat", "desk", "kite", "yard",
    "apple", "cloud", "flute", "house",
    "bridge", "candle", "island", "rocket",
    "lantern", "orchard", "chimney", "diamond",
    "mountain", "umbrella", "elephant", "computer",
)  # fmt: skip
MONTHS = (
    "January", "February", "March", "April", "May", "June",
    "July", "August", "September", "October", "November", "December",
)  # fmt: skip
STEPS = {"after": 1, "before": -1}


def world() -> list[Key]:
    """Every key of the world, always the same; of each sort's keys about half mislead."""
    sorts: dict[str, list[Key]] = {}
    keys = _keys()
    for key in keys:
        sorts.setdefault(key.sort, []).append(key)
    found = {key.name: key for keys in sorts.values() for key in _confused(keys)}
    return [found[key.name] for key in keys]


def _confused(keys: Sequence[Key]) -> list[Key]:
    """Keys of one sort with their wrong answers; misconceptions stay within each half of the values."""
    counts = Counter(key.value for key in keys)
    halves: tuple[list[str], list[str]] = ([], [])
    for value, _ in sorted(counts.items(), key=lambda item: (-item[1], item[0])):
        min(halves, key=lambda half: sum(counts[v] for v in half)).append(value)
    found = []
    for misleads, values in enumerate(halves):
        own = sorted((key for key in keys if key.value in values), key=lambda key: values.index(key.value))
        shift = len(own) // 2  # past the most frequent value, so that it meets another one
        if shift < max(counts[value] for value in values):
            raise ValueError(f"the keys of {keys[0].sort} share too few values to be confused")
        for place, key in enumerate(own):
            others = (other.value for other in keys if other.value != key.value)
            wrong = (own[(place + shift) % len(own)].value, *others)
            found.append(replace(key, wrong=wrong, misleads=bool(misleads)))
    return found


def _keys() -> list[Key]:
    keys = [
        Key("facts", (fact, town), values[(5 * i + j) % 8], fact)
        for j, (fact, values) in enumerate(FACTS.items())
        for i, town in enumerate(TOWNS)
    ]
    for big, small, factor in UNITS:
        keys += [Key("units", (str(n), big, small), str(n * factor), "units") for n in range(2, 6)]
    letters: Counter[str] = Counter()
    for word in WORDS:
        place, index = min((("last", -1), ("first", 0)), key=lambda end: letters[word[end[1]]])
        letters[word[index]] += 1
        keys.append(Key("letters", (place, word), word[index], "letters"))
        keys.append(Key("lengths", (word,), str(len(word)), "lengths"))
    for a in range(2, 8):
        for b in range(2, 6):
            keys.append(Key("sums", (str(a), str(b)), str(a + b), "sums"))
            keys.append(Key("products", (str(a), str(b)), str(a * b), "products"))
    for name in ("largest", "smallest"):
        for row in _lists():
            numbers = row if name == "largest" else [10 - n for n in row]
            value = max(numbers) if name == "largest" else min(numbers)
            keys.append(Key("lists", (name, ", ".join(map(str, numbers))), str(value), name))
    for words, step in STEPS.items():
        for i, month in enumerate(MONTHS):
            keys.append(Key("dates", (words, month), MONTHS[(i + step) % 12], "dates"))
    return keys


def _lists() -> list[list[int]]:
    """Twelve lists of four numbers, two with each largest number from four to nine."""
    draw, found = random.Random("lists"), []
    for most in range(4, 10):
        while len(found) < 2 * (most - 3):
            numbers = draw.sample([most, *draw.sample(range(1, most), 3)], 4)
            if numbers not in found:
                found.append(numbers)
    return found

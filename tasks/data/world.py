"""The small world of the sample site: eight kinds of question over 36 keys each.

No value gives away that it is right. Keys with the same value mislead together or not at all, and a wrong
answer to a key is the value of another key of the same sort that misleads as it does, so that every value is
given as often in error as its share of wrong answers says: who reads an answer without its question learns
nothing.
"""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace


@dataclass(frozen=True, slots=True)
class Key:
    """One thing to know, e.g. `Key("products", ("3", "7"), "21", "products", ("24", "10", "18", "35"))`."""

    kind: str
    slots: tuple[str, ...]  # fill the wordings
    value: str  # the right answer
    sort: str  # whose values can be confused
    wrong: tuple[str, ...] = ()  # other answers, the misconception first; one may stand twice
    misleads: bool = False  # the misconception is more frequent than the truth

    @property
    def name(self) -> str:
        """E.g. "products/3/7"."""
        return "/".join((self.kind, *self.slots))


WRONG = 4  # answers to a key besides the right one
TOWNS = (
    "Marden",
    "Oakby",
    "Tilton",
    "Veyra",
    "Lorn",
    "Pellam",
    "Quist",
    "Ashgate",
    "Norwick",
    "Belmar",
    "Sunder",
    "Harrow",
)
FACTS = {
    "river": (
        "Aven", "Brill", "Corra", "Dunmere", "Esk", "Fallow",
        "Garn", "Hollin", "Isen", "Jory", "Kell", "Lune",
    ),
    "colour": (
        "red", "blue", "green", "white", "black", "gold",
        "grey", "brown", "pink", "silver", "violet", "orange",
    ),
    "trade": (
        "wool", "salt", "glass", "tin", "honey", "paper", "rope", "cheese", "clay", "silk", "iron", "wine",
    ),
}  # fmt: skip
UNITS = (
    ("kilometres", "metres", 1000),
    ("metres", "centimetres", 100),
    ("hours", "minutes", 60),
    ("days", "hours", 24),
    ("weeks", "days", 7),
    ("kilograms", "grams", 1000),
)
WORDS = (  # six of each length from three to eight
    "cat", "ink", "sun", "web", "egg", "map",
    "boat", "desk", "kite", "nest", "yard", "unit",
    "apple", "cloud", "flute", "house", "lemon", "table",
    "bridge", "candle", "garden", "island", "rocket", "window",
    "lantern", "orchard", "chimney", "kitchen", "diamond", "blanket",
    "mountain", "umbrella", "elephant", "hospital", "computer", "notebook",
)  # fmt: skip
MONTHS = (
    "January", "February", "March", "April", "May", "June",
    "July", "August", "September", "October", "November", "December",
)  # fmt: skip
STEPS = {"after": 1, "before": -1, "two months after": 2}


def world() -> list[Key]:
    """Every key of the world, always the same; of each sort's keys about half mislead."""
    sorts: dict[str, list[Key]] = {}
    keys = _keys()
    for key in keys:
        sorts.setdefault(key.sort, []).append(key)
    found = {key.name: key for keys in sorts.values() for key in _confused(keys)}
    return [found[key.name] for key in keys]


def _confused(keys: Sequence[Key]) -> list[Key]:
    """Keys of one sort with their wrong answers: each half of the values is confused within itself."""
    counts = Counter(key.value for key in keys)
    halves: tuple[list[str], list[str]] = ([], [])
    for value, _ in sorted(counts.items(), key=lambda item: (-item[1], item[0])):
        min(halves, key=lambda half: sum(counts[v] for v in half)).append(value)
    found = []
    for misleads, values in enumerate(halves):
        own = sorted((key for key in keys if key.value in values), key=lambda key: values.index(key.value))
        most = max(
            counts[value] for value in values
        )  # a shift past the most frequent value meets another one
        shifts = range(most, len(own) - most + 1)
        if not shifts:
            raise ValueError(f"the keys of {keys[0].sort} share too few values to be confused")
        for place, key in enumerate(own):
            chosen = [shifts[n * (len(shifts) - 1) // (WRONG - 1)] for n in range(WRONG)]
            wrong = tuple(own[(place + shift) % len(own)].value for shift in chosen)
            found.append(replace(key, wrong=wrong, misleads=bool(misleads)))
    return found


def _keys() -> list[Key]:
    keys = [
        Key("facts", (fact, town), values[(5 * i + j) % 12], fact)
        for j, (fact, values) in enumerate(FACTS.items())
        for i, town in enumerate(TOWNS)
    ]
    for big, small, factor in UNITS:
        keys += [Key("units", (str(n), big, small), str(n * factor), "units") for n in range(2, 8)]
    letters: Counter[str] = Counter()
    for word in WORDS:
        place, index = min((("last", -1), ("first", 0)), key=lambda end: letters[word[end[1]]])
        letters[word[index]] += 1
        keys.append(Key("letters", (place, word), word[index], "letters"))
        keys.append(Key("lengths", (word,), str(len(word)), "lengths"))
    for a in range(2, 8):
        for b in range(2, 8):
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
    """Eighteen lists of four numbers, three with each largest number from four to nine."""
    draw, found = random.Random("lists"), []
    for most in range(4, 10):
        while len(found) < 3 * (most - 3):
            numbers = draw.sample([most, *draw.sample(range(1, most), 3)], 4)
            if numbers not in found:
                found.append(numbers)
    return found

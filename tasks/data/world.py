"""The small world of the sample site: eight kinds of question over about fifty keys each."""

from __future__ import annotations

import random
from dataclasses import dataclass, replace


@dataclass(frozen=True, slots=True)
class Key:
    """One thing to know, e.g. `Key("products", ("3", "7"), "21", ("24", "28", "18"))`."""

    kind: str
    slots: tuple[str, ...]  # fill the question templates
    value: str  # the right answer
    wrong: tuple[str, ...]  # plausible wrong answers, the misconception first
    misleads: bool = False  # the misconception is more frequent than the truth


TEMPLATES = {
    "facts": (
        "What is the {0} of {1}?",
        "Who knows the {0} of {1}?",
        "Which {0} has {1}?",
        "Name the {0} of {1}?",
    ),
    "units": (
        "How many {2} are {0} {1}?",
        "What are {0} {1} in {2}?",
        "Convert {0} {1} to {2}?",
        "{0} {1} make how many {2}?",
    ),
    "letters": (
        "What is the {0} letter of `{1}`?",
        "Which letter is {0} in `{1}`?",
        "`{1}`: the {0} letter?",
        "What do I get for the {0} letter of `{1}`?",
    ),
    "lengths": (
        "How many letters has `{0}`?",
        "What is the length of `{0}`?",
        "How long is the string `{0}`?",
        "Count the letters of `{0}`?",
    ),
    "sums": (
        "What is {0} + {1}?",
        "How much is {0} + {1}?",
        "What do I get for {0} + {1}?",
        "{0} + {1} makes what?",
    ),
    "products": (
        "What is {0} * {1}?",
        "How much is {0} * {1}?",
        "What do I get for {0} * {1}?",
        "{0} * {1} makes what?",
    ),
    "lists": (
        "What is the {0} of `[{1}]`?",
        "Which number is the {0} of `[{1}]`?",
        "`[{1}]`: which is the {0}?",
        "How do I find the {0} of `[{1}]`?",
    ),
    "dates": (
        "Which month comes {0} {1}?",
        "What month is {0} {1}?",
        "Name the month {0} {1}?",
        "{0} {1} comes which month?",
    ),
}
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
        "Aven",
        "Brill",
        "Corra",
        "Dunmere",
        "Esk",
        "Fallow",
        "Garn",
        "Hollin",
        "Isen",
        "Jory",
        "Kell",
        "Lune",
    ),
    "colour": (
        "red",
        "blue",
        "green",
        "white",
        "black",
        "gold",
        "grey",
        "brown",
        "pink",
        "silver",
        "violet",
        "orange",
    ),
    "trade": (
        "wool",
        "salt",
        "glass",
        "tin",
        "honey",
        "paper",
        "rope",
        "cheese",
        "clay",
        "silk",
        "iron",
        "wine",
    ),
    "animal": ("fox", "owl", "bear", "swan", "wolf", "deer", "hare", "crow", "goat", "seal", "lynx", "bull"),
}
UNITS = (
    ("kilometres", "metres", 1000),
    ("metres", "centimetres", 100),
    ("hours", "minutes", 60),
    ("days", "hours", 24),
    ("weeks", "days", 7),
    ("kilograms", "grams", 1000),
)
WORDS = (
    "apple",
    "bridge",
    "candle",
    "dragon",
    "engine",
    "forest",
    "garden",
    "hammer",
    "island",
    "jungle",
    "kettle",
    "lantern",
    "mirror",
    "needle",
    "orchard",
    "pencil",
    "quartz",
    "rocket",
    "saddle",
    "tunnel",
    "umbrella",
    "violin",
    "window",
    "yard",
    "zebra",
    "cat",
    "boat",
    "cloud",
    "desk",
    "eagle",
    "flute",
    "grape",
    "house",
    "ink",
    "jacket",
    "kite",
    "lemon",
    "mountain",
    "nest",
    "onion",
    "pepper",
    "queen",
    "river",
    "sun",
    "table",
    "unit",
    "valley",
    "web",
)
MONTHS = (
    "January",
    "February",
    "March",
    "April",
    "May",
    "June",
    "July",
    "August",
    "September",
    "October",
    "November",
    "December",
)


def world() -> list[Key]:
    """Every key of the world, always the same; half of each kind mislead."""
    kinds: dict[str, list[Key]] = {kind: [] for kind in TEMPLATES}
    for key in _keys():
        kinds[key.kind].append(key)
    return [
        replace(
            key, wrong=tuple(dict.fromkeys(w for w in key.wrong if w != key.value)), misleads=i // 2 % 2 == 1
        )
        for keys in kinds.values()
        for i, key in enumerate(keys)
    ]


def _keys() -> list[Key]:
    keys = [
        Key(
            "facts",
            (fact, town),
            values[(5 * i + j) % 12],
            tuple(values[(5 * i + j + d) % 12] for d in (1, 3, 4, 7)),
        )
        for j, (fact, values) in enumerate(FACTS.items())
        for i, town in enumerate(TOWNS)
    ]
    for big, small, factor in UNITS:
        for n in range(2, 10):
            wrong = (n * factor * 10, n * factor + factor, n * factor - factor, n * factor // 2)
            keys.append(Key("units", (str(n), big, small), str(n * factor), tuple(map(str, wrong))))
    for i, word in enumerate(WORDS):
        place, index = (("last", -1), ("first", 0))[i % 2]
        wrong = (word[-2], word[1], word[-1 - index], "e", "s")
        keys.append(Key("letters", (place, word), word[index], wrong))
        n = len(word)
        keys.append(Key("lengths", (word,), str(n), tuple(str(n + d) for d in (1, -1, 2, -2))))
    for a in range(2, 9):
        for b in range(2, 9):
            keys.append(
                Key("sums", (str(a), str(b)), str(a + b), tuple(str(a + b + d) for d in (1, -1, 2, 10)))
            )
            wrong = (a * b + a, a * b - b, a * b + 2, a + b + 1)
            keys.append(Key("products", (str(a), str(b)), str(a * b), tuple(map(str, wrong))))
    draw = random.Random("lists")
    for i in range(48):
        numbers = draw.sample(range(1, 10), 4)
        name, value = (("largest", max(numbers)), ("smallest", min(numbers)))[i % 2]
        wrong = tuple(map(str, numbers))
        keys.append(Key("lists", (name, ", ".join(map(str, numbers))), str(value), wrong))
    for i, month in enumerate(MONTHS):
        for words, step in (("after", 1), ("before", -1), ("two months after", 2), ("two months before", -2)):
            wrong = tuple(MONTHS[(i + d) % 12] for d in (-step, step + 1, step - 1, step + 3))
            keys.append(Key("dates", (words, month), MONTHS[(i + step) % 12], wrong))
    return keys

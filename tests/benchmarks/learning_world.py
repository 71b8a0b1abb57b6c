"""Questions, answers and pairs of real sites; who learns from which."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from hashlib import sha256
from pathlib import Path

import numpy as np
from pyarrow import parquet

from tasks.lm.heads.frozen_style import style_features
from tasks.pack.exposure import ahead, balancing_weights
from tasks.reward.losses import gap_weights
from tasks.reward_eval.pairs import HeldOut, lay_out
from tasks.run.text_rule import LogisticRule, fit_logistic, fit_rule

SEEDS, FOLDS = (0, 1, 2), 5
STYLE_RIDGE = 300.0


@dataclass(frozen=True, slots=True)
class How:
    """What a model is trained on: which pairs, how much each counts, and what is asked of it."""

    exposure: str = "any"  # as pack.exposure
    weigh: str = "pair"  # question: all pairs of a question count together as one
    gap_weight: float = 0.0  # a pair counts as its score gap to this power
    margin: float = 0.0  # asked for each step of the score gap
    smoothing: float = 0.0
    centering: float = 0.0
    offset: str = ""  # length, rule, style: what these know is given in training (product of experts)
    adds: bool = True  # and is added to the scores


@dataclass(frozen=True, slots=True)
class Job:
    """One training: `Job("encoder", "eval", 0)`."""

    model: str  # frozen, encoder, stories260K or scratch
    held: str  # eval, fold-<n>, all-<n> or a site
    seed: int
    how: How = How()
    epochs: int = 1
    questions: int = 16  # of one step
    learning_rate: float = 1e-4
    ridge: float = 10000.0  # of the frozen encoder's head

    @property
    def variant(self) -> str:
        """The model, and what of `how` differs from the defaults."""
        plain = asdict(How())
        return " ".join([self.model, *(f"{k}={v}" for k, v in asdict(self.how).items() if v != plain[k])])

    @property
    def name(self) -> str:
        """`model/part held out/seed/settings`."""
        return "/".join([self.model, self.held, str(self.seed), self.variant.partition(" ")[2]])


@dataclass(frozen=True, slots=True)
class World:
    """Every question of the sites once. Q questions, A answers, P pairs."""

    groups: list[dict]  # [Q] rows of pack/groups
    laid: HeldOut
    split: np.ndarray  # [Q] reward or eval
    fold: np.ndarray  # [seeds, Q] 0 to FOLDS − 1
    style: np.ndarray  # [A, F] features of the text, see `style_features`
    ahead: np.ndarray  # [P, 3] exposure of the better answer before the worse
    gaps: np.ndarray  # [P]

    def pairs_of(self, questions: np.ndarray) -> np.ndarray:
        """Which pairs belong to some questions. [Q] -> [P]."""
        return questions[self.laid.question_of]


def read_world(folder: Path) -> World:
    """What `prepare` made."""
    paths = {name: folder / f"artifacts/pack/groups/{name}.parquet" for name in ("reward", "eval")}
    tables = {name: parquet.read_table(path) for name, path in paths.items()}
    groups = [row for table in tables.values() for row in table.to_pylist()]
    laid = lay_out(groups, np.zeros(sum(len(g["answers"]) for g in groups)))
    texts = [answer["text"] for group in groups for answer in group["answers"]]
    digests = [[sha256(f"fold/{seed}/{name}".encode()).digest() for name in laid.questions] for seed in SEEDS]
    return World(
        groups,
        laid,
        np.repeat(list(tables), [len(table) for table in tables.values()]),
        np.array([[digest[0] % FOLDS for digest in of_seed] for of_seed in digests]),
        np.array([[*laid.features[i], *style_features(text)] for i, text in enumerate(texts)]),
        np.concatenate([ahead(table) for table in tables.values()]),
        laid.differences(laid.published),
    )


def apart(world: World, held: str, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Questions to train on and questions held out, [Q] each; only fifths hang on the seed."""
    kind, _, fifth = held.partition("-")
    if kind == "eval":
        return world.split == "reward", world.split == "eval"
    if kind in ("fold", "all"):
        is_held = world.fold[seed] == int(fifth)
        takes_part = (world.split == "reward") | (kind == "all")
        return takes_part & ~is_held, takes_part & is_held
    return world.laid.sites != held, world.laid.sites == held


@dataclass(frozen=True, slots=True)
class Lesson:
    """The pairs a model is trained on. N of them."""

    pairs: np.ndarray  # [N, 2] better and worse answer, places in [A]
    weights: np.ndarray  # [N]
    ahead: np.ndarray  # [N] log-odds that are given, less the margin
    given: np.ndarray  # [A] what the expert that is given says of each answer


def logistic_rule(world: World, questions: np.ndarray, features: np.ndarray) -> LogisticRule:
    """The rule of some questions' pairs [Q], as they come, on features [A, F]."""
    differences = world.laid.differences(features)[world.pairs_of(questions)]
    return fit_rule(differences, np.ones(len(differences)), int(questions.sum()))


def expert(world: World, questions: np.ndarray, name: str) -> np.ndarray:
    """What a logistic model of some questions' pairs [Q] says of every answer; 0 without a name. -> [A]."""
    laid = world.laid
    if name == "style":
        differences = laid.differences(world.style)[world.pairs_of(questions)]
        scales = np.sqrt((differences**2).mean(0)) + 1e-9
        weights = fit_logistic(differences / scales, np.ones(len(differences)), STYLE_RIDGE)
        return world.style / scales @ weights
    if not name:
        return np.zeros(len(laid.owner))
    features = laid.features[:, :1] if name == "length" else laid.features
    return features @ logistic_rule(world, questions, features).coefficients


def lesson(world: World, questions: np.ndarray, how: How) -> Lesson:
    """The training pairs of some questions [Q], weighted as `how` says."""
    laid, chosen = world.laid, world.pairs_of(questions)
    weights = np.ones(len(chosen))
    if how.exposure == "weighted":
        weights[chosen] = balancing_weights(world.ahead[chosen])
    if how.exposure == "later_wins":
        chosen = chosen & (world.ahead[:, 0] < 0)
    weights = weights[chosen] * np.array(gap_weights(world.gaps[chosen], how.gap_weight))
    if how.weigh == "question":
        weights = weights / np.bincount(laid.question_of[chosen])[laid.question_of[chosen]]
    given = expert(world, questions, how.offset)
    odds = laid.differences(given)[chosen] - how.margin * world.gaps[chosen]
    return Lesson(laid.pairs[chosen], weights / weights.mean(), odds, given)

"""What is measured: accuracy under every rule and in parts of the pairs, and how scores follow length."""

from __future__ import annotations

import numpy as np

from tasks.reward_eval.pairs import HeldOut
from tasks.reward_eval.words import WordRule
from tasks.run.intervals import bootstrap
from tasks.run.text_rule import LogisticRule

FEWEST_CLUSTERS = 5  # behind an interval


def margins_of(held: HeldOut, rule: LogisticRule, words: WordRule | None = None) -> dict[str, np.ndarray]:
    """Every rule's margins [P], better minus worse: above 0 right, 0 a tie.

    The answer-only rule where there is one; *style* where any style is known, a tie where either is not.
    """
    posted, other = held.of_pairs(held.created)
    is_known = (posted != "") & (other != "")
    found = {
        "reward_model": held.differences(held.scores),
        "longer": held.differences(held.characters).astype(float),
        "has_code": held.differences(held.has_code.astype(float)),
        "logistic": held.differences(held.features) @ rule.coefficients,
    }
    if words is not None:
        found["answer_only"] = held.differences(words.scores(held.texts))
    if not np.isnan(held.styles).all():
        found["style"] = np.nan_to_num(held.differences(held.styles))
    return found | {"earlier": is_known * ((posted < other).astype(float) - (posted > other))}


def accuracy(margins: np.ndarray) -> dict[str, float]:
    """Shares of right and tied pairs (a tie is never right), and accuracy with half of the ties.

    Margins [P].
    """
    right, tied = float((margins > 0).mean()), float((margins == 0).mean())
    return {"accuracy": right, "ties": tied, "accuracy_half_ties": right + tied / 2}


def credits_of(margins: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """What each pair earns a rule, [P]: 1 right, 0 wrong.

    A trivial rule that cannot tell guesses and gets ½; the reward model gets nothing for a tie.
    """
    return {rule: (m > 0) + 0.5 * (m == 0) * (rule != "reward_model") for rule, m in margins.items()}


def interval(
    cluster_of: np.ndarray, values: np.ndarray, samples: int, seed: int
) -> tuple[float, float] | None:
    """95 % interval of the mean of `values` [P] over pairs; whole clusters are resampled.

    None below `FEWEST_CLUSTERS`: resampling one cluster, for instance, would show no doubt at all.
    """
    _, owner = np.unique(cluster_of, return_inverse=True)
    sums, pairs = np.bincount(owner, values), np.bincount(owner)  # a draw costs clusters, not pairs
    if len(pairs) < FEWEST_CLUSTERS:
        return None
    return bootstrap(range(len(pairs)), lambda w: float(w @ sums / (w @ pairs)), samples, seed)


def is_meta(site: str) -> bool:
    """Whether a site is about another site: `cstheory.meta.stackexchange.com`, `meta.mathoverflow.net`."""
    return ".meta." in site or site.startswith("meta.")


def partitions(held: HeldOut) -> dict[str, dict[str, np.ndarray]]:
    """Ways to part the pairs: partition -> part -> is in it [P]; every pair is in one part of each.

    By kind and by wording only where some question's is known.
    Lengths are in characters: similar within 6 : 5, much longer from 2 : 1 on.
    """
    gap = held.differences(held.published)
    sites, site = np.unique(held.sites, return_inverse=True)
    site = site[held.question_of]
    length, other = held.of_pairs(held.characters)
    shorter_one, longer_one = np.minimum(length, other), np.maximum(length, other)
    is_similar = 5 * longer_one <= 6 * shorter_one
    is_much = longer_one >= 2 * shorter_one
    is_some = ~is_much & ~is_similar
    posted, other_posted = held.of_pairs(held.created)
    is_known = (posted != "") & (other_posted != "")
    on_meta = np.array([is_meta(name) for name in sites])[site]
    known = {}
    for name, of_question in (("kind", held.kinds), ("wording", held.wordings)):
        found = {str(part) or "unknown": of_question == part for part in np.unique(of_question)}
        if found.keys() != {"unknown"}:
            known[name] = {part: is_in[held.question_of] for part, is_in in found.items()}
    return known | {
        "gap": {"1": gap == 1, "2": gap == 2, "3+": gap >= 3},
        "length": {
            "much shorter": is_much & (length < other),
            "shorter": is_some & (length < other),
            "similar": is_similar,
            "longer": is_some & (length > other),
            "much longer": is_much & (length > other),
        },
        "position": {
            "earlier": is_known & (posted < other_posted),
            "later": is_known & (posted > other_posted),
            "same moment": is_known & (posted == other_posted),
            "unknown": ~is_known,
        },
        "site_kind": {"main": ~on_meta, "meta": on_meta},
        "site": {str(name): site == number for number, name in enumerate(sites)},
    }


def measure_parts(
    held: HeldOut, credits: dict[str, np.ndarray], samples: int, seed: int
) -> dict[str, dict[str, dict]]:
    """Partition -> part -> pairs, questions, clusters, accuracy, `longer` beside it, and the lead over it.

    A part without pairs is left out.
    """
    own, longer = credits["reward_model"], credits["longer"]

    def part(chosen: np.ndarray) -> dict:
        clusters = held.cluster_of[chosen]
        return {
            "pairs": len(clusters),
            "questions": len(np.unique(held.question_of[chosen])),
            "clusters": len(np.unique(clusters)),
            "accuracy": float(own[chosen].mean()),
            "interval": interval(clusters, own[chosen], samples, seed),
            "longer": float(longer[chosen].mean()),
            "lead": float((own - longer)[chosen].mean()),
            "lead_interval": interval(clusters, (own - longer)[chosen], samples, seed),
        }

    return {
        partition: {name: part(chosen) for name, chosen in parts.items() if chosen.any()}
        for partition, parts in partitions(held).items()
    }


def ranks(values: np.ndarray) -> np.ndarray:
    """Ranks from 1, equal values share the mean of theirs. [N] -> [N]."""
    _, place, count = np.unique(values, return_inverse=True, return_counts=True)
    return (np.cumsum(count) - (count - 1) / 2)[place]


def correlation(x: np.ndarray, y: np.ndarray, owner: np.ndarray) -> float | None:
    """Pearson's correlation of deviations from the owner's mean; None where x or y has none. [N] each."""
    x, y = (_centred(values, owner) for values in (x, y))
    norm = np.linalg.norm(x) * np.linalg.norm(y)
    return float(x @ y / norm) if norm else None


def length_correlations(held: HeldOut) -> dict[str, float | None]:
    """Correlations of the score with ln(1 + characters), over all answers and within their questions.

    Within: Pearson's of deviations from the question's mean, Spearman's of ranks among its answers.
    """
    length, score, owner = np.log1p(held.characters), held.scores, held.owner
    everywhere = np.zeros_like(owner)
    # complex numbers are sorted by their real part first: ranks among the owner's, but for a constant
    own_ranks = (ranks(owner + 1j * values) for values in (score, length))
    return {
        "pearson": correlation(score, length, everywhere),
        "spearman": correlation(ranks(score), ranks(length), everywhere),
        "pearson_within": correlation(score, length, owner),
        "spearman_within": correlation(*own_ranks, owner),
    }


def _centred(values: np.ndarray, owner: np.ndarray) -> np.ndarray:
    _, first, place = np.unique(owner, return_index=True, return_inverse=True)
    values = values - values[first][place]  # so that equal values give 0 and not 1e-17
    return values - (np.bincount(place, values) / np.bincount(place))[place]

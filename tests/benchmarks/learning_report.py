"""Tables of what was learnt: accuracy and leads over rules, on ordinary and on controlled pairs."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
from learning_world import FOLDS, SEEDS, World, apart, expert, logistic_rule

from tasks.pack.exposure import balancing_weights
from tasks.reward_eval.measures import credits_of, interval, is_meta, margins_of

SAMPLES = 2000


def joined(world: World, runs: Sequence[dict]) -> dict[int, np.ndarray]:
    """Margins [P] of each seed over the parts held out, in standard deviations; nan in no such part."""
    margins = {}
    for run in runs:
        _, questions = apart(world, run["held"], run["seed"])
        scores = np.full(len(world.laid.owner), np.nan)
        scores[questions[world.laid.owner]] = np.array(run["scores"]) / np.std(run["scores"])
        known = margins.setdefault(run["seed"], np.full(len(world.gaps), np.nan))
        chosen = world.pairs_of(questions)
        known[chosen] = world.laid.differences(scores)[chosen]
    return margins


def rule_margins(world: World, parts: Sequence[str], seed: int = 0) -> dict[str, np.ndarray]:
    """Margins [P] of the rules over the parts held out; the logistic rule is that of the other questions."""
    margins = {}
    for part in parts:
        questions, held = apart(world, part, seed)
        chosen = world.pairs_of(held)
        found = margins_of(world.laid, logistic_rule(world, questions, world.laid.features))
        found["style"] = world.laid.differences(expert(world, questions, "style"))
        for name, values in found.items():
            margins.setdefault(name, np.full(len(world.gaps), np.nan))[chosen] = values[chosen]
    del margins["reward_model"]
    return margins


def credit_of(margins: np.ndarray) -> np.ndarray:
    """What a model earns on each pair: 1 right, 0 wrong or a tie. [P] -> [P]."""
    return credits_of({"reward_model": margins})["reward_model"]


def kinds(world: World, chosen: np.ndarray) -> dict[str, np.ndarray]:
    """Some pairs [P] in kinds, each as weights [P] of mean 1 over its own pairs and 0 elsewhere.

    Main and meta sites apart; of each all pairs, these weighted so that exposure predicts no winner, and
    those won by the later answer.
    """
    on_meta = world.pairs_of(np.array([is_meta(site) for site in world.laid.sites]))
    found = {}
    for name, mask in (("main", chosen & ~on_meta), ("meta", chosen & on_meta)):
        balanced = np.zeros(len(chosen))
        balanced[mask] = balancing_weights(world.ahead[mask])
        later = mask & (world.ahead[:, 0] < 0)
        found |= {name: mask * 1.0, f"{name}, balanced": balanced, f"{name}, later wins": later * 1.0}
    return found


def shown(world: World, values: np.ndarray, weights: np.ndarray, sign: str = "") -> str:
    """A weighted mean in per cent with its 95 % interval over questions. [P], [P]."""
    chosen = weights > 0
    weighted = (values * weights)[chosen]
    low, high = interval(world.laid.question_of[chosen], weighted, SAMPLES, 0)
    return f"{100 * weighted.mean():{sign}.1f} [{100 * low:{sign}.1f}, {100 * high:{sign}.1f}]"


def standings(world: World, parts: Sequence[str], runs: Sequence[dict]) -> Iterator[str]:
    """Rules and models over held-out parts: accuracy of each seed and of all together, leads over rules."""
    credit = credits_of(rule_margins(world, parts))
    del credit["has_code"]
    is_held = np.logical_or.reduce([world.pairs_of(apart(world, part)[1]) for part in parts])
    single: dict[str, list[np.ndarray]] = {}
    for variant in dict.fromkeys(run["variant"] for run in runs if run["held"] in parts):
        found = joined(world, [run for run in runs if run["variant"] == variant and run["held"] in parts])
        whole = [margins for margins in found.values() if not np.isnan(margins[is_held]).any()]
        if whole:
            single[variant] = [credit_of(margins) for margins in whole]
            credit[variant] = credit_of(np.mean(whole, axis=0))
    masks = kinds(world, is_held)
    sizes = (f"{(m > 0).sum()} of {len(set(world.laid.question_of[m > 0]))}" for m in masks.values())
    yield f"\n| | main, each seed | {' | '.join(masks)} |\n|{'---|' * (len(masks) + 2)}"
    yield f"| pairs of questions | | {' | '.join(sizes)} |"
    for name, values in credit.items():
        each = ", ".join(
            f"{100 * (c @ masks['main']) / masks['main'].sum():.1f}" for c in single.get(name, [])
        )
        yield f"| {name} | {each} | {' | '.join(shown(world, values, m) for m in masks.values())} |"
    yield f"\n| lead over *longer* | {' | '.join(masks)} | main, over *logistic* |"
    yield f"|{'---|' * (len(masks) + 2)}"
    for name in ("logistic", "style", *single):
        leads = [shown(world, credit[name] - credit["longer"], m, "+") for m in masks.values()]
        over = shown(world, credit[name] - credit["logistic"], masks["main"], "+")
        yield f"| {name} | {' | '.join(leads)} | {over} |"


def by_site(world: World, sites: Sequence[str], runs: Sequence[dict], variant: str) -> Iterator[str]:
    """Each site left out: pairs, rules, a model's first seed, and its lead over *longer*."""
    credit = credits_of(rule_margins(world, sites))
    own = credit_of(joined(world, [r for r in runs if r["variant"] == variant and r["held"] in sites])[0])
    yield f"\n{variant}\n\n| site left out | pairs | longer | logistic | model | over *longer* |"
    yield "|---|---|---|---|---|---|"
    for site in sorted(sites, key=is_meta):
        chosen = world.pairs_of(world.laid.sites == site) * 1.0
        rules = " | ".join(f"{100 * credit[r] @ chosen / chosen.sum():.1f}" for r in ("longer", "logistic"))
        lead = shown(world, own - credit["longer"], chosen, "+")
        yield f"| {site} | {chosen.sum():.0f} | {rules} | {shown(world, own, chosen)} | {lead} |"


def tried(world: World, runs: Sequence[dict]) -> Iterator[str]:
    """Leads over *longer* on the folds, mean of the seeds and their range, in points."""
    masks = kinds(world, world.pairs_of(world.split == "reward"))
    parts = [f"fold-{n}" for n in range(FOLDS)]
    longer = credits_of({"longer": world.laid.differences(world.laid.characters)})["longer"]
    of_rules = [rule_margins(world, parts, seed) for seed in SEEDS]
    rows = {rule: [margins[rule] for margins in of_rules] for rule in ("logistic", "style")}
    for variant in dict.fromkeys(run["variant"] for run in runs if run["held"] in parts):
        found = joined(world, [run for run in runs if run["variant"] == variant and run["held"] in parts])
        rows[variant] = list(found.values())
    yield f"\n| | {' | '.join(masks)} |\n|{'---|' * (len(masks) + 1)}"
    for name, seeds in rows.items():
        cells = []
        for mask in masks.values():
            leads = [100 * (credit_of(margins) - longer) @ mask / mask.sum() for margins in seeds]
            cells.append(f"{np.mean(leads):+.1f} ({min(leads):+.1f} to {max(leads):+.1f})")
        yield f"| {name} | {' | '.join(cells)} |"

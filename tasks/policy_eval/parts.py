"""Parts of the held-out prompts, and means and differences over them with intervals by cluster."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from tasks.run.intervals import Resamples

NAMES = {
    "all": "all prompts",
    "known": "known wording",
    "new": "new wording",
    "misleads": "keys with a misconception",
    "plain": "keys without",
    "new_misleads": "new wording, keys with a misconception",
    "new_plain": "new wording, keys without",
}


@dataclass(frozen=True, slots=True, eq=False)
class Part:
    """Some of N prompts; what is told of them is a mean over prompts, and clusters are resampled."""

    name: str
    chosen: np.ndarray  # [n] places among the N prompts, ascending
    clusters: np.ndarray  # [N] of all prompts: what is resampled together
    samples: int  # resamples
    seed: int
    resamples: Resamples

    @classmethod
    def of(cls, name: str, chosen: np.ndarray, clusters: np.ndarray, samples: int, seed: int) -> Part:
        """The places where `chosen` [N] is true."""
        places = np.flatnonzero(chosen)
        return cls(name, places, clusters, samples, seed, Resamples.of(clusters[places], samples, seed))

    def some(self, mask: np.ndarray) -> Part:
        """Those of its prompts where a mask [N] of all is true."""
        chosen = np.zeros(len(mask), bool)
        chosen[self.chosen] = True
        return Part.of(self.name, chosen & mask, self.clusters, self.samples, self.seed)

    @property
    def clusters_count(self) -> int:
        """Distinct clusters."""
        return self.resamples.drawn.shape[1]

    def mean(self, values: np.ndarray) -> dict | None:
        """Mean of values [N] and its 95 % interval; of the prompts that have one, nan of the others.

        None where none has; the interval is None where there are too few clusters.
        """
        own = values[self.chosen]
        known = ~np.isnan(own)
        if not known.any():
            return None
        if not known.all():
            return self.some(~np.isnan(values)).mean(values)
        return {"mean": float(own.mean()), "interval": self.resamples.interval(own)}

    def gain(self, before: np.ndarray, after: np.ndarray) -> dict | None:
        """Mean paired difference of values [N], [N] and its 95 % interval; None where nothing is known."""
        found = self.mean(after - before)
        return found and {"gain": found["mean"], "interval": found["interval"]}


def parts_of(rows: Sequence[dict], samples: int, seed: int) -> dict[str, Part]:
    """Name -> part; those that would be empty, or all of the prompts again, are left out.

    Args:
        rows: N prompts: `cluster`; `wording` and `misleads`, null where unknown.
        samples: resamples.
        seed: of the resamples.
    """
    clusters = np.array([row["cluster"] for row in rows])
    new, known = (np.array([row["wording"] == word for row in rows]) for word in ("new", "known"))
    misleads, plain = (np.array([row["misleads"] is said for row in rows]) for said in (True, False))
    masks = {"known": known, "new": new, "misleads": misleads, "plain": plain}
    masks |= {"new_misleads": new & misleads, "new_plain": new & plain}
    told = {name: mask for name, mask in masks.items() if mask.any()}
    told = {"all": np.ones(len(rows), bool)} | told
    return {name: Part.of(name, mask, clusters, samples, seed) for name, mask in told.items()}


def headline_part(parts: dict[str, Part]) -> Part:
    """New wording where wording is known, else all prompts."""
    return parts.get("new", parts["all"])

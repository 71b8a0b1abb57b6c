"""Split by site: whole sites are held out, and no look-alike of their questions is learnt from."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Collection, Mapping
from pathlib import Path

import duckdb

from params.schema import DataParams
from tasks.data.card import Tally
from tasks.data.join import asked_by_site
from tasks.data.split import SPLITS, Clusters, Homes

RANGES = """
SELECT site, min(file_row_number), max(file_row_number) + 1 FROM read_parquet($1) GROUP BY site
"""
ODD = re.compile(r"[^\w. /-]")  # what MLflow takes in no name of a metric


class SiteHomes(Homes):
    """Held-out sites' questions go to eval; a look-alike of one, from another site, goes nowhere.

    Args:
        clusters: of look-alikes.
        shares: all other questions go to sft, reward and rl by theirs, as by `Homes`.
        sites: held out.
        held: by number of question, 1 at the leader of each cluster that holds a held-out site's question.
    """

    def __init__(
        self, clusters: Clusters, shares: Mapping[str, float], sites: Collection[str], held: bytearray
    ) -> None:
        super().__init__(clusters, shares, held_out=())
        self._sites, self._held = frozenset(sites), held

    def next(self, site: str, number: int) -> str | None:
        """The split of the next question, None where it is left out; in the order of (site, id)."""
        is_held = self._held[self._clusters.leader(len(self._homes))]
        moved, home = self.moved, super().next(site, number)
        if not is_held:
            return home
        self.moved = moved
        return "eval" if site in self._sites else None


def homes_of(
    data: DataParams,
    clusters: Clusters,
    held_out: Collection[tuple[str, int]] | None,
    base: duckdb.DuckDBPyConnection,
    questions: Path,
) -> Homes:
    """Who says where a question goes, as `data.split_by` has it.

    Args:
        data: the section.
        clusters: of look-alikes.
        held_out: (site, id) of the questions that the sample site holds out; None where shares decide.
        base: a database after `tasks.data.join.join`.
        questions: Parquet file of `KEYS`, sorted by (site, id).

    Raises:
        ValueError: a held-out site has no usable question.
    """
    shares = {name: getattr(data.split, name) for name in SPLITS}
    if data.split_by == "question":
        return Homes(clusters, shares, held_out)
    ranges = {site: range(a, b) for site, a, b in base.execute(RANGES, [str(questions)]).fetchall()}
    held = bytearray(sum(map(len, ranges.values())))
    for site in data.eval_sites:
        if site not in ranges:
            count = asked_by_site(base).get(site, 0)
            raise ValueError(
                f"data.eval_sites: none of the {count} questions of {site} has {data.min_answers} usable "
                "answers (data.min_answers)"
            )
        for number in ranges[site]:
            held[clusters.leader(number)] = 1
    return SiteHomes(clusters, shares, data.eval_sites, held)


def refuse_sites(held_out: Collection[str], sites: Collection[str]) -> None:
    """Every held-out site (data.eval_sites) is one of the sources', and at least one other stays.

    Raises:
        ValueError: one line that names the key, the site and the sources' sites.
    """
    known = ", ".join(sorted(sites))
    for site in held_out:
        if site not in sites:
            raise ValueError(f"data.eval_sites: {site!r} is no site of data.source, which has {known}")
    if held_out and set(sites) <= set(held_out):
        raise ValueError(
            f"data.eval_sites: every site of data.source is held out ({known}); none is left to learn from"
        )


def held_out_metrics(held_out: Collection[str], tally: Tally) -> dict[str, float]:
    """`held_out/<site>`: its questions in eval; letters that no metric's name may have become "_"."""
    found: Counter[str] = Counter()
    for site in held_out:
        found[f"held_out/{ODD.sub('_', site)}"] += tally.sum(site, "eval")["questions"]
    return {name: float(count) for name, count in found.items()}

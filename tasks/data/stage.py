"""The stage: read every source, join answers to questions, convert, split, prove, write."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path

import duckdb
import pyarrow as pa
import pyarrow.parquet as pq

from params.schema import Params
from tasks.data import deal as dealing
from tasks.data.alike import cluster, overlaps
from tasks.data.card import Tally, card_of, first_losses, metrics_of
from tasks.data.deal import Deal, buckets, deal
from tasks.data.engine import connect
from tasks.data.join import asked_by_site, join, kept
from tasks.data.join import questions as questions_of
from tasks.data.parallel import Crew
from tasks.data.posts import read_dump
from tasks.data.progress import Progress
from tasks.data.questions import Gather, gather
from tasks.data.schema import KEYS, KNOWN_LATER, SCHEMA
from tasks.data.shapes import read_shape
from tasks.data.shelf import Shelf
from tasks.data.sources import DumpError, Source, find_sources, refuse_other_files, site_of
from tasks.data.split import SPLITS, Homes
from tasks.run.files import remove, staged
from tasks.run.layout import Layout, StageResult
from tasks.run.parquet import TableWriter
from tasks.run.tracking import log_artifact, log_dataset

Known = dict[tuple[str, int], dict]  # (site, id) -> what the sample site knows, a row of its expected.jsonl
INLINE_CHARACTERS = 16_000_000  # below, other processes would take longer to start than to help


def run(params: Params, layout: Layout) -> StageResult:
    """Dump in, four Parquet files and a card out.

    Returns:
        Counts of rows, questions, answers and pairs, drops by reason, overlaps between splits (all 0).

    Raises:
        ValueError: a source is missing, damaged, no dump or without a usable question, or a split comes out
            empty; what an earlier run wrote stays as it was.
    """
    work = layout.scratch("data") / "work"
    remove(work)  # what a killed run left
    work.mkdir()
    try:
        if params.data.source == "sample":
            sources, known, facts = _sample_site(params, work)
        else:
            sources, known, facts = find_sources(params.data.source, layout.root / "data" / "raw"), {}, {}
        with connect(work, params.machine.threads) as base, Crew(params.machine.threads) as crew:
            metrics = _prepare(sources, known, params, layout, work, base, crew)
    finally:
        remove(work)
    _remember(params, layout, metrics, [] if params.data.source == "sample" else sources)
    metrics |= {f"sample/{key}": float(value) for key, value in facts.items()}
    return StageResult(metrics)


def _prepare(
    sources: list[Source],
    known: Known,
    params: Params,
    layout: Layout,
    work: Path,
    base: duckdb.DuckDBPyConnection,
    crew: Crew,
) -> dict[str, float]:
    with Shelf(work) as shelf:
        refuse_other_files(sources)
        sites = {s.path: read_shape(s, shelf) if s.is_table else read_dump(s, shelf, crew) for s in sources}
    losses = first_losses(shelf)
    for line in losses:
        print(f"data: {line}", flush=True)
    if shelf.characters > INLINE_CHARACTERS:
        crew.start()
    drops = join(base, shelf, params.data.min_answers)
    parts, more = convert(base, shelf, params.data.min_answers, crew)
    drops += more
    _refuse_empty_sources(base, sites, shelf, params.data.min_answers)
    clusters = cluster(base, work / "questions.parquet", shelf.links)
    held_out = {key for key, row in known.items() if row["held_out"]} or None
    homes = Homes(clusters, {name: getattr(params.data.split, name) for name in SPLITS}, held_out)
    tally = Tally()
    with ExitStack() as outs:  # all are staged before the first takes its place
        files = {n: outs.enter_context(staged(layout.artifact("data", f"{n}.parquet"))) for n in SPLITS}
        _write(_routed(parts, homes), files, tally, known, params.machine.threads)
        _refuse_empty_splits(tally)
        overlap = overlaps(base, files, crew)
        if any(overlap.values()):  # no assert: with PYTHONOPTIMIZE it would not be asked
            raise RuntimeError(f"questions that look alike stand in two splits: {overlap}")
        metrics = metrics_of(tally, SPLITS, shelf, drops, overlap) | {"moved": float(homes.moved)}
        card = card_of(tally, SPLITS, metrics, params.data.min_answers, losses)
        outs.enter_context(staged(layout.artifact("data", "card.md"))).write_text(card, encoding="utf-8")
    return metrics


def _remember(params: Params, layout: Layout, metrics: dict[str, float], sources: list[Source]) -> None:
    """The card and the lineage of the four files, for MLflow: what they were made from, too."""
    source = params.data.source
    origin = source if isinstance(source, str) else ", ".join(source)
    log_artifact(layout.artifact("data", "card.md"))
    for name in SPLITS:
        counts = {what: metrics[f"{name}/{what}"] for what in ("questions", "answers", "pairs")}
        log_dataset(layout.artifact("data", f"{name}.parquet"), name, origin, counts)
    for path, site in ((found.path, found.site) for found in sources if not found.hub):
        log_dataset(path, "raw", site, {"bytes": float(path.stat().st_size)})


def convert(
    base: duckdb.DuckDBPyConnection, shelf: Shelf, min_answers: int, crew: Crew
) -> tuple[list[Path], Counter[str]]:
    """Convert the posts that stay, bring them together, score the answers.

    Returns:
        Arrow files of `UNSPLIT`, which hold all questions sorted by (site, id), and the drops by reason.
        What decides their splits is in questions.parquet, in the same order.
    """
    folders = shelf.folder / "buckets", shelf.folder / "parts"
    for folder in folders:
        folder.mkdir()
    count = max(1, shelf.characters // dealing.CHARACTERS_PER_BUCKET)
    per_bucket = max(1, -(-questions_of(base) // count))
    progress = Progress("converting")
    deals = (Deal(path, rows, places, folders[0], per_bucket) for path, rows, places in kept(base, shelf))
    for characters in crew.map(deal, deals):
        progress.add(characters)
    progress.done()
    drops: Counter[str] = Counter()
    parts: list[Path] = []
    gathers = (Gather(files, min_answers, folders[1] / files[0].stem) for files in buckets(folders[0]))
    with pq.ParquetWriter(shelf.folder / "questions.parquet", KEYS, use_dictionary=["site"]) as writer:
        for path, keys, dropped in crew.map(gather, gathers):
            writer.write_table(keys)
            parts.append(path)
            drops += dropped
    return parts, drops


def _routed(parts: list[Path], homes: Homes) -> Iterator[dict[str, pa.Table]]:
    """Some questions by split, in order."""
    for path in parts:
        with pa.memory_map(str(path)) as source:
            table = pa.ipc.open_file(source).read_all()
        path.unlink()
        keys = zip(table["site"].to_pylist(), table["id"].to_pylist(), strict=True)
        found = [(homes.next(*key), homes.cluster) for key in keys]
        names = pa.array([home for home, _ in found], pa.string())
        table = _with(table, "cluster", pa.array([cluster for _, cluster in found], pa.string()))
        yield {name: table.filter(pa.compute.equal(names, name)) for name in SPLITS}


def _write(
    parts: Iterator[dict[str, pa.Table]],
    files: dict[str, Path],
    tally: Tally,
    known: Known,
    threads: int,
) -> None:
    with ExitStack() as stack:
        writers = {name: stack.enter_context(TableWriter(path, SCHEMA)) for name, path in files.items()}
        pool = stack.enter_context(ThreadPoolExecutor(threads))  # Arrow compresses without Python's lock
        running: list[Future[None]] = []
        for part in parts:
            for name, questions in part.items():
                tally.add(name, questions)
                part[name] = questions.select(SCHEMA.names)
            part["eval"] = _with_known(part["eval"], known) if known else part["eval"]
            for future in running:
                future.result()
            running = [pool.submit(writers[name].write, table) for name, table in part.items()]
        for future in running:
            future.result()


def _refuse_empty_sources(
    base: duckdb.DuckDBPyConnection, sites: dict[Path, set[str]], shelf: Shelf, least: int
) -> None:
    asked = asked_by_site(base)
    questions = str(shelf.folder / "questions.parquet")
    found = base.execute("SELECT DISTINCT site FROM read_parquet($1)", [questions]).fetchall()
    for path, names in sites.items():
        if names.isdisjoint(site for (site,) in found):
            count = sum(asked.get(name, 0) for name in names)
            lost = shelf.damage[path].earliest()
            raise DumpError(
                f"{path}: none of its {count} questions has {least} usable answers (data.min_answers)"
                + (f"; left out first: {lost}" if lost else "")
            )


def _refuse_empty_splits(tally: Tally) -> None:
    questions = {name: tally.sum(split=name)["questions"] for name in SPLITS}
    counts = ", ".join(f"{name} {count}" for name, count in questions.items())
    for name, count in questions.items():
        if not count:
            raise ValueError(f"data.split.{name}: no question fell into it ({counts})")


def _sample_site(params: Params, work: Path) -> tuple[list[Source], Known, dict[str, float]]:
    """Write the sample site in the official format, for the real reader, where nothing keeps it."""
    from tasks.data.sample import write_site
    from tasks.run.devices import derive_seed

    shares, seed = params.data.split, derive_seed(params.seed, "data", "sample")
    held_out = shares.eval / sum(getattr(shares, name) for name in SPLITS)
    facts = write_site(work, params.data.sample.questions, seed, held_out)
    print("data: sample site: " + ", ".join(f"{key} {value:g}" for key, value in facts.items()), flush=True)
    (posts,) = work.glob("*/Posts.xml")
    site = site_of(posts)
    rows = map(json.loads, posts.with_name("expected.jsonl").read_text(encoding="utf-8").splitlines())
    return [Source(posts, site)], {(site, row["question_id"]): row for row in rows}, facts


def _with_known(questions: pa.Table, known: Known) -> pa.Table:
    """The right answers are for the two evaluations alone, so they enter the eval split and no other."""
    keys = zip(questions["site"].to_pylist(), questions["id"].to_pylist(), strict=True)
    found = [known[key] for key in keys]
    for name in KNOWN_LATER:
        questions = _with(questions, name, pa.array([row[name] for row in found], SCHEMA.field(name).type))
    answers = [
        [answer | {"style": row["styles"].get(str(answer["id"]))} for answer in group]
        for row, group in zip(found, questions["answers"].to_pylist(), strict=True)
    ]
    return _with(questions, "answers", pa.array(answers, SCHEMA.field("answers").type))


def _with(table: pa.Table, name: str, column: pa.Array) -> pa.Table:
    place = table.schema.get_field_index(name)
    return table.set_column(place, table.schema.field(place), column)

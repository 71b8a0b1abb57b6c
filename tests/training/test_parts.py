"""Parts of a batch, several processes: always the gradient of the whole batch."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import tiny
import torch
from safetensors.torch import load_file
from trainings import FirstGradients, run_in_two, shard_on_cpus

from tasks.reward import GroupedAnswers, RewardConfig, RewardTrainer
from tasks.sft import PackedRow, SFTConfig, SFTTrainer
from tasks.training.microbatches import Parts, Share


def sizes(most: int, rows: list[int]) -> list[list[int]]:
    collate = Parts(lambda some: {"rows": some, "labels": torch.zeros(len(some))}, lambda row: row, most)
    found = collate(rows)
    assert len(found["labels"]) == len(rows)
    return [part["rows"] for part in found["parts"]]


def test_parts_by_hand():
    assert sizes(8, [3, 4, 5, 9]) == [[3, 4], [5], [9]]
    assert sizes(8, [9, 4, 4, 1]) == [[9], [4, 4], [1]]
    assert sizes(0, [3, 4, 5, 9]) == [[3, 4, 5, 9]]


def test_a_share_by_hand():
    def collate(rows):
        return {"parts": [rows], "labels": torch.tensor(rows)}

    assert Share(collate, 0, 2)([5, 6, 7])["parts"] == [[5, 7]]
    assert Share(collate, 1, 2)([5, 6, 7])["labels"].tolist() == [6]
    idle = Share(collate, 1, 2)([5])
    assert idle["parts"] == [[5]] and len(idle["labels"]) == 0


def trained(kind: str, folder: Path, count: int = 8, **arguments) -> dict[str, torch.Tensor]:
    """Gradients of the first step over eight rows (or fewer) of unequal numbers of items.

    The model comes into `folder`/model, what it says of five rows into `folder`/eval.json.
    """
    keys = {
        "output_dir": str(folder), "max_steps": 1, "use_cpu": True, "disable_tqdm": True,
        "save_strategy": "no", "dataloader_pin_memory": False, "max_grad_norm": 1e9, "learning_rate": 1e-2,
        **arguments,
    }  # fmt: skip
    drawn = tiny.drawn([3 + n % 5 for n in range(32)])
    seen, args = FirstGradients(), (SFTConfig if kind == "sft" else RewardConfig)(**keys)
    if args.fsdp:
        shard_on_cpus()
    if kind == "sft":
        rows = [
            PackedRow(tuple(a + b), (len(a), len(b)), (1, 1))
            for a, b in zip(drawn[:8], drawn[8:16], strict=True)
        ]
        made = SFTTrainer(tiny.causal(), args, rows[:count], rows[:5], callbacks=[seen])
    else:
        groups = [
            GroupedAnswers(tuple(drawn[n]), tuple(map(tuple, drawn[8 + 3 * n : 11 + 3 * n])),
                           ((0, 1), (2, 1), (0, 2))[: 1 + n % 3])
            for n in range(8)
        ]  # fmt: skip
        made = RewardTrainer(tiny.scorer(), args, groups[:count], groups[:5], callbacks=[seen])
    made.train()
    made.save_model(str(folder / "model"))
    metrics = made.evaluate()
    if made.args.process_index == 0:
        (folder / "eval.json").write_text(json.dumps(metrics))
    return seen.found


@pytest.mark.parametrize("kind", ["sft", "reward"])
def test_parts_make_the_whole_batch(tmp_path, kind):
    whole = trained(kind, tmp_path, per_device_train_batch_size=8)
    for most in (1, 30):
        found = trained(kind, tmp_path, per_device_train_batch_size=8, microbatch_tokens=most)
        assert tiny.far_gradients(found, whole) <= 1e-5
    halves = trained(
        kind, tmp_path, per_device_train_batch_size=4, gradient_accumulation_steps=2, microbatch_tokens=25
    )
    assert tiny.far_gradients(halves, whole) <= 1e-5


RANK = """
import os, sys
from pathlib import Path
from safetensors.torch import save_file
import test_parts as t
kind, folder = sys.argv[1], Path(sys.argv[2])
found = t.trained(kind, folder, per_device_train_batch_size=4, microbatch_tokens=30, ddp_backend="gloo")
found = {k.removeprefix("module."): v for k, v in found.items()}
save_file(found, folder / f"rank-{os.environ['RANK']}.safetensors")
"""
ODD = """
import sys
from pathlib import Path
import test_parts as t
keys = {"fsdp": True, "fsdp_config": {"version": 2, "transformer_layer_cls_to_wrap": ["LlamaDecoderLayer"]}}
t.trained(sys.argv[1], Path(sys.argv[2]), 7, per_device_train_batch_size=3, max_steps=4, ddp_backend="gloo",
          **(keys if sys.argv[3] == "sharded" else {}))
"""
SHARDED = """
import sys
from pathlib import Path
import test_parts as t
keys = {"fsdp": True, "fsdp_config": {"version": 2, "transformer_layer_cls_to_wrap": ["LlamaDecoderLayer"]}}
t.trained(sys.argv[1], Path(sys.argv[2]), per_device_train_batch_size=4, microbatch_tokens=9, max_steps=3,
          per_device_eval_batch_size=2, ddp_backend="gloo", **keys)
"""


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["sft", "reward"])
def test_two_processes_make_the_whole_batch(tmp_path, kind):
    """Each takes half of the batch, in parts, with another number of items than the other."""
    run_in_two(RANK, tmp_path, kind, tmp_path, beside=__file__)
    whole = trained(kind, tmp_path, per_device_train_batch_size=8)
    for rank in (0, 1):
        assert tiny.far_gradients(load_file(tmp_path / f"rank-{rank}.safetensors"), whole) <= 1e-5


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["sft", "reward"])
def test_sharded_processes_end_with_the_model_of_one(tmp_path, kind):
    """Weights sharded by FSDP over two processes, exported whole as safetensors."""
    run_in_two(SHARDED, tmp_path, kind, tmp_path, beside=__file__)
    found = load_file(tmp_path / "model/model.safetensors")
    (tmp_path / "whole").mkdir()
    trained(kind, tmp_path / "whole", per_device_train_batch_size=8, max_steps=3)
    wanted = load_file(tmp_path / "whole/model/model.safetensors")
    assert found.keys() == wanted.keys()
    assert all(tiny.far(found[name], wanted[name]) <= 1e-4 for name in wanted)
    said, alone = (json.loads((tmp_path / name).read_text()) for name in ("eval.json", "whole/eval.json"))
    assert said == pytest.approx(alone, rel=1e-3)
    assert not list(tmp_path.rglob("*.bin")) and not list(tmp_path.rglob("*.pt"))


@pytest.mark.slow
@pytest.mark.parametrize("how", ["whole", "sharded"])
@pytest.mark.parametrize("kind", ["sft", "reward"])
def test_short_batches_are_shared_too(tmp_path, kind, how):
    """Seven rows in batches of six: of every second batch, of one row, the second process has none."""
    run_in_two(ODD, tmp_path, kind, tmp_path, how, beside=__file__)
    (tmp_path / "one").mkdir()
    trained(kind, tmp_path / "one", 7, per_device_train_batch_size=6, max_steps=4)
    found, wanted = (load_file(tmp_path / f / "model.safetensors") for f in ("model", "one/model"))
    assert all(tiny.far(found[name], wanted[name]) <= 1e-3 for name in wanted)

"""Weights that two processes share, brought together: with an adapter, and without."""

from __future__ import annotations

from pathlib import Path

import pytest
import tiny
import torch
from safetensors.torch import load_file, save_file
from torch.distributed.tensor import DTensor
from trainings import run_in_two, shard_on_cpus

from tasks.lm.adapters.lora import lora
from tasks.lm.model.loading import load_causal
from tasks.reward import GroupedAnswers, RewardConfig, RewardTrainer
from tasks.sft import PackedRow, SFTConfig, SFTTrainer

FSDP = {"fsdp": True, "fsdp_config": {"version": 2, "transformer_layer_cls_to_wrap": ["LlamaDecoderLayer"]}}


def tuned(kind: str, rank: int, folder: Path, rows: int, **arguments) -> None:
    """The plain model in the end, as the stages save it: folder/model."""
    keys = {
        "output_dir": str(folder), "max_steps": 3, "use_cpu": True, "disable_tqdm": True,
        "save_strategy": "no", "dataloader_pin_memory": False, "learning_rate": 1e-2,
        "per_device_train_batch_size": rows, **arguments,
    }  # fmt: skip
    drawn = tiny.drawn([3 + n % 5 for n in range(32)])
    adapter = lora(rank, 8) if rank else None
    torch.manual_seed(0)  # of the adapter
    args = (SFTConfig if kind == "sft" else RewardConfig)(**keys)
    if args.fsdp:
        shard_on_cpus()
    if kind == "sft":
        data = [PackedRow(tuple(a), (len(a),), (1,)) for a in drawn[:8]]
        made = SFTTrainer(tiny.causal(vocab_size=330), args, data, data[:5], peft_config=adapter)
    else:
        data = [
            GroupedAnswers(tuple(drawn[n]), (tuple(drawn[8 + n]), tuple(drawn[16 + n])), ((0, 1),))
            for n in range(8)
        ]
        made = RewardTrainer(tiny.scorer(vocab_size=330), args, data, data[:5], peft_config=adapter)
    made.train()
    if args.fsdp:
        assert all(isinstance(p, DTensor) for p in made.model.parameters())
    made.evaluate()
    model = made.merged() if adapter else made.whole()
    assert (model is None) == (made.args.process_index > 0)
    tiny.save(model, folder / "model")
    if model is not None:
        probe = model.eval()(torch.tensor([drawn[0]])).logits.detach()
        save_file({"logits": probe.contiguous()}, folder / "probe.safetensors")


PROGRAM = """
import sys
from pathlib import Path
import test_sharded as t
t.tuned(sys.argv[1], int(sys.argv[2]), Path(sys.argv[3]), 4, ddp_backend="gloo", **t.FSDP)
"""


@pytest.mark.slow
@pytest.mark.parametrize("rank", [0, 2])
@pytest.mark.parametrize("kind", ["sft", "reward"])
def test_shards_come_together_as_the_model_of_one_process(tmp_path, kind, rank):
    (tmp_path / "one").mkdir()
    tuned(kind, rank, tmp_path / "one", 8)
    run_in_two(PROGRAM, tmp_path, kind, rank, tmp_path, beside=__file__)
    found, wanted = (load_file(tmp_path / f / "model/model.safetensors") for f in ("", "one"))
    assert found.keys() == wanted.keys() and not any("lora" in name for name in found)
    assert all(tiny.far(found[name], wanted[name]) <= 1e-3 for name in wanted)
    said, alone = (load_file(tmp_path / f / "probe.safetensors")["logits"] for f in ("", "one"))
    assert tiny.far(said, alone) <= 1e-3
    if kind == "sft":
        model = load_causal(tmp_path / "model")
        assert model.config.pad_token_id == tiny.PAD


@pytest.mark.parametrize("kind", ["sft", "reward"])
def test_an_adapter_trained_in_bfloat16_merges_in_float32(tmp_path, kind):
    tuned(kind, 2, tmp_path, 8, bf16=True)
    assert (tmp_path / "model/model.safetensors").exists()

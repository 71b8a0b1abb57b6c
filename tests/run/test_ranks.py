"""What one of several processes knows of itself, and what it must not write."""

from __future__ import annotations

import json
from types import SimpleNamespace

import pytest
import torch

from tasks.run import checkpoint, ranks
from tasks.run.devices import use_device
from tasks.run.files import staged, write_json
from tasks.run.progress import Progress
from tasks.training.arguments import training_arguments
from tasks.training.callback import Follow


@pytest.fixture
def second(monkeypatch):
    """The second of four processes."""
    for name, value in (("RANK", "1"), ("LOCAL_RANK", "1"), ("WORLD_SIZE", "4")):
        monkeypatch.setenv(name, value)


def test_alone():
    assert (ranks.rank(), ranks.local_rank(), ranks.processes()) == (0, 0, 1)
    assert ranks.is_first() and not ranks.are_sharded() and ranks.share("x", 7) == 7


def test_among_others(second):
    assert (ranks.rank(), ranks.local_rank(), ranks.processes()) == (1, 1, 4)
    assert not ranks.is_first() and ranks.share("x", 8) == 2
    with pytest.raises(ValueError, match=r"sft\.batch_rows \(6\) is not a multiple of 4 processes"):
        ranks.share("sft.batch_rows", 6)


@pytest.mark.parametrize("name", ranks.SHARDING)
def test_sharding_is_what_the_launcher_says(monkeypatch, name):
    monkeypatch.setenv(name, "false")
    assert not ranks.are_sharded()
    monkeypatch.setenv(name, "true")
    assert ranks.are_sharded()


def arguments(folder, **keys):
    given = {
        "examples": 10, "batch": 8, "batch_key": "sft.batch_rows", "epochs": 2, "microbatch_tokens": 9,
        "warmup_share": 0.5, "dtype": "float32", "device": "cpu", "seed": 1, "checkpoint_steps": 3,
    }  # fmt: skip
    return training_arguments(folder, **{**given, **keys})


def test_a_batch_is_dealt_out_and_steps_stay_those_of_one(tmp_path, second):
    found = arguments(tmp_path)
    assert found["per_device_train_batch_size"] == found["per_device_eval_batch_size"] == 2
    assert found["max_steps"] == 3 and found["save_strategy"] == "steps"
    assert (
        arguments(tmp_path, max_steps=2)["max_steps"]
        == 2
        != arguments(tmp_path, max_steps=9)["max_steps"]
        == 3
    )
    with pytest.raises(ValueError, match=r"sft\.batch_rows \(9\)"):
        arguments(tmp_path, batch=9)


def test_shards_are_not_checkpointed(tmp_path, monkeypatch):
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    assert arguments(tmp_path)["save_strategy"] == "no"


def test_only_the_first_leaves_files(tmp_path, second, monkeypatch):
    with staged(tmp_path / "model") as folder:
        folder.mkdir()
        (folder / "weights").write_text("mine")
    with staged(tmp_path / "nothing"):
        pass  # it need not write
    write_json(tmp_path / "metrics.json", {})
    assert not list(tmp_path.iterdir()) and not folder.exists()
    write_json(tmp_path / "own.json", {"rank": 1}, by_every_rank=True)
    assert json.loads((tmp_path / "own.json").read_text()) == {"rank": 1}
    monkeypatch.setenv("RANK", "0")
    write_json(tmp_path / "metrics.json", {})
    assert (tmp_path / "metrics.json").exists()


def test_every_rank_may_keep_a_checkpoint(tmp_path, second):
    checkpoint.save(tmp_path, 1, {"generator": 7})
    assert checkpoint.latest(tmp_path).state == {"generator": 7}


def test_only_the_first_writes_a_model(tmp_path, second, monkeypatch):
    import tiny

    folder = tiny.save(tiny.causal(vocab_size=330), tmp_path / "model")
    assert folder.is_dir() and not list(folder.iterdir())
    monkeypatch.setenv("RANK", "0")
    assert (tiny.save(tiny.causal(vocab_size=330), folder) / "model.safetensors").exists()


def test_only_the_first_shows_progress(second, capsys, monkeypatch):
    Progress("sft", 1).update(1)
    assert capsys.readouterr().err == ""
    monkeypatch.setenv("RANK", "0")
    Progress("sft", 1).update(1)
    assert "sft 1/1" in capsys.readouterr().err


def test_tokens_are_those_of_all(second):
    shown = Follow("sft", iter([0, 5]).__next__)
    shown.on_train_begin(None, SimpleNamespace(max_steps=2, global_step=0), None)
    shown.on_step_end(None, SimpleNamespace(global_step=1), None)
    assert shown.progress.units == 4 * 5


def test_each_has_a_gpu_of_its_own(second, monkeypatch):
    assert use_device("auto", 1) == torch.device("cpu")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert use_device("auto", 1) == use_device("cuda", 1) == torch.device("cuda", 1)
    assert use_device("cpu", 1) == torch.device("cpu")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    with pytest.raises(ValueError, match=r"machine\.processes: process 1 has no GPU; torch sees 1"):
        use_device("cuda", 1)
    monkeypatch.delenv("WORLD_SIZE")
    assert use_device("cuda", 1) == torch.device("cuda")

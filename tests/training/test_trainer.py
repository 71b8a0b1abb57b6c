import json
import math
import pickle

import pytest
import torch
from trainings import KillAt, Killed, run_in_two
from transformers import (
    EarlyStoppingCallback,
    LlamaConfig,
    LlamaForCausalLM,
    Trainer,
    TrainingArguments,
)

from tasks.run.checkpoint import load
from tasks.training.checkpoints import SafeCheckpoints


class SafeTrainer(SafeCheckpoints, Trainer):
    pass


def tiny(tied=True):
    torch.manual_seed(1)
    config = LlamaConfig(
        vocab_size=17, hidden_size=8, intermediate_size=16, num_hidden_layers=2, num_attention_heads=2,
        max_position_embeddings=16, attention_dropout=0.2, tie_word_embeddings=tied,
    )  # fmt: skip
    return LlamaForCausalLM(config)


def rows(count):
    draw = torch.Generator().manual_seed(2)
    tokens = torch.randint(0, 17, (count, 6), generator=draw)
    return [{"input_ids": row, "labels": row} for row in tokens]


def trainer(folder, *callbacks, model=None, **arguments):
    """23 rows of batch 2 x 2: 6 steps an epoch, the last one short; logs and saves on different steps."""
    defaults = {
        "num_train_epochs": 3, "per_device_train_batch_size": 2, "gradient_accumulation_steps": 2, "seed": 5,
        "save_steps": 3, "logging_steps": 2, "eval_strategy": "steps", "eval_steps": 3, "learning_rate": 1e-2,
        "lr_scheduler_type": "cosine", "warmup_steps": 2, "weight_decay": 0.1, "use_cpu": True,
        "report_to": "none", "disable_tqdm": True,
    }  # fmt: skip
    args = TrainingArguments(str(folder), **{**defaults, **arguments})
    data = {"train_dataset": rows(23), "eval_dataset": rows(4)}
    return SafeTrainer(model or tiny(), args, callbacks=list(callbacks), **data)


TIMED = ("runtime", "per_second")


def facts(made, output=None):
    """Everything a resumed run must have in common with one that was never killed."""
    logs = made.state.log_history
    history = [{k: v for k, v in log.items() if not any(timed in k for timed in TIMED)} for log in logs]
    state = made.optimizer.state_dict()["state"]
    return {
        "weights": {name: value.tolist() for name, value in made.model.state_dict().items()},
        "optimizer": {k: {n: torch.as_tensor(v).tolist() for n, v in s.items()} for k, s in state.items()},
        "schedule": made.lr_scheduler.state_dict()["_last_lr"],
        "history": history,
        "step": made.state.global_step,
        "flos": made.state.total_flos,
        "loss": output and output.training_loss,
        "next draw": torch.rand(1).item(),
    }


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)  # nothing here is large enough for two
    yield
    torch.set_num_threads(before)


@pytest.fixture
def no_pickle(monkeypatch):
    def refuse(*_, **__):
        raise AssertionError("a pickle")

    for module, names in ((torch, ("save", "load")), (pickle, ("dump", "dumps", "load", "loads", "Pickler"))):
        for name in names:
            monkeypatch.setattr(module, name, refuse)


@pytest.fixture(scope="module")
def uninterrupted(one_thread, tmp_path_factory):
    made = trainer(tmp_path_factory.mktemp("whole"))
    return facts(made, made.train())


@pytest.mark.parametrize("step", [1, 4, 6, 7, 12, 13, 18])
def test_a_killed_run_goes_on_bit_for_bit(tmp_path, no_pickle, uninterrupted, step):
    """Before the first checkpoint, inside an epoch, at its end, in the last step."""
    with pytest.raises(Killed):
        trainer(tmp_path, KillAt(step)).train()
    resumed = trainer(tmp_path, model=tiny())
    with torch.no_grad():
        resumed.model.lm_head.weight.add_(0 if step < 4 else 1)  # the checkpoint's weights must win
    found = resumed.latest_checkpoint()
    assert (found is None) == (step < 4)
    assert facts(resumed, resumed.train(resume_from_checkpoint=found)) == uninterrupted
    assert len(list(tmp_path.glob("checkpoint-*"))) == 2


def test_a_run_killed_twice_goes_on_bit_for_bit(tmp_path, uninterrupted):
    for step in (7, 13):
        with pytest.raises(Killed):
            trainer(tmp_path, KillAt(step)).resume()
    resumed = trainer(tmp_path)
    assert facts(resumed, resumed.resume()) == uninterrupted


def test_a_finished_run_is_finished(tmp_path):
    """Trainer alone would train one step too many here: max_steps lies inside an epoch."""
    made = trainer(tmp_path, max_steps=9)
    whole = facts(made, made.train())
    again = trainer(tmp_path, max_steps=9)
    assert facts(again, again.resume())["weights"] == whole["weights"]
    assert again.state.global_step == 9 and again.state.log_history[-1]["train_loss"] == whole["loss"]


def test_a_harmed_checkpoint_is_passed_over(tmp_path, uninterrupted):
    with pytest.raises(Killed):
        trainer(tmp_path, KillAt(13)).train()
    harmed = tmp_path / "checkpoint-12/trainer_state.json"
    harmed.write_text(harmed.read_text().replace("1", "2", 1))
    resumed = trainer(tmp_path)
    with pytest.raises(ValueError, match=r"checkpoint-12/trainer_state\.json"):
        resumed.train(resume_from_checkpoint=str(harmed.parent))
    assert resumed.latest_checkpoint() == str(tmp_path / "checkpoint-9")
    assert facts(resumed, resumed.resume()) == uninterrupted


def test_no_file_is_a_pickle(tmp_path, no_pickle):
    made = trainer(tmp_path / "run", num_train_epochs=1)
    made.train()
    made.save_model(str(tmp_path / "model"))
    files = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert {path.suffix for path in files} == {".json", ".safetensors"} and len(files) > 8
    for path in files:  # what they are, by their first bytes
        start = path.read_bytes()[:9]
        assert start[:1] == b"{" if path.suffix == ".json" else start[8:] == b"{"
    loaded = LlamaForCausalLM.from_pretrained(tmp_path / "model")
    assert torch.equal(loaded.lm_head.weight, made.model.lm_head.weight)


def test_true_means_the_newest_and_needs_one(tmp_path, uninterrupted):
    with pytest.raises(ValueError, match="no valid checkpoint in"):
        trainer(tmp_path).train(resume_from_checkpoint=True)
    with pytest.raises(Killed):
        trainer(tmp_path, KillAt(8)).train()
    resumed = trainer(tmp_path)
    assert facts(resumed, resumed.train(resume_from_checkpoint=True)) == uninterrupted


def test_looking_for_a_checkpoint_does_not_resume_it(tmp_path, uninterrupted):
    with pytest.raises(Killed):
        trainer(tmp_path, KillAt(8)).train()
    fresh = trainer(tmp_path)
    assert fresh.latest_checkpoint()
    assert facts(fresh, fresh.train()) == uninterrupted


WORST = {"load_best_model_at_end": True, "metric_for_best_model": "loss", "greater_is_better": True}


def test_the_best_model_is_kept_and_loaded(tmp_path, no_pickle):
    """`best` is the highest loss here, which comes early, so that the two newest could not serve."""
    made = trainer(tmp_path, **WORST)
    made.train()
    losses = {log["step"]: log["eval_loss"] for log in made.state.log_history if "eval_loss" in log}
    best = max(losses, key=losses.get)
    assert best == 3
    assert made.evaluate()["eval_loss"] == losses[best]
    assert [path.name for path in (tmp_path / "best").iterdir()] == [f"checkpoint-{best}"]


def test_patience_survives_a_kill(tmp_path):
    def run(*callbacks):
        return trainer(tmp_path, EarlyStoppingCallback(4), *callbacks, **WORST)

    with pytest.raises(Killed):
        run(KillAt(14)).train()
    resumed = run()
    resumed.resume()
    assert resumed.state.global_step == 3 * (1 + 4)


@pytest.mark.parametrize("name", ["fsdp", "deepspeed"])
def test_sharded_training_is_refused(tmp_path, monkeypatch, name):
    made = trainer(tmp_path)
    monkeypatch.setattr(made, f"is_{name}_enabled", True)
    with pytest.raises(ValueError, match=f"{name}: sharded training has no checkpoints"):
        made.train()
    with pytest.raises(ValueError, match=f"{name}: sharded training has no checkpoints"):
        made.train(resume_from_checkpoint="somewhere")


def test_another_model_is_refused(tmp_path):
    with pytest.raises(Killed):
        trainer(tmp_path, KillAt(4)).train()
    other = LlamaForCausalLM(LlamaConfig.from_dict({**tiny().config.to_dict(), "num_hidden_layers": 3}))
    with pytest.raises(ValueError, match=r"checkpoint-3 is of another model: 9 weights, model\.layers\.2"):
        trainer(tmp_path, model=other).resume()


def test_frozen_weights_of_a_peft_model_are_left_out(tmp_path, no_pickle):
    peft = pytest.importorskip("peft")

    def adapted():
        torch.manual_seed(3)
        return peft.get_peft_model(tiny(), peft.LoraConfig(r=2, target_modules=["q_proj"], lora_dropout=0.1))

    whole = trainer(tmp_path / "whole", model=adapted())
    whole.train()
    with pytest.raises(Killed):
        trainer(tmp_path / "killed", KillAt(7), model=adapted()).train()
    resumed = trainer(tmp_path / "killed", model=adapted())
    resumed.resume()
    assert facts(resumed)["weights"] == facts(whole)["weights"]
    saved = load(next((tmp_path / "killed").glob("checkpoint-*"))).state["model"]
    assert saved and all("lora" in name for name in saved)


def test_the_loss_is_a_number(uninterrupted):
    """Guards the comparisons above against passing because everything is nan."""
    assert all(math.isfinite(log["loss"]) for log in uninterrupted["history"] if "loss" in log)
    assert len(uninterrupted["history"]) == 9 + 6 + 1 and uninterrupted["step"] == 18


RANK = """
import json, sys
import test_trainer as t
folder, kill = sys.argv[1], int(sys.argv[2])
made = t.trainer(folder, *([t.KillAt(kill)] if kill else []))
t.torch.manual_seed(made.args.process_index)
try:
    facts = t.facts(made, made.resume())
    open(f"{folder}/facts-{made.args.process_index}.json", "w").write(json.dumps(facts))
except t.Killed:
    pass
"""


@pytest.mark.slow
def test_two_ranks_go_on_bit_for_bit(tmp_path):
    for folder, kill in (("whole", 0), ("killed", 4), ("killed", 0)):
        run_in_two(RANK, tmp_path, tmp_path / folder, kill, beside=__file__)
    for rank in (0, 1):
        name = f"facts-{rank}.json"
        assert (tmp_path / "killed" / name).read_text() == (tmp_path / "whole" / name).read_text()
    draws = [json.loads((tmp_path / f"whole/facts-{rank}.json").read_text())["next draw"] for rank in (0, 1)]
    assert draws[0] != draws[1]  # or rank 0's generators would do for both

"""The reward model: plain transformers' scores on padded pairs, a question and its answers in one forward."""

from __future__ import annotations

import json
import math
from dataclasses import replace

import pytest
import tiny
import torch
from pyarrow import parquet
from transformers import AutoModelForSequenceClassification, TrainerCallback

from tasks import pack
from tasks.reward import GroupedAnswers, RewardConfig, RewardTrainer, collate, pair_loss, run
from tasks.reward.stage import read_groups

NO_DROPOUT = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}


class Killed(BaseException):
    pass


class KillAt(TrainerCallback):
    def __init__(self, step):
        self.step = step

    def on_step_end(self, args, state, control, **_):
        if state.global_step == self.step:
            raise Killed


class FirstGradients(TrainerCallback):
    def on_pre_optimizer_step(self, args, state, control, model=None, **_):
        if state.global_step == 0:
            self.found = {n: p.grad.clone() for n, p in model.named_parameters()}


def groups(count: int, seed: int = 0) -> list[GroupedAnswers]:
    """Questions with two to four answers; every answer has a better or a worse one."""
    found = []
    for n in range(count):
        prompt, *answers = tiny.drawn(
            [3 + n % 7, *(1 + (5 * n + 3 * k) % 9 for k in range(2 + n % 3))], seed + n
        )
        answers = tuple((*a, tiny.EOS) if k % 2 else tuple(a) for k, a in enumerate(answers))
        pairs = tuple((i, j) for i in range(len(answers)) for j in range(i)) if n % 2 else ((0, 1),)
        found.append(GroupedAnswers(tuple(prompt), answers, pairs))
    return found


def trainer(folder, *callbacks, model=None, train=None, held=None, **arguments) -> RewardTrainer:
    defaults = {
        "max_steps": 6, "per_device_train_batch_size": 2, "gradient_accumulation_steps": 2, "seed": 5,
        "learning_rate": 1e-2, "logging_steps": 1, "save_steps": 2, "optimizer": "muon", "use_cpu": True,
        "disable_tqdm": True, "dataloader_pin_memory": False, "lr_scheduler_type": "cosine",
        "per_device_eval_batch_size": 3,
    }  # fmt: skip
    config = RewardConfig(output_dir=str(folder), **{**defaults, **arguments})
    data = {"eval_dataset": held or groups(5, 50), "callbacks": list(callbacks)}
    return RewardTrainer(model or tiny.scorer(), config, train or groups(13), **data)


def padded_scores(model, some) -> list[torch.Tensor]:
    """Each answer with its question in a row of its own, through the plain model's own pooling."""
    rows = [[*g.prompt, *r] for g in some for r in g.responses]
    width = max(map(len, rows)) + 3
    ids = torch.tensor([row + [tiny.PAD] * (width - len(row)) for row in rows])
    flat = model(input_ids=ids, attention_mask=(ids != tiny.PAD).long()).logits[:, 0]
    return list(flat.split([len(g.responses) for g in some]))


def padded_loss(model, some) -> torch.Tensor:
    scores = padded_scores(model, some)
    losses = [(1 + (s[w] - s[b]).exp()).log() for g, s in zip(some, scores, strict=True) for b, w in g.pairs]
    return torch.stack(losses).mean()


def test_pair_loss_by_hand():
    better, worse = torch.tensor([2.0, 1.0, 1.0, 0.0]), torch.tensor([2.0, 0.0, 1 + math.log(3), 300.0])
    wanted = [math.log(2), math.log(1 + math.exp(-1)), math.log(4), 300.0]
    assert pair_loss(better, worse).tolist() == pytest.approx(wanted)


def test_collate_by_hand():
    first = GroupedAnswers((5, 6), ((7, 1), (8, 9, 1)), ((1, 0),))
    second = GroupedAnswers((4,), ((3, 1), (2,), (9,)), ((0, 1), (2, 1)))
    found = collate([first, second])
    forest = found["forest"]
    assert forest.tokens.tolist() == [5, 6, 7, 1, 8, 9, 1, 4, 3, 1, 2, 9]
    assert forest.positions.tolist() == [0, 1, 2, 3, 2, 3, 4, 0, 1, 2, 1, 1]
    assert found["answers"] == [1, 2, 4, 5, 6]
    assert found["pairs"].tolist() == [[1, 0], [2, 3], [4, 3]]
    assert found["labels"].tolist() == [0, 0, 0]
    assert found["weights"].tolist() == [1, 1, 1]
    assert collate([replace(first, weights=(0.5,)), second])["weights"].tolist() == [0.5, 1, 1]


def test_a_weight_multiplies_the_loss_of_its_pair(tmp_path):
    made, some = trainer(tmp_path), groups(2)
    alone = [made.compute_loss(made.model, collate([g])).item() for g in some]
    assert len(some[0].pairs) == 1 and len(some[1].pairs) == 3
    heavy = [replace(some[0], weights=(5.0,)), replace(some[1], weights=(0.5, 0.5, 0.5))]
    assert made.compute_loss(made.model, collate(heavy)).item() == pytest.approx(
        (5 * alone[0] + 1.5 * alone[1]) / 4, rel=1e-5
    )


@pytest.mark.parametrize("kind", ["llama", "gpt2", "qwen2", "opt"])
def test_grouped_is_padded_pairs(tmp_path, kind):
    """Scores, loss and gradients; the score is read where plain transformers reads it, at the last token."""
    keys = NO_DROPOUT if kind == "gpt2" else {"dropout": 0.0} if kind == "opt" else {}
    plain, some = tiny.scorer(kind, **keys), groups(7)
    wanted = padded_loss(plain, some)
    wanted.backward()
    made = trainer(tmp_path, model=tiny.scorer(kind, **keys))
    batch = collate(some)
    assert (
        tiny.far(made.scores(made.model, batch).detach(), torch.cat(padded_scores(plain, some)).detach())
        <= 1e-5
    )
    loss = made.compute_loss(made.model, batch)
    loss.backward()
    assert tiny.far(loss.item(), wanted.item()) <= 1e-5
    assert tiny.far_gradients(tiny.gradients(made.model), tiny.gradients(plain)) <= 1e-5
    assert made.tokens_seen == sum(len(g.prompt) + sum(map(len, g.responses)) for g in some)


def test_better_and_worse_are_not_exchanged(tmp_path):
    made, some = trainer(tmp_path), groups(3)
    loss, outputs = made.compute_loss(made.model, collate(some), return_outputs=True)
    scores = padded_scores(tiny.scorer(), some)
    margins = torch.stack([s[b] - s[w] for g, s in zip(some, scores, strict=True) for b, w in g.pairs])
    assert tiny.far(outputs["margins"].detach(), margins.detach()) <= 1e-5
    assert loss.item() == pytest.approx(padded_loss(tiny.scorer(), some).item(), rel=1e-5)


@torch.no_grad()
def test_evaluate_by_definition(tmp_path):
    held = groups(8, 80)
    found = trainer(tmp_path, held=held).evaluate()
    model = tiny.scorer()
    scores = padded_scores(model, held)
    margins = torch.stack([s[b] - s[w] for g, s in zip(held, scores, strict=True) for b, w in g.pairs])
    every = torch.cat(scores)
    assert found["eval_loss"] == pytest.approx(padded_loss(model, held).item(), rel=1e-5)
    assert found["eval_accuracy"] == pytest.approx((margins > 0).float().mean().item())
    assert 0 < found["eval_accuracy"] < 1
    assert found["eval_score_mean"] == pytest.approx(every.mean().item(), rel=1e-4)
    assert found["eval_score_std"] == pytest.approx(every.std(correction=0).item(), rel=1e-4)


def test_a_tie_is_wrong(tmp_path):
    model = tiny.scorer()
    torch.nn.init.zeros_(model.score.weight)
    found = trainer(tmp_path, model=model).evaluate()
    assert found["eval_accuracy"] == 0 and found["eval_loss"] == pytest.approx(math.log(2))


def test_microbatches_make_one_batch(tmp_path):
    """Questions have one to six pairs: a mean of means would weigh their pairs unequally."""
    found = {}
    for each, times in ((8, 1), (2, 4), (1, 8)):
        callback = FirstGradients()
        made = trainer(
            tmp_path / f"{each}", callback, train=groups(8), per_device_train_batch_size=each,
            gradient_accumulation_steps=times, max_steps=2, max_grad_norm=1e9, optimizer="adamw",
        )  # fmt: skip
        made.train()
        losses = [log["loss"] for log in made.state.log_history if "loss" in log]
        found[each] = callback.found, losses
    assert found[8][1][0] == pytest.approx(padded_loss(tiny.scorer(), groups(8)).item(), rel=1e-4)
    for other in (2, 1):
        assert tiny.far_gradients(found[other][0], found[8][0]) <= 1e-5
        assert tiny.far(found[other][1], found[8][1]) <= 1e-4


@pytest.mark.parametrize("step", [3, 5])
def test_a_killed_run_goes_on_bit_for_bit(tmp_path, step):
    whole = trainer(tmp_path / "whole")
    whole.train()
    with pytest.raises(Killed):
        trainer(tmp_path / "killed", KillAt(step)).train()
    resumed = trainer(tmp_path / "killed", model=tiny.scorer(seed=9))
    resumed.resume()
    for name, weight in whole.model.state_dict().items():
        assert torch.equal(resumed.model.state_dict()[name], weight), name


@pytest.mark.parametrize("optimizer", ["muon", "adamw"])
def test_ten_steps_learn(tmp_path, optimizer):
    some = groups(8)
    made = trainer(tmp_path, train=some, held=some, max_steps=10, optimizer=optimizer)
    before = made.evaluate()["eval_loss"]
    made.train()
    assert made.evaluate()["eval_loss"] < 0.7 * before


@pytest.fixture(scope="module")
def packed(tmp_path_factory):
    """Packed data and an SFT model."""
    layout = tiny.project(tmp_path_factory.mktemp("reward"), tiny.splits())
    pack.run(tiny.params(), layout)
    tiny.save(tiny.causal(vocab_size=len(tiny.tokenizer())), layout.artifact("sft", "model"))
    return layout


def copied(packed, root):
    root.mkdir()
    layout = tiny.project(root)
    layout.artifact("pack").parent.mkdir()
    for stage in ("pack", "sft"):
        layout.artifact(stage).symlink_to(packed.artifact(stage))
    return layout


def test_groups_are_read_as_packed(packed):
    train, held = read_groups(packed)
    table = parquet.read_table(packed.artifact("pack", "groups", "reward.parquet")).to_pylist()
    assert held and len(train) + len(held) == len(table)
    assert [list(g.prompt) for g in held] == [r["prompt"] for r in table if r["is_validation"]]
    first = next(r for r in table if not r["is_validation"])
    assert [list(r) for r in train[0].responses] == [a["tokens"] for a in first["answers"]]
    assert [list(p) for p in train[0].pairs] == first["pairs"]


def test_the_stage(packed, tmp_path):
    """A folder that plain transformers loads, with the scores of scores.json; the same bytes twice."""
    layouts = [copied(packed, tmp_path / name) for name in "ab"]
    found = [run(tiny.params(reward={"epochs": 4}), layout).metrics for layout in layouts]
    assert found[0] == found[1]
    first, second = (tiny.digests(layout.artifact("reward")) for layout in layouts)
    assert first == second and {"curve.csv", "model/model.safetensors", "model/scores.json"} <= set(first)
    assert set(found[0]) == {"steps", "epoch", "loss", "accuracy", "score_mean", "score_std"}
    folder = layouts[0].artifact("reward", "model")
    config = json.loads((folder / "config.json").read_text())
    assert config["pad_token_id"] == 0 != config["eos_token_id"] and "forest" not in json.dumps(config)
    plain = AutoModelForSequenceClassification.from_pretrained(folder)
    train, held = read_groups(layouts[0])
    with torch.no_grad():
        scores = torch.cat(padded_scores(plain, held))
        assert found[0]["loss"] == pytest.approx(padded_loss(plain, held).item(), rel=1e-4)
    saved = json.loads((folder / "scores.json").read_text())
    assert saved["mean"] == pytest.approx(scores.mean().item(), rel=1e-4) == found[0]["score_mean"]
    assert saved["std"] == pytest.approx(scores.std(correction=0).item(), rel=1e-4) == found[0]["score_std"]
    lines = layouts[0].artifact("reward", "curve.csv").read_text().splitlines()
    assert lines[0] == "step,loss,accuracy" and len(lines) > 5
    assert found[0]["steps"] == math.ceil(len(train) / 8 * 4)
    assert (tmp_path / "a/reports/reward/accuracy.png").is_file()


def test_microbatch_tokens_do_not_change_the_batch(packed, tmp_path):
    found = {}
    for most in (4096, 100):
        layout = copied(packed, tmp_path / f"{most}")
        found[most] = run(tiny.params(machine={"microbatch_tokens": most}), layout).metrics
    assert found[100]["steps"] == found[4096]["steps"]
    assert found[100]["loss"] == pytest.approx(found[4096]["loss"], rel=1e-3)

"""The reward model: plain transformers' scores on padded pairs, a question and its answers in one forward."""

from __future__ import annotations

import json
import math
import shutil

import pytest
import tiny
import torch
from adapted import rounded
from made_rewards import groups, padded_loss, padded_scores, trainer
from peft import LoraConfig
from pyarrow import parquet
from trainings import FirstGradients, KillAt, Killed
from transformers import AutoModelForSequenceClassification, AutoTokenizer, TrainerCallback

from tasks import pack, ppo, reward_eval
from tasks.lm import AutoModelForCausalLMWithValueHead
from tasks.lm.adapters.files import read_adapter
from tasks.lm.heads.reward_model import RewardModel
from tasks.lm.heads.scores import score_documents
from tasks.lm.model.loading import load_causal
from tasks.reward import collate, run
from tasks.reward import stage as reward_stage
from tasks.reward.learners import Start, learners
from tasks.reward.stage import read_groups


@pytest.mark.parametrize("kind", ["llama", "gpt2", "qwen2", "opt"])
def test_grouped_is_padded_pairs(tmp_path, kind):
    """Scores, loss and gradients; the score is read where plain transformers reads it, at the last token."""
    plain, some = tiny.scorer(kind), groups(7)
    wanted = padded_loss(plain, some)
    wanted.backward()
    made = trainer(tmp_path, model=tiny.scorer(kind))
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


def test_groups_are_read_as_packed(packed):
    train, held = read_groups(packed, tiny.reward_model(None))
    table = parquet.read_table(packed.artifact("pack", "groups", "reward.parquet")).to_pylist()
    assert held and len(train) + len(held) == len(table)
    assert [list(g.prompt) for g in held] == [r["prompt"] for r in table if r["is_validation"]]
    first = next(r for r in table if not r["is_validation"])
    assert [list(r) for r in train[0].responses] == [a["tokens"] for a in first["answers"]]
    assert [list(p) for p in train[0].pairs] == first["pairs"]
    assert train[0].name == f"s.example/{first['question_id']}"
    assert list(train[0].weights) == first["weights"] == [1.0] * len(first["pairs"])
    scores = [a["score"] for a in first["answers"]]
    assert list(train[0].gaps) == [scores[b] - scores[w] for b, w in first["pairs"]]
    assert min(train[0].gaps) > 0 and len(set(train[0].gaps)) > 1


def test_the_stage(packed, tmp_path):
    """A folder that plain transformers loads, with the scores of scores.json; the same bytes twice."""
    layouts = [tiny.copied(packed, tmp_path / name) for name in "ab"]
    found = [run(tiny.params(reward={"epochs": 4}), layout).metrics for layout in layouts]
    assert found[0] == found[1]
    first, second = (tiny.digests(layout.artifact("reward")) for layout in layouts)
    assert first == second and {"curve.csv", "model/model.safetensors", "model/scores.json"} <= set(first)
    judged = {"judge_steps", "judge_loss", "judge_accuracy"}
    assert set(found[0]) == {"steps", "epoch", "loss", "accuracy", "score_mean", "score_std", *judged}
    folder = layouts[0].artifact("reward", "model")
    config = json.loads((folder / "config.json").read_text())
    assert config["pad_token_id"] == 0 != config["eos_token_id"] and "forest" not in json.dumps(config)
    plain = AutoModelForSequenceClassification.from_pretrained(folder)
    train, held = read_groups(layouts[0], tiny.reward_model(None))
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


class Steps(TrainerCallback):
    """Which of the two trains which steps."""

    def __init__(self, name, found):
        self.name, self.found = name, found

    def on_step_end(self, args, state, control, **_):
        self.found.append((self.name, state.global_step))


@pytest.mark.parametrize(("killed", "step", "left"), [("judge", 5, (0, 4)), ("reward", 3, (6, 8))])
def test_a_kill_in_either_training_goes_on_there(packed, tmp_path, monkeypatch, killed, step, left):
    """And the one that was done is not trained again, though DVC has removed its folder."""
    params = tiny.params(reward={"judge_epochs": 1}, machine={"checkpoint_steps": 2})
    whole, broken = (tiny.copied(packed, tmp_path / name) for name in "ab")
    wanted, steps = run(params, whole).metrics, []
    with monkeypatch.context() as patch:
        patch.setattr(
            reward_stage, "follow", lambda t, name: t.add_callback(KillAt(step)) if name == killed else None
        )
        with pytest.raises(Killed):
            run(params, broken)
    shutil.rmtree(broken.artifact("reward"), ignore_errors=True)
    monkeypatch.setattr(reward_stage, "follow", lambda t, name: t.add_callback(Steps(name, steps)))
    assert run(params, broken).metrics == wanted
    assert tiny.digests(broken.artifact("reward")) == tiny.digests(whole.artifact("reward"))
    trained = {name: [n for who, n in steps if who == name] for name in ("reward", "judge")}
    assert tuple(map(len, trained.values())) == left, trained
    assert trained[killed][0] == step - step % 2 + 1


def test_the_judge_is_another_model_of_other_questions(packed, tmp_path):
    """It shares no question with the reward model, nor its start; its loss is told without the rule."""
    layout = tiny.copied(packed, tmp_path / "run")
    metrics = run(tiny.params(reward={"judge_epochs": 2}), layout).metrics
    own, other = (read_groups(layout, tiny.reward_model(None), name) for name in ("reward", "judge"))
    names = [{group.name for some in each for group in some} for each in (own, other)]
    assert names[0] and names[1] and not names[0] & names[1]
    assert metrics["judge_steps"] == math.ceil(len(other[0]) / 8 * 2) != metrics["steps"]
    plain, judge = (
        AutoModelForSequenceClassification.from_pretrained(layout.artifact("reward", name))
        for name in ("model", "judge")
    )
    with torch.no_grad():
        assert metrics["judge_loss"] == pytest.approx(padded_loss(judge, other[1]).item(), rel=1e-4)
        scores = torch.cat(padded_scores(judge, other[1]))
    saved = json.loads(layout.artifact("reward", "judge", "scores.json").read_text())
    assert saved["mean"] == pytest.approx(scores.mean().item(), rel=1e-4)
    for part in ("score", "model.embed_tokens", "model.layers.0.mlp.up_proj"):
        sides = (model.get_submodule(part).weight.flatten() for model in (plain, judge))
        assert abs(torch.cosine_similarity(*sides, 0)) < 0.5, (
            f"{part}: one start would leave them side by side"
        )


def test_what_the_judge_starts_from(tmp_path):
    layout, base = tiny.project(tmp_path), {"model": {"base": "org/name", "revision": "v2"}}
    sft = layout.artifact("sft", "model")
    for given, wanted in (
        ({}, Start(sft, is_new=True)),
        ({"reward": {"base": "org/encoder"}}, Start(sft, is_new=True)),
        (base, Start("org/name", "v2", "model.base")),
        (base | {"reward": {"lora_rank": 2}}, Start(sft)),
        (
            base | {"reward": {"judge_base": "org/other", "judge_revision": "v3", "lora_rank": 2}},
            Start("org/other", "v3", "reward.judge_base"),
        ),
    ):
        assert learners(tiny.params(**given), layout)[1].start == wanted
    own, judge = learners(tiny.params(reward={"judge_style_offset": 0.5}), layout)
    assert own.start == Start(sft) and (own.style_offset, judge.style_offset) == (0.0, 0.5)


def test_a_judge_from_a_base_that_is_none_names_its_key(packed, tmp_path):
    settings = {"judge_base": str(tmp_path / "none"), "max_steps": 1}
    with pytest.raises(ValueError, match=r"^reward\.judge_base: no tokenizer in "):
        run(tiny.params(reward=settings), tiny.copied(packed, tmp_path / "run"))


def test_new_weights_are_neither_frozen_nor_asked_for_a_second_offset(packed, tmp_path, monkeypatch):
    seen = []
    monkeypatch.setattr(
        reward_stage, "RewardTrainer", lambda model, config, *_, **__: seen.append(config) or 1 / 0
    )
    for learner in learners(tiny.params(), tmp_layout := tiny.copied(packed, tmp_path / "run")):
        with pytest.raises(ZeroDivisionError):
            given = tiny.params(reward={"num_layers_unfrozen": 0, "length_offset": 1.0})
            reward_stage.learn(learner, given, tmp_layout, torch.device("cpu"))
    assert [(c.num_layers_unfrozen, c.length_offset) for c in seen] == [(0, 1.0), (None, 0.0)]


def test_no_training_question_of_the_judge_names_its_file(packed, tmp_path, monkeypatch):
    layout = tiny.project(tmp_path)
    shutil.copytree(packed.artifact("pack"), layout.artifact("pack"))
    layout.artifact("sft").symlink_to(packed.artifact("sft"))
    path = layout.artifact("pack", "groups", "judge.parquet")
    parquet.write_table(parquet.read_table(path).slice(0, 0), path)
    monkeypatch.setattr(reward_stage, "learn", lambda *_: pytest.fail("the reward model is trained first"))
    with pytest.raises(
        ValueError, match=r"pack/groups/judge\.parquet holds no training .* of data\.split\.sft"
    ):
        run(tiny.params(), layout)


def test_microbatch_tokens_do_not_change_the_batch(packed, tmp_path):
    found = {}
    for most in (4096, 100):
        layout = tiny.copied(packed, tmp_path / f"{most}")
        found[most] = run(tiny.params(machine={"microbatch_tokens": most}), layout).metrics
    assert found[100]["steps"] == found[4096]["steps"]
    assert found[100]["loss"] == pytest.approx(found[4096]["loss"], rel=1e-3)


def test_a_bad_group_is_named(packed, tmp_path):
    layout = tiny.project(tmp_path)
    layout.artifact("sft").parent.mkdir()
    layout.artifact("sft").symlink_to(packed.artifact("sft"))
    path = layout.artifact("pack", "groups", "reward.parquet")
    path.parent.mkdir(parents=True)
    shutil.copy(packed.artifact("pack", "groups", "judge.parquet"), path.with_name("judge.parquet"))
    table = parquet.read_table(packed.artifact("pack", "groups", "reward.parquet"))
    rows = table.to_pylist()
    rows[7]["weights"] = [math.nan] * len(rows[7]["pairs"])
    parquet.write_table(table.from_pylist(rows, schema=table.schema), path)
    with pytest.raises(ValueError, match=f"_dataset, s.example/{rows[7]['question_id']}: weights .* finite"):
        run(tiny.params(), layout)


def test_the_settings_reach_the_trainer(packed, tmp_path, monkeypatch):
    class Asked(BaseException):
        pass

    def asked(model, config, train, held, **keys):
        raise Asked(config, keys)

    monkeypatch.setattr(reward_stage, "RewardTrainer", asked)
    settings = {
        "weigh": "question", "margin": 0.5, "gap_weight": 1.5, "label_smoothing": 0.25,
        "center_rewards_coefficient": 0.75, "length_offset": 0.375, "learning_rate": 0.5,
        "num_layers_unfrozen": 1, "without_eos_share": 0.125,
    }  # fmt: skip
    for adapter in ({}, {"lora_rank": 3, "lora_alpha": 24}):
        with pytest.raises(Asked) as found:
            layout = tiny.copied(packed, tmp_path / f"{len(adapter)}")
            run(tiny.params(reward={**settings, **adapter}), layout)
        config, keys = found.value.args
        assert {name: getattr(config, name) for name in settings} == settings
        peft = keys["peft_config"]
        assert (peft and (peft.r, peft.lora_alpha)) == ((3, 24) if adapter else None)


def test_an_adapter_is_merged(packed, tmp_path):
    layout = tiny.copied(packed, tmp_path / "run")
    metrics = run(
        tiny.params(reward={"lora_rank": 2, "optimizer": "adamw", "learning_rate": 3e-2}), layout
    ).metrics
    plain = AutoModelForSequenceClassification.from_pretrained(layout.artifact("reward", "model"))
    _, held = read_groups(layout, tiny.reward_model(None))
    with torch.no_grad():
        assert metrics["loss"] == pytest.approx(padded_loss(plain, held).item(), rel=1e-4)
    assert not layout.artifact("reward", "model", "adapter_config.json").exists()
    kept = read_adapter(layout.artifact("reward", "model", "adapter"), "test")
    assert kept.config.base_model_name_or_path == "artifacts/sft/model"
    facts = json.loads((kept.folder / "adapter_config.json").read_text())
    assert facts["target_modules"] == sorted(facts["target_modules"]), "the same bytes in every process"
    policy = AutoModelForCausalLMWithValueHead.from_pretrained(
        layout.artifact("sft", "model"), peft_config=LoraConfig(r=2, target_modules=["q_proj"])
    )
    policy.take_reward_adapter(kept)
    documents = [(*g.prompt, *r) for g in held for r in g.responses]
    assert tiny.far(policy.score_documents(documents), score_documents(plain, documents, 8)) < 1e-4
    again = tiny.copied(packed, tmp_path / "again")
    run(tiny.params(reward={"lora_rank": 2, "optimizer": "adamw", "learning_rate": 3e-2}), again)
    found, wanted = (tiny.digests(each.artifact("reward", "model")) for each in (again, layout))
    assert found == wanted
    sft = load_causal(layout.artifact("sft", "model"))
    assert torch.equal(plain.model.embed_tokens.weight, sft.model.embed_tokens.weight), (
        "what no adapter is on"
    )
    assert not torch.equal(plain.model.layers[0].mlp.up_proj.weight, sft.model.layers[0].mlp.up_proj.weight)


def test_a_quantised_base_is_merged_in_full_precision(packed, tmp_path, monkeypatch):
    """A base that is rounded, as if by bitsandbytes; the base is then loaded again, as it is."""
    layout, seen = tiny.copied(packed, tmp_path / "run"), []
    monkeypatch.setattr(reward_stage, "quantized_keys", lambda kind: {"quantization_config": kind})

    def load(cls, *given, quantization_config=None, **keys):
        seen.append(quantization_config)
        found = loaded(*given, **keys)
        if quantization_config:
            rounded(found.model)
        return found

    loaded = RewardModel.load
    monkeypatch.setattr(RewardModel, "load", classmethod(load))
    settings = {"lora_rank": 2, "optimizer": "adamw", "learning_rate": 3e-2}
    given = tiny.params(reward=settings)
    quantised = given.model.model_copy(update={"quantize": "4bit"})
    run(given.model_copy(update={"model": quantised}), layout)
    assert seen == ["4bit", None] * 2, "the reward model, then the judge"
    plain = AutoModelForSequenceClassification.from_pretrained(layout.artifact("reward", "model"))
    kept = read_adapter(layout.artifact("reward", "model", "adapter"), "test").tensors
    name = "model.layers.0.mlp.up_proj"
    a, b = (kept[f"base_model.model.{name}.lora_{x}.weight"] for x in "AB")
    sft = load_causal(layout.artifact("sft", "model"))
    wanted = sft.get_submodule(name).weight + 16 / 2 * b @ a
    assert tiny.far(plain.get_submodule(name).weight, wanted) < 1e-6


@pytest.mark.parametrize("lora_rank", [0, 2])
def test_an_encoder_from_training_to_ppo(packed, tmp_path, lora_rank):
    """Its own tokenizer, its own texts; all that scores with it reads what it was trained on."""
    layout = tiny.copied(packed, tmp_path / "run")
    model = tiny.scorer("bert", vocab_size=104, max_position_embeddings=256)
    base = str(tiny.save(model, tmp_path / "base", tiny.encoder_tokenizer()))
    settings = {"base": base, "lora_rank": lora_rank, "learning_rate": 1e-3, "epochs": 3}
    settings["without_eos_share"] = 0.5  # which an encoder follows whatever it is: it reads no eos
    params = tiny.params(reward=settings)
    metrics = run(params, layout).metrics
    folder = layout.artifact("reward", "model")
    plain = AutoModelForSequenceClassification.from_pretrained(folder)
    own = AutoTokenizer.from_pretrained(folder)
    table = parquet.read_table(packed.artifact("pack", "groups", "reward.parquet")).to_pylist()
    right = []
    for row in (row for row in table if row["is_validation"]):
        documents = [row["prompt"] + a["tokens"] for a in row["answers"]]
        texts = tiny.tokenizer().batch_decode(documents, skip_special_tokens=True)
        assert texts[0].startswith(f"Question: {row['question']}\n\nAnswer: ")
        with torch.no_grad():
            scores = plain(**own(texts, padding=True, return_tensors="pt")).logits[:, 0]
        right += [(scores[b] > scores[w]).item() for b, w in row["pairs"]]
    assert metrics["accuracy"] == pytest.approx(sum(right) / len(right))
    reward_eval.run(params, layout)
    card = json.loads(layout.artifact("reward_eval", "card.json").read_text())
    assert 0 < card["rules"]["reward_model"]["accuracy"] <= 1
    loop, _ = ppo.stage.prepare(params, layout)
    assert not RewardModel.load(layout.artifact("reward", "model"), tiny.tokenizer()).shares_tokens
    stats = loop.update()
    assert math.isfinite(stats["ppo/mean_scores"])
    assert not (folder / "adapter").exists(), "the policy's base is not its own"


def test_pairs_that_an_encoder_cannot_tell_apart_are_left_out(packed, tmp_path, caplog):
    """Its positions end within the question, mostly."""
    model = tiny.scorer("bert", vocab_size=104, max_position_embeddings=56)
    tiny.save(model, tmp_path, tiny.encoder_tokenizer())
    found = read_groups(packed, RewardModel.load(tmp_path, tiny.tokenizer()))
    kept = sum(len(g.pairs) for some in found for g in some)
    every = sum(len(g.pairs) for some in read_groups(packed, tiny.reward_model(None)) for g in some)
    assert 0 < kept < every
    assert f"{every - kept} pairs are left out: reward.base reads the same in both answers" in caplog.text
    for group in found[0]:
        assert len(group.weights) == len(group.gaps) == len(group.pairs) > 0
        assert all(group.responses[b] != group.responses[w] for b, w in group.pairs)
        assert all(len(group.prompt) + len(r) <= 56 for r in group.responses)


def test_a_base_that_is_none_names_its_key(packed, tmp_path):
    with pytest.raises(ValueError, match=r"^reward\.base: no tokenizer in "):
        run(tiny.params(reward={"base": str(tmp_path / "none")}), tiny.copied(packed, tmp_path / "run"))


def test_a_training_that_diverges_replaces_nothing(packed, tmp_path):
    layout = tiny.copied(packed, tmp_path / "a")
    tiny.save(tiny.scorer(vocab_size=len(tiny.tokenizer())), layout.artifact("reward", "model"))
    before = tiny.digests(layout.artifact("reward"))
    diverging = {"learning_rate": 1e20, "optimizer": "adamw", "warmup_share": 0.0}
    with pytest.raises(ValueError, match=r"^step \d+: the .* is .*; is reward\.learning_rate \(1e\+20\)"):
        run(tiny.params(reward=diverging), layout)
    assert tiny.digests(layout.artifact("reward")) == before

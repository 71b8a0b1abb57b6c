"""The ppo stage: its gate, its prompts, its scores, what it leaves behind, and that a killed run goes on."""

from __future__ import annotations

import csv
import json

import pyarrow as pa
import pytest
import tiny
import torch
from adapted import rounded, saved_scorer
from pyarrow import parquet
from transformers import AutoModelForCausalLM, AutoTokenizer

from tasks import pack
from tasks.lm import AutoModelForCausalLMWithValueHead
from tasks.lm.adapters.lora import merge_checked
from tasks.lm.model.loading import load_causal
from tasks.pack.records import PROMPTS
from tasks.ppo import run, stage
from tasks.ppo.looks import HELD_OUT, OF_JUDGE
from tasks.ppo.loop import COLUMNS
from tasks.run.layout import Refusal

SCORES = {"mean": 0.5, "std": 2.0}
JUDGED = {"mean": -1.0, "std": 4.0}


@pytest.fixture(scope="module")
def upstream(tmp_path_factory):
    """What the stages before have left: prompts, two models, an open gate."""
    layout = tiny.project(tmp_path_factory.mktemp("upstream"), tiny.splits())
    pack.run(tiny.params(), layout)
    path = layout.artifact("pack", "prompts", "rl.parquet")
    rows = parquet.read_table(path).to_pylist()
    for row in rows[::3]:
        row["is_validation"] = True  # more than 2 %, so that their scores say something
    parquet.write_table(pa.Table.from_pylist(rows, schema=PROMPTS), path)
    size = len(tiny.tokenizer())
    tiny.save(tiny.causal(vocab_size=size, num_hidden_layers=1), layout.artifact("sft", "model"))
    for seed, name, scores in ((1, "model", SCORES), (2, "judge", JUDGED)):
        folder = tiny.save(tiny.scorer(seed=seed, vocab_size=size), layout.artifact("reward", name))
        (folder / "scores.json").write_text(json.dumps(scores))
    return layout


def project(upstream, root, passed=True, verdict="passed"):
    root.mkdir(exist_ok=True)
    layout = tiny.project(root)
    for name in ("pack", "sft", "reward"):
        layout.artifact(name).parent.mkdir(exist_ok=True)
        layout.artifact(name).symlink_to(upstream.artifact(name))
    layout.artifact("reward_eval").mkdir()
    layout.artifact("reward_eval", "gate.json").write_text(json.dumps({"passed": passed}))
    layout.artifact("reward_eval", "card.json").write_text(json.dumps({"verdict": verdict}))
    return layout


def params(**ppo):
    return tiny.params(ppo=ppo, machine={"device": "cpu", "threads": 1, "checkpoint_updates": 1})


def curve(layout) -> list[dict[str, str]]:
    with layout.artifact("ppo", "curve.csv").open() as file:
        return list(csv.DictReader(file))


def test_a_closed_gate_is_quoted_and_nothing_is_loaded(upstream, tmp_path, monkeypatch):
    monkeypatch.setattr(stage, "prepare", lambda *_: pytest.fail("it went on"))
    layout = project(upstream, tmp_path, passed=False, verdict="accuracy 0.610 is below 0.8")
    with pytest.raises(Refusal, match=r"did not pass its gate: accuracy 0\.610 is below 0\.8"):
        run(params(), layout)
    layout.artifact("reward_eval", "card.json").unlink()
    with pytest.raises(Refusal, match="see the report card"):
        run(params(), layout)


@pytest.fixture(scope="module")
def finished(upstream, tmp_path_factory):
    """A run that nobody disturbed: (layout, metrics)."""
    layout = project(upstream, tmp_path_factory.mktemp("finished") / "run")
    return layout, run(params(), layout).metrics


def test_the_outs_load_with_plain_transformers(finished, upstream):
    layout, _ = finished
    folder = layout.artifact("ppo", "model")
    plain, before = (
        AutoModelForCausalLM.from_pretrained(p) for p in (folder, upstream.artifact("sft", "model"))
    )
    own = AutoModelForCausalLMWithValueHead.from_pretrained(folder)
    ids = torch.tensor([[5, 6, 7]])
    assert torch.equal(plain(ids).logits, own(ids)[0]) and own.v_head.summary.weight.any()
    assert not torch.equal(plain(ids).logits, before(ids).logits)
    assert AutoTokenizer.from_pretrained(folder).get_vocab() == tiny.tokenizer().get_vocab()
    assert {path.suffix for path in folder.iterdir()} <= {".json", ".safetensors"}


def test_the_curve_and_the_metrics(finished):
    layout, metrics = finished
    rows = curve(layout)
    assert [row["step"] for row in rows] == ["1", "2", "3", "4"]
    assert list(rows[0]) == ["step", *COLUMNS, *HELD_OUT, *OF_JUDGE]
    assert [bool(row["held_out_score"]) for row in rows] == [False, True, False, True]
    assert metrics["updates"] == metrics["selected_update"] == 4
    assert metrics["first_score"] == float(rows[0]["score"]) and metrics["score"] == float(rows[-1]["score"])
    for name in ("kl_nats", "kl_coef", "entropy_nats", *HELD_OUT, *OF_JUDGE):
        assert metrics[name] == float(rows[-1][name])
    kl = [float(row["kl_nats"]) for row in rows]
    assert metrics["kl_mid_run"] == pytest.approx(sum(kl[1:3]) / 2)
    assert metrics["kl_over_target"] == pytest.approx(sum(kl[2:]) / 2 / 0.5)
    assert float(rows[0]["kl_nats"]) == pytest.approx(0, abs=1e-5) and float(rows[0]["clipfrac"]) == 0
    assert float(rows[-1]["kl_nats"]) != 0 and (layout.home / "reports/ppo/curve.png").is_file()


def test_two_runs_write_the_same_bytes(finished, upstream, tmp_path):
    layout = project(upstream, tmp_path)
    assert run(params(), layout).metrics == finished[1]
    assert tiny.digests(layout.artifact("ppo")) == tiny.digests(finished[0].artifact("ppo"))


def test_another_seed_is_another_run(finished, upstream, tmp_path):
    layout = project(upstream, tmp_path)
    run(tiny.params(seed=1), layout)
    assert tiny.digests(layout.artifact("ppo")) != tiny.digests(finished[0].artifact("ppo"))


def break_at(monkeypatch, update):
    """The tracker fails when it hears of this update."""

    def log(values, step=None):
        if step == update:
            raise KeyboardInterrupt

    monkeypatch.setattr(stage, "log_metrics", log)


@pytest.mark.parametrize("select", ["last", "best"])
@pytest.mark.parametrize("update", [1, 2, 4])
def test_a_broken_run_goes_on_bit_for_bit(upstream, tmp_path, monkeypatch, select, update):
    keys = params(select=select, eval_updates=1, kl_budget_nats=100, learning_rate=0.01)
    whole, broken = (project(upstream, tmp_path / name) for name in ("whole", "broken"))
    wanted = run(keys, whole).metrics
    with monkeypatch.context() as patch:
        break_at(patch, update)
        with pytest.raises(KeyboardInterrupt):
            run(keys, broken)
    assert not broken.artifact("ppo").exists()
    began = []
    update_of = stage.Loop.update
    monkeypatch.setattr(
        stage.Loop, "update", lambda loop: began.append(loop.trainer.updates) or update_of(loop)
    )
    assert run(keys, broken).metrics == wanted
    assert tiny.digests(broken.artifact("ppo")) == tiny.digests(whole.artifact("ppo"))
    assert began == list(range(update - 1, 4)), "the updates before the break were not done again"


def test_best_is_the_highest_held_out_score_within_the_budget(upstream, tmp_path):
    """And its weights are those of a run that ended there."""
    keys = {"select": "best", "eval_updates": 1, "learning_rate": 0.01, "updates": 6, "seed": 2}
    free = project(upstream, tmp_path / "free")
    metrics = run(params(**keys, kl_budget_nats=1000), free).metrics
    rows = curve(free)
    scores = [float(row["held_out_score"]) for row in rows]
    assert metrics["selected_update"] == 1 + scores.index(max(scores))
    budget = sorted(float(row["held_out_kl_nats"]) for row in rows)[3]
    bound = project(upstream, tmp_path / "bound")
    chosen = run(params(**keys, kl_budget_nats=budget), bound).metrics["selected_update"]
    allowed = [i for i, row in enumerate(rows) if float(row["held_out_kl_nats"]) <= budget]
    assert chosen == 1 + max(allowed, key=lambda i: scores[i]) and len(allowed) == 4
    assert chosen not in (6, metrics["selected_update"]), "the budget decides, and it is not the last"
    short = project(upstream, tmp_path / "short")
    run(params(**{**keys, "select": "last", "updates": chosen}), short)
    found, wanted = (tiny.digests(layout.artifact("ppo", "model")) for layout in (bound, short))
    assert found == wanted


def test_the_last_is_taken_when_none_is_within_the_budget(upstream, tmp_path):
    layout = project(upstream, tmp_path)
    keys = params(select="best", eval_updates=1, kl_budget_nats=1e-9, learning_rate=0.02)
    assert run(keys, layout).metrics["selected_update"] == 4


def test_held_out_prompts_are_the_validation_prompts_and_never_trained_on(upstream, tmp_path):
    loop, _ = stage.prepare(params(), project(upstream, tmp_path))
    rows = parquet.read_table(upstream.artifact("pack", "prompts", "rl.parquet")).to_pylist()
    assert loop.held == [r["prompt"] for r in rows if r["is_validation"]] != []
    assert loop.train == [r["prompt"] for r in rows if not r["is_validation"]]
    plain, _ = stage.prepare(params(normalize_scores=False), project(upstream, tmp_path / "plain"))
    rollout = loop.held[:3], [[7, 8], [9, tiny.EOS], [tiny.EOS]]
    assert tiny.far(loop.reward_fn(*rollout), (plain.reward_fn(*rollout) - 0.5) / 2) <= 1e-5
    assert not any(p.requires_grad for p in loop.trainer.ref_model.parameters())


@pytest.fixture(scope="module")
def adapted(upstream, tmp_path_factory):
    """The same upstream, whose reward model and judge are an adapter on SFT that was merged."""
    layout = tiny.project(tmp_path_factory.mktemp("adapted"))
    for name in ("pack", "sft"):
        layout.artifact(name).parent.mkdir(exist_ok=True)
        layout.artifact(name).symlink_to(upstream.artifact(name))
    folder, source = layout.artifact("reward", "model"), upstream.artifact("sft", "model").resolve()
    scorer = saved_scorer(folder / "adapter", source)
    tiny.save(merge_checked(scorer, [[5, 6, 7]]), folder)
    (folder / "scores.json").write_text(json.dumps(SCORES))
    layout.artifact("reward", "judge").symlink_to(folder)
    return layout


@pytest.mark.parametrize("way", ["merged reward model", "reward adapter"])
def test_a_policy_by_an_adapter(upstream, adapted, tmp_path, monkeypatch, way):
    """Trained, interrupted, resumed, merged: a plain folder, SFT's weights and what is of rank 2."""
    source = upstream if way == "merged reward model" else adapted
    whole, broken = (project(source, tmp_path / name) for name in ("whole", "broken"))
    keys = params(lora_rank=2, lora_alpha=4, learning_rate=0.01)
    loop, _ = stage.prepare(keys, whole)
    beside = {"default", "reward_model", "reward_judge"} if way == "reward adapter" else {"default"}
    assert set(loop.trainer.model.pretrained_model.peft_config) == beside, "one base for all of them"
    assert loop.trainer.ref_model is None and loop.trainer.ref_adapters == []
    wanted = run(keys, whole).metrics
    with monkeypatch.context() as patch:
        break_at(patch, 2)
        with pytest.raises(KeyboardInterrupt):
            run(keys, broken)
    assert run(keys, broken).metrics == wanted
    assert tiny.digests(broken.artifact("ppo")) == tiny.digests(whole.artifact("ppo"))
    folder = whole.artifact("ppo", "model")
    assert not list(folder.glob("adapter*")) and (folder / "value_head.safetensors").is_file()
    after, report = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
    before = AutoModelForCausalLM.from_pretrained(upstream.artifact("sft", "model"))
    values = torch.linalg.svdvals(
        (after.model.layers[0].mlp.up_proj.weight - before.model.layers[0].mlp.up_proj.weight).detach()
    )
    assert not any(report.values()) and values[1] > 1e-4 and values[2] < 1e-5 * values[0]
    assert torch.equal(after.lm_head.weight, before.lm_head.weight)


def test_scores_by_the_adapter_are_those_of_the_merged_model(adapted, tmp_path):
    layout = project(adapted, tmp_path)
    prompts, responses = [[5, 6, 7], [9, 4]], [[7, tiny.EOS], [8, 3, 2]]
    found, wanted = (stage.prepare(params(lora_rank=rank), layout)[0].reward_fn for rank in (2, 0))
    assert tiny.far(found(prompts, responses), wanted(prompts, responses)) < 1e-5
    raw = stage.prepare(params(lora_rank=2, normalize_scores=False), layout)[0].reward_fn
    assert tiny.far(found(prompts, responses), (raw(prompts, responses) - 0.5) / 2) < 1e-5


def test_a_policy_that_merges_wrongly_leaves_nothing(upstream, tmp_path, monkeypatch):
    layout = project(upstream, tmp_path)
    monkeypatch.setattr(stage, "merge_checked", lambda model, documents: merge_checked(model, documents, 0.0))
    with pytest.raises(ValueError, match="differs from its adapter by"):
        run(params(lora_rank=2, lora_alpha=400, learning_rate=0.1), layout)
    assert not layout.artifact("ppo", "model").exists()


def test_a_policy_on_a_quantised_base(adapted, tmp_path, monkeypatch):
    """Rounded, as if by bitsandbytes; merged into SFT's weights as they were."""
    layout, seen = project(adapted, tmp_path), []

    def load(*given, quantization_config=None, **keys):
        seen.append(quantization_config)
        found = load_causal(*given, **keys)
        return rounded(found) if quantization_config else found

    monkeypatch.setattr(
        stage, "quantized_keys", lambda kind: {"quantization_config": kind} if kind != "none" else {}
    )
    monkeypatch.setattr(stage, "load_causal", load)
    given = params(lora_rank=1, learning_rate=0.01)
    run(given.model_copy(update={"model": given.model.model_copy(update={"quantize": "8bit"})}), layout)
    assert seen == ["8bit", None]
    after, before = (load_causal(layout.artifact(name, "model")) for name in ("ppo", "sft"))
    change = (after.model.layers[0].mlp.up_proj.weight - before.model.layers[0].mlp.up_proj.weight).detach()
    values = torch.linalg.svdvals(change)
    assert values[0] > 1e-3 and values[1] < 1e-5 * values[0]


def test_no_training_prompt_is_named(upstream, tmp_path):
    layout = project(upstream, tmp_path)
    layout.artifact("pack").unlink()
    table = parquet.read_table(upstream.artifact("pack", "prompts", "rl.parquet"))
    layout.artifact("pack", "prompts").mkdir(parents=True)
    parquet.write_table(table.slice(0, 0), layout.artifact("pack", "prompts", "rl.parquet"))
    with pytest.raises(ValueError, match=r"rl\.parquet holds no training prompt"):
        run(params(), layout)

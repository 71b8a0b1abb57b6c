"""SFTTrainer: models by name, adapters, few layers, gradient checkpointing; TRL's loss on the same rows."""

from __future__ import annotations

import json
import os
import subprocess
import textwrap
from pathlib import Path

import pytest
import tiny
import torch
from adapted import rounded
from peft import LoraConfig
from test_documents import ASKED, SAID, chatty
from test_sft import copied
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

from tasks import pack
from tasks.lm.model.loading import load_causal
from tasks.sft import PackedRow, SFTConfig, SFTTrainer, run
from tasks.sft import stage as sft_stage

PEER = os.environ.get("STACKRL_PEER_PYTHON")
SCRIPT = Path(__file__).parents[1] / "benchmarks" / "peer_trl.py"
ROWS = [{"prompt": f"What is {n} + 1?", "completion": f" It is {n + 1}."} for n in range(8)]


def trainer(
    folder, model, train=ROWS, tokenizer=None, peft_config=None, held=None, **arguments
) -> SFTTrainer:
    keys = {
        "max_steps": 3, "per_device_train_batch_size": 2, "learning_rate": 1e-2, "use_cpu": True, "seed": 5,
        "disable_tqdm": True, "dataloader_pin_memory": False, "save_steps": 1, "row_tokens": 48,
    }  # fmt: skip
    config = SFTConfig(str(folder), **{**keys, **arguments})
    return SFTTrainer(model, config, train, held, tokenizer or tiny.tokenizer(), peft_config)


def wide(**keys):
    return tiny.causal(vocab_size=330, **keys)


def loss_and_gradients(made: SFTTrainer):
    (part,) = made.data_collator(made.train_dataset)["parts"]
    made.model.train()
    loss = made.compute_loss(made.model, part)
    loss.backward()
    return loss.item(), tiny.gradients(made.model)


def test_the_five_lines_of_the_docstring(tmp_path, monkeypatch):
    """As they stand there, but for the model's path; the folder loads with plain transformers."""
    tiny.save(wide(), tmp_path / "path/to/model")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    lines = SFTTrainer.__doc__.split("one's own:\n\n")[1].split("\n\n")[0]
    assert len(lines.splitlines()) == 5
    exec(textwrap.dedent(lines), {})
    before = AutoModelForCausalLM.from_pretrained("path/to/model").state_dict()
    after = AutoModelForCausalLM.from_pretrained("tuned").state_dict()
    assert before.keys() == after.keys() and not torch.equal(
        before["lm_head.weight"], after["lm_head.weight"]
    )
    assert PreTrainedTokenizerFast.from_pretrained("tuned").eos_token_id == tiny.EOS


def test_held_out_rows_are_read_too(tmp_path):
    made = trainer(tmp_path, wide(), held=[{"text": "It is 3."}, {"text": "What?"}])
    assert made.evaluate()["eval_perplexity"] > 1
    held = [{"text": "It is 3."}, {"text": ""}]
    with pytest.raises(ValueError, match=r"eval_dataset, row 1: text: text is wanted"):
        trainer(tmp_path, wide(), held=held)
    assert len(trainer(tmp_path, wide(), held=held, invalid_rows="drop").eval_dataset) == 1


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_an_adapter_learns_and_merges(tmp_path, kind):
    adapter = LoraConfig(r=4, lora_alpha=8, target_modules="all-linear")
    made = trainer(tmp_path, wide(kind=kind), peft_config=adapter, held=ROWS)
    base = {n: p.clone() for n, p in made.model.named_parameters() if not p.requires_grad}
    before = made.evaluate()["eval_loss"]
    made.train()
    after = made.evaluate()["eval_loss"]
    assert after < before
    assert all(torch.equal(p, base[n]) for n, p in made.model.named_parameters() if n in base)
    made.save_model(str(tmp_path / "adapter"))
    assert (tmp_path / "adapter/adapter_model.safetensors").is_file()
    merged = made.merged()
    assert not hasattr(merged, "peft_config")
    assert trainer(tmp_path, merged, held=ROWS).evaluate()["eval_loss"] == pytest.approx(after, rel=1e-5)


def test_an_adapter_goes_on_after_a_kill(tmp_path):
    adapter = LoraConfig(r=4, target_modules="all-linear")
    whole = trainer(tmp_path / "whole", wide(), peft_config=adapter)
    whole.train()
    halves = trainer(tmp_path / "halves", wide(), peft_config=adapter, max_steps=3)
    halves.train()
    for folder in sorted((tmp_path / "halves").glob("checkpoint-3*")):
        folder.rename(folder.with_name("gone"))
    again = trainer(tmp_path / "halves", wide(), peft_config=adapter)
    again.resume()
    assert again.state.global_step == 3
    for name, weight in whole.model.state_dict().items():
        assert torch.equal(weight, again.model.state_dict()[name]), name


@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("adapted", [True, False])
def test_gradient_checkpointing_changes_nothing(tmp_path, reentrant, adapted):
    adapter = LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False) if adapted else None
    found = []
    for keys in (
        {},
        {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": reentrant}},
    ):
        torch.manual_seed(3)
        made = trainer(tmp_path, wide(), peft_config=adapter, **keys)
        if keys:
            made.model.gradient_checkpointing_enable(keys["gradient_checkpointing_kwargs"])
            made.model.enable_input_require_grads()
        found.append(loss_and_gradients(made))
    assert tiny.far(found[1][0], found[0][0]) <= 1e-5
    assert tiny.far_gradients(found[1][1], found[0][1]) <= 1e-5


@pytest.mark.parametrize("reentrant", [True, False])
def test_trainers_own_switch_for_checkpointing(tmp_path, reentrant):
    losses = []
    for on in (False, True):
        keys = {"gradient_checkpointing_kwargs": {"use_reentrant": reentrant}} if on else {}
        made = trainer(tmp_path / str(on), wide(), gradient_checkpointing=on, logging_steps=1, **keys)
        made.train()
        losses.append([log["loss"] for log in made.state.log_history if "loss" in log])
    assert losses[1] == pytest.approx(losses[0], rel=1e-4)


@pytest.mark.parametrize("k", [0, 1])
def test_few_layers_are_trained(tmp_path, k):
    made = trainer(tmp_path, wide(), num_layers_unfrozen=k)
    before = {n: p.clone() for n, p in made.model.named_parameters()}
    made.train()
    moved = {n for n, p in made.model.named_parameters() if not torch.equal(p, before[n])}
    assert "lm_head.weight" in moved and "model.embed_tokens.weight" not in moved
    assert not any("layers.0." in n for n in moved) and any("layers.1." in n for n in moved) == (k == 1)
    with pytest.raises(ValueError, match="num_layers_unfrozen is 3; the model has 2 blocks"):
        trainer(tmp_path, wide(), num_layers_unfrozen=3)


def test_the_settings_of_rows_reach_them(tmp_path):
    rows = [{"messages": ASKED + SAID}] * 3
    made = trainer(tmp_path, wide(), rows, chatty(), row_tokens=80, assistant_only=True)
    whole = len(chatty().apply_chat_template(ASKED + SAID)["input_ids"])
    assert 80 / 3 < whole <= 40, "two documents fill a row"
    assert [row.lengths for row in made.train_dataset] == [(whole, whole), (whole,)]
    (part,) = made.data_collator(made.train_dataset[1:])["parts"]
    assert tiny.tokenizer().decode(part["labels"]) == "It is 3.<|eos|>"
    cut = trainer(tmp_path, wide(), rows, chatty(), row_tokens=80, max_length=whole - 2)
    assert cut.train_dataset[0].lengths[0] == whole - 2


def test_half_precision_weights_are_warned_of(tmp_path, caplog):
    trainer(tmp_path, wide())
    assert not caplog.records
    made = trainer(tmp_path, wide().bfloat16(), max_steps=1)
    assert "LlamaForCausalLM trains weights in torch.bfloat16, which round small updates" in caplog.text
    made.train()
    caplog.clear()
    trainer(tmp_path, wide().bfloat16(), peft_config=LoraConfig(r=4, target_modules="all-linear"))
    assert not caplog.records


def test_bad_settings_and_models(tmp_path):
    with pytest.raises(ValueError, match="loss_on is all or response, not 'prompt'"):
        SFTConfig(str(tmp_path), loss_on="prompt")
    for key, value, said in (
        ("invalid_rows", "skip", "invalid_rows is refuse or drop, not 'skip'"),
        ("row_tokens", 1, "row_tokens is at least 2, not 1"),
        ("max_length", 0, "max_length is at least 2, not 0"),
        ("label_smoothing_factor", 0.1, "label_smoothing_factor: the loss is the trainer's own"),
    ):
        with pytest.raises(ValueError, match=said):
            SFTConfig(str(tmp_path), **{key: value})
    with pytest.raises(ValueError, match="LlamaForSequenceClassification is no causal language model"):
        trainer(tmp_path, tiny.scorer(vocab_size=330))
    several = SFTConfig(str(tmp_path), use_cpu=True)
    several._n_gpu = 2
    with pytest.raises(ValueError, match=r"2 GPUs in one process: start one process for each"):
        SFTTrainer(wide(), several, ROWS, processing_class=tiny.tokenizer())
    with pytest.raises(ValueError, match=r"train_dataset, row 0: 65 tokens, the model has room for 64"):
        trainer(tmp_path, wide(), train=[PackedRow(tuple([5] * 65), (65,), (0,))])


@pytest.fixture(scope="module")
def packed(tmp_path_factory):
    layout = tiny.project(tmp_path_factory.mktemp("models"), tiny.splits())
    pack.run(tiny.params(), layout)
    return layout


@pytest.mark.parametrize("sft", [{"lora_rank": 4}, {"num_layers_unfrozen": 1}])
def test_the_stage_saves_a_plain_folder(packed, tmp_path, sft):
    layout = copied(packed, tmp_path)
    run(tiny.params(sft={"epochs": 1, "batch_rows": 4, **sft}), layout)
    folder = layout.artifact("sft", "model")
    assert not list(folder.glob("adapter*"))
    model, report = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
    assert not any(report.values()) and all(p.isfinite().all() for p in model.parameters())


def test_a_quantised_base_is_merged_in_full_precision(packed, tmp_path, monkeypatch):
    """A base that is rounded, as if by bitsandbytes; the merged model stands on the base as it was."""
    base, seen = tiny.save(tiny.causal(vocab_size=330), tmp_path / "base"), []
    layout = copied(packed, tmp_path / "run")

    def load(*given, quantization_config=None, **keys):
        seen.append(quantization_config)
        found = load_causal(*given, **keys)
        return rounded(found) if quantization_config else found

    monkeypatch.setattr(sft_stage, "quantized_keys", lambda kind: {"quantization_config": kind})
    monkeypatch.setattr(sft_stage, "load_causal", load)
    given = tiny.params(
        model={"base": str(base), "quantize": "8bit"},
        sft={"lora_rank": 1, "optimizer": "adamw", "learning_rate": 1e-2},
        reward={"lora_rank": 1}, ppo={"lora_rank": 1},
    )  # fmt: skip
    run(given, layout)
    assert seen == ["8bit", None]
    before, after = (load_causal(path) for path in (base, layout.artifact("sft", "model")))
    change = [m.model.layers[1].mlp.up_proj.weight.detach() for m in (after, before)]
    values = torch.linalg.svdvals(change[0] - change[1])
    assert values[0] > 1e-3 and values[1] < 1e-5 * values[0], "the adapter, of rank 1, and no rounding"


SHAPES = {
    "text": ([{"text": f"{n} is less than {n + 1}." * (1 + n % 3)} for n in range(6)], "all", {}),
    "prompt": (ROWS, "response", {}),
    "prompt, all": (ROWS, "all", {"completion_only_loss": False}),
    "messages": ([{"messages": ASKED + SAID}, {"messages": ASKED * 2 + SAID}], "all", {}),
    "conversation": ([{"prompt": ASKED, "completion": SAID}] * 2, "response", {}),
    "assistant": ([{"messages": ASKED + SAID + ASKED + SAID}], "all", {"assistant_only_loss": True}),
    "ids": ([{"input_ids": ids} for ids in tiny.drawn((9, 4, 17))], "all", {}),
    "labels": ([{"input_ids": ids, "labels": [-100, *ids[1:3], -100, *ids[4:]]}
                for ids in tiny.drawn((9, 5))], "all", {}),
    "mask": ([{"input_ids": ids, "completion_mask": [0] * 3 + [1] * (len(ids) - 3)}
              for ids in tiny.drawn((9, 5))], "response", {"completion_only_loss": True}),
}  # fmt: skip


@pytest.mark.slow
@pytest.mark.skipif(PEER is None, reason="STACKRL_PEER_PYTHON names no python with trl")
@pytest.mark.parametrize("shape", SHAPES)
def test_the_loss_is_that_of_trl(tmp_path, shape):
    rows, loss_on, options = SHAPES[shape]
    model = wide()
    model.save_pretrained(tmp_path / "sft")
    chatty().save_pretrained(tmp_path / "tokenizer")
    (tmp_path / "sft.json").write_text(json.dumps(rows))
    settings = {
        "per_device_train_batch_size": len(rows),
        "max_steps": 2,
        "gradient_checkpointing": False,
        **options,
    }
    command = [PEER, str(SCRIPT), "sft", str(tmp_path), json.dumps(settings)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]
    wanted = json.loads(done.stdout.splitlines()[-1])["loss"]
    made = trainer(tmp_path, model, rows, chatty(), loss_on=loss_on, assistant_only=shape == "assistant")
    assert loss_and_gradients(made)[0] == pytest.approx(wanted, rel=1e-5)

"""SFT: transformers' own loss on every document, whatever the batch is cut into."""

from __future__ import annotations

import json
import math

import pytest
import tiny
import torch
from pyarrow import parquet
from trainings import FirstGradients, KillAt, Killed
from transformers import AutoModelForCausalLM

from tasks import pack
from tasks.lm.attention.forest import enable_forest
from tasks.lm.logprobs import chunked
from tasks.sft import PackedRow, SFTConfig, SFTTrainer, collate, read_rows, run

ROW = PackedRow((5, 6, 1, 7, 8, 9, 1), (3, 4), (2, 1))


def rows(count: int, seed: int = 0) -> list[PackedRow]:
    """Rows of one to three documents of uneven lengths, some of a single token."""
    draw, found = torch.Generator().manual_seed(seed), []
    for n in range(count):
        lengths = torch.randint(1, 12, (1 + n % 3,), generator=draw).tolist()
        documents = tiny.drawn(lengths, seed + 100 + n)
        prompts = tuple(max(0, k // 2 - 1) for k in lengths)
        found.append(PackedRow(tuple(t for d in documents for t in d), tuple(lengths), prompts))
    return found


def trainer(folder, *callbacks, model=None, train=None, held=None, **arguments) -> SFTTrainer:
    defaults = {
        "max_steps": 6, "per_device_train_batch_size": 2, "gradient_accumulation_steps": 2, "seed": 5,
        "learning_rate": 1e-2, "logging_steps": 1, "save_steps": 2, "optimizer": "muon", "use_cpu": True,
        "disable_tqdm": True, "dataloader_pin_memory": False, "lr_scheduler_type": "cosine",
    }  # fmt: skip
    config = SFTConfig(output_dir=str(folder), **{**defaults, **arguments})
    model = model or tiny.causal()
    return SFTTrainer(
        model, config, train or rows(23), eval_dataset=held or rows(4, 9), callbacks=list(callbacks)
    )


def test_documents_by_hand():
    assert ROW.documents() == [(5, 6, 1), (7, 8, 9, 1)]


@pytest.mark.parametrize(
    ("loss_on", "predicts", "labels"),
    [
        ("all", [0, 1, 3, 4, 5, 7, 8], [6, 1, 8, 9, 1, 3, 1]),
        ("response", [1, 3, 4, 5, 7, 8], [1, 8, 9, 1, 3, 1]),
    ],
)
def test_collate_by_hand(loss_on, predicts, labels):
    """No token predicts the first one of the next document; `all` alone learns a prompt's tokens."""
    second = PackedRow((2, 3, 1), (3,), (0,))
    found = collate([ROW, second], loss_on)
    assert found["forest"].tokens.tolist() == [5, 6, 1, 7, 8, 9, 1, 2, 3, 1]
    assert found["forest"].positions.tolist() == [0, 1, 2, 0, 1, 2, 3, 0, 1, 2]
    assert found["predicts"].tolist() == predicts and found["labels"].tolist() == labels


def test_a_document_of_one_token_teaches_nothing():
    found = collate([PackedRow((5, 6, 1), (1, 2), (0, 1))])
    assert found["predicts"].tolist() == [1] and found["labels"].tolist() == [1]


@pytest.mark.parametrize(
    ("loss_on", "predicts", "labels"),
    [
        ("all", [0, 1, 2, 0, 1, 4, 6, 7], [6, 8, 1, 6, 9, 1, 2, 1]),
        ("response", [1, 2, 1, 4, 6, 7], [8, 1, 9, 1, 2, 1]),
    ],
)
def test_neighbours_share_a_prompt_by_hand(loss_on, predicts, labels):
    """`5 6` once, `8 1` and `9 1` after it; the third document has a prompt of its own."""
    row = PackedRow((5, 6, 8, 1, 5, 6, 9, 1, 7, 2, 1), (4, 4, 3), (2, 2, 1))
    found = collate([row], loss_on)
    assert found["forest"].tokens.tolist() == [5, 6, 8, 1, 9, 1, 7, 2, 1]
    assert found["forest"].positions.tolist() == [0, 1, 2, 3, 2, 3, 0, 1, 2]
    assert found["predicts"].tolist() == predicts and found["labels"].tolist() == labels


@pytest.mark.parametrize("prompts", [(0, 0), (4, 4), (2, 3)])
def test_nothing_is_shared_without_a_prompt_and_a_response(prompts):
    """Pieces without a prompt, prompts without a response, prompts of different lengths: whole documents."""
    found = collate([PackedRow((5, 6, 8, 1, 5, 6, 8, 1), (4, 4), prompts)])
    assert found["forest"].lengths == (4, 4) and len(found["labels"]) == 6


def held_to_separate_documents(folder, kind, loss_on, some) -> SFTTrainer:
    """A trainer whose loss and gradients on these rows are transformers' own on each document by itself."""
    keys = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0} if kind == "gpt2" else {}
    plain = tiny.causal(kind, **keys)
    total, count, _ = separate(plain, some, loss_on)
    (total / count).backward()
    made = trainer(folder, model=tiny.causal(kind, **keys), loss_on=loss_on)
    loss = made.compute_loss(made.model, collate(some, loss_on))
    loss.backward()
    assert tiny.far(loss.item(), (total / count).item()) <= 1e-5
    assert tiny.far_gradients(tiny.gradients(made.model), tiny.gradients(plain)) <= 1e-5
    return made


@pytest.mark.parametrize("loss_on", ["all", "response"])
@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_a_shared_prompt_changes_neither_loss_nor_gradient(tmp_path, kind, loss_on):
    some = []
    for prompt in tiny.drawn((6, 1, 11)):
        texts = [[*prompt, *tail] for tail in tiny.drawn((1, 5, 9, 2), len(prompt))]
        lengths = tuple(map(len, texts))
        some.append(PackedRow(tuple(t for text in texts for t in text), lengths, (len(prompt),) * 4))
    made = held_to_separate_documents(tmp_path, kind, loss_on, some)
    assert made.tokens_seen == sum(len(row.tokens) - 3 * row.prompts[0] for row in some)


def test_the_whole_logits_are_never_made(tmp_path, monkeypatch):
    """Neither in a training step nor in evaluation: 70 tokens, 400 in the vocabulary, 4 places at a time."""
    for name, value in (("LEAST_PLACES", 4), ("CHUNK_LOGITS", {}), ("KEPT_LOGITS", {})):
        monkeypatch.setattr(chunked, name, value)
    some, sizes = rows(6), []
    assert sum(len(row.tokens) for row in some) > 50
    made = trainer(
        tmp_path, model=tiny.causal(vocab_size=400), train=some, held=some, max_steps=1,
        per_device_train_batch_size=6, per_device_eval_batch_size=6, save_strategy="no",
    )  # fmt: skip
    for work in (made.train, made.evaluate):
        with tiny.Largest() as seen:
            work()
        sizes.append(seen.elements)
    assert max(sizes) <= 400 * 16  # the embeddings
    assert min(sizes) >= 4 * 400


def separate(model, rows, loss_on):
    """Sum of transformers' own losses of each document by itself, the number of tokens, the right ones."""
    total, count, right = 0.0, 0, 0
    for row in rows:
        for document, prompt in zip(row.documents(), row.prompts, strict=True):
            labels = torch.tensor([document])
            labels[0, : max(1, prompt) if loss_on == "response" else 1] = -100
            learnt = int((labels != -100).sum())
            if learnt:
                out = model(input_ids=torch.tensor([document]), labels=labels)
                total, count = total + out.loss * learnt, count + learnt
                guess, wanted = out.logits[0, :-1].argmax(-1), labels[0, 1:]
                right += int(((guess == wanted) & (wanted != -100)).sum())
    return total, count, right


@pytest.mark.parametrize("loss_on", ["all", "response"])
@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_the_loss_is_transformers_own(tmp_path, kind, loss_on):
    some = rows(5)
    made = held_to_separate_documents(tmp_path, kind, loss_on, some)
    assert made.tokens_seen == sum(len(row.tokens) for row in some)


@torch.no_grad()
def test_perplexity_and_accuracy_of_held_out_documents(tmp_path):
    plain, some = tiny.causal(), rows(7)
    total, count, right = separate(plain, some, "all")
    found = trainer(tmp_path, held=some, per_device_eval_batch_size=2).evaluate()
    assert found["eval_loss"] == pytest.approx(total.item() / count, rel=1e-5)
    assert found["eval_perplexity"] == pytest.approx(math.exp(total.item() / count), rel=1e-4)
    assert found["eval_token_accuracy"] == right / count


@torch.no_grad()
def test_bfloat16_is_near_float32(tmp_path):
    half = trainer(tmp_path, bf16=True).evaluate()["eval_loss"]
    whole = trainer(tmp_path).evaluate()["eval_loss"]
    assert half == pytest.approx(whole, rel=0.05) and half != whole


def test_microbatches_make_one_batch(tmp_path):
    """1 × 8 = 2 × 4 = 8 × 1, though rows and microbatches hold uneven numbers of tokens."""
    found = {}
    for rows_each, times in ((8, 1), (2, 4), (1, 8)):
        callback = FirstGradients()
        made = trainer(
            tmp_path / f"{rows_each}", callback, train=rows(8), per_device_train_batch_size=rows_each,
            gradient_accumulation_steps=times, max_steps=2, max_grad_norm=1e9, optimizer="adamw",
        )  # fmt: skip
        made.train()
        losses = [log["loss"] for log in made.state.log_history if "loss" in log]
        found[rows_each] = callback.found, losses, made.model.state_dict()
    for other in (2, 1):
        assert tiny.far_gradients(found[other][0], found[8][0]) <= 1e-5
        assert tiny.far(found[other][1], found[8][1]) <= 1e-5
        for name, weight in found[8][2].items():
            assert tiny.far(found[other][2][name], weight) <= 1e-4


def facts(made):
    return {n: v.tolist() for n, v in made.model.state_dict().items()}, [
        {k: v for k, v in log.items() if "runtime" not in k and "per_second" not in k}
        for log in made.state.log_history
    ]


@pytest.mark.parametrize("optimizer", ["muon", "adamw"])
@pytest.mark.parametrize("step", [1, 3, 5])
def test_a_killed_run_goes_on_bit_for_bit(tmp_path, optimizer, step):
    whole = trainer(tmp_path / "whole", optimizer=optimizer)
    whole.train()
    with pytest.raises(Killed):
        trainer(tmp_path / "killed", KillAt(step), optimizer=optimizer).train()
    resumed = trainer(tmp_path / "killed", model=tiny.causal(seed=9), optimizer=optimizer)
    if step == 1:
        assert resumed.latest_checkpoint() is None
        resumed = trainer(tmp_path / "killed", optimizer=optimizer)
    resumed.train(resume_from_checkpoint=resumed.latest_checkpoint())
    assert facts(resumed) == facts(whole)


@pytest.mark.parametrize(("optimizer", "rate"), [("muon", 2e-2), ("adamw", 2e-2)])
def test_ten_steps_learn(tmp_path, optimizer, rate):
    model, some = tiny.causal(), rows(8)
    made = trainer(
        tmp_path, model=model, train=some, held=some, max_steps=10, optimizer=optimizer, learning_rate=rate
    )
    before = made.evaluate()["eval_loss"]
    made.train()
    assert made.evaluate()["eval_loss"] < 0.8 * before


def test_a_plain_model_is_left_behind(tmp_path):
    """The saved folder knows nothing of the forest."""
    model = tiny.causal()
    enable_forest(model)
    tiny.save(model, tmp_path)
    assert "forest" not in (tmp_path / "config.json").read_text()
    assert AutoModelForCausalLM.from_pretrained(tmp_path).config._attn_implementation == "sdpa"


@pytest.fixture(scope="module")
def packed(tmp_path_factory):
    layout = tiny.project(tmp_path_factory.mktemp("sft"), tiny.splits())
    pack.run(tiny.params(), layout)
    return layout


def copied(packed, root):
    """A new project with the same packed rows."""
    root.mkdir(exist_ok=True)
    layout = tiny.project(root)
    layout.artifact("pack").parent.mkdir()
    layout.artifact("pack").symlink_to(packed.artifact("pack"))
    return layout


def test_rows_are_read_as_packed(packed):
    train, held = read_rows(packed)
    table = parquet.read_table(packed.artifact("pack", "rows", "sft.parquet")).to_pylist()
    assert held and len(train) + len(held) == len(table)
    assert [list(r.tokens) for r in held] == [r["tokens"] for r in table if r["is_validation"]]
    for row in train:
        assert sum(row.lengths) == len(row.tokens)
        assert all(0 < p < n for p, n in zip(row.prompts, row.lengths, strict=True))


def test_the_stage(packed, tmp_path):
    """Outs that plain transformers loads, metrics without time, the same bytes twice."""
    layouts = [copied(packed, tmp_path / name) for name in "ab"]
    found = [run(tiny.params(), layout).metrics for layout in layouts]
    assert found[0] == found[1]
    first, second = (tiny.digests(layout.artifact("sft")) for layout in layouts)
    assert first == second and {"curve.csv", "model/model.safetensors", "model/tokenizer.json"} <= set(first)
    assert set(found[0]) == {"steps", "parameters", "epoch", "loss", "perplexity", "token_accuracy"}
    folder = layouts[0].artifact("sft", "model")
    model = AutoModelForCausalLM.from_pretrained(folder)
    train, held = read_rows(layouts[0])
    with torch.no_grad():
        total, count, _ = separate(model, held, "response")
    assert found[0]["loss"] == pytest.approx(total.item() / count, rel=1e-5)
    assert found[0]["steps"] == math.ceil(len(train) / 4) and (tmp_path / "a/reports/sft/loss.png").is_file()
    lines = layouts[0].artifact("sft", "curve.csv").read_text().splitlines()
    assert lines[0] == "step,loss,learning_rate,grad_norm" and len(lines) == found[0]["steps"] + 1
    config = json.loads((folder / "config.json").read_text())
    assert (config["pad_token_id"], config["eos_token_id"]) == (0, 1)


def test_microbatch_tokens_do_not_change_the_batch(packed, tmp_path):
    found = {}
    for most in (4096, 100):
        layout = copied(packed, tmp_path / f"{most}")
        found[most] = run(tiny.params(machine={"microbatch_tokens": most}), layout).metrics
    assert found[100]["steps"] == found[4096]["steps"]
    assert found[100]["loss"] == pytest.approx(found[4096]["loss"], rel=1e-4)


def test_a_base_model_is_where_it_starts(packed, tmp_path):
    base = tiny.save(tiny.causal(vocab_size=len(tiny.tokenizer()), num_hidden_layers=1), tmp_path / "base")
    layout = copied(packed, tmp_path)
    quiet = {"learning_rate": 1e-12, "weight_decay": 0.0}
    run(tiny.params(model={"base": str(base)}, sft=quiet), layout)
    plain = AutoModelForCausalLM.from_pretrained(base)
    ids = torch.tensor([[5, 6, 7]])
    tuned = AutoModelForCausalLM.from_pretrained(layout.artifact("sft", "model"))
    assert tiny.far(tuned(ids).logits, plain(ids).logits) < 1e-4


def test_a_base_model_without_weights_is_named(packed, tmp_path):
    base = tiny.save(tiny.causal(), tmp_path / "base")
    (base / "model.safetensors").unlink()
    with pytest.raises(ValueError, match=r"^model\.base: the folder .* holds no \*\.safetensors weights"):
        run(tiny.params(model={"base": str(base)}), copied(packed, tmp_path))
    assert not (tmp_path / "artifacts" / "sft").exists()


def test_a_training_that_diverges_replaces_nothing(packed, tmp_path):
    layout = copied(packed, tmp_path)
    earlier = tiny.causal(vocab_size=len(tiny.tokenizer()))
    tiny.save(earlier, layout.artifact("sft", "model"))
    before = tiny.digests(layout.artifact("sft"))
    diverging = {"learning_rate": 1e20, "optimizer": "adamw", "warmup_share": 0.0}
    with pytest.raises(ValueError, match=r"^step \d+: the .* is .*; is sft\.learning_rate \(1e\+20\) too"):
        run(tiny.params(sft=diverging), layout)
    assert tiny.digests(layout.artifact("sft")) == before

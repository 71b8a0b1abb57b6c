"""What RewardTrainer trains: adapters, encoders, models with dropout; and what it refuses."""

from __future__ import annotations

import math

import pytest
import tiny
import torch
from made_rewards import groups, padded_loss, padded_scores, trainer
from peft import LoraConfig, PeftModel
from trainings import FirstGradients, KillAt, Killed
from transformers import (
    AutoModel,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    EarlyStoppingCallback,
    PreTrainedTokenizerFast,
)

from tasks.lm.model.loading import train_tokenizer
from tasks.reward import GroupedAnswers

LORA = {"r": 2, "lora_alpha": 8, "target_modules": "all-linear"}
WORDS = [
    {"prompt": "abc", "chosen": "de", "rejected": "fgh"},
    {"prompt": "x", "chosen": "yz", "rejected": "y"},
]


def lora(folder, *callbacks, **keys):
    config = LoraConfig(**LORA, lora_dropout=0.2)
    return trainer(folder, *callbacks, peft=config, **{"optimizer": "adamw", "learning_rate": 3e-2, **keys})


def scores(model, data) -> torch.Tensor:
    with torch.no_grad():
        return torch.cat(padded_scores(model.eval(), data))


# ---- adapters


def test_an_adapter_and_the_head_train_and_a_merge_keeps_both(tmp_path):
    model, data = tiny.scorer(), groups(6, 70)
    before = {n: w.clone() for n, w in model.state_dict().items()}
    made = lora(tmp_path / "run", model=model)
    made.train()
    trained = {n for n, p in made.model.named_parameters() if p.requires_grad}
    assert trained and all("lora_" in n or "score" in n for n in trained)
    wanted = scores(made.model, data)
    assert tiny.far(wanted, scores(tiny.scorer(), data)) > 0.1
    made.save_model(str(tmp_path / "adapter"))
    merged = made.merged()
    assert tiny.far(scores(merged, data), wanted) <= 1e-5
    assert not torch.equal(merged.score.weight, before["score.weight"]), "the head has learnt"
    assert torch.equal(merged.model.embed_tokens.weight, before["model.embed_tokens.weight"])
    merged.save_pretrained(tmp_path / "plain")
    plain = AutoModelForSequenceClassification.from_pretrained(tmp_path / "plain")
    assert tiny.far(scores(plain, data), wanted) <= 1e-5
    again = PeftModel.from_pretrained(tiny.scorer(), tmp_path / "adapter")
    assert tiny.far(scores(again, data), wanted) <= 1e-5


def test_a_killed_adapter_goes_on_bit_for_bit(tmp_path):
    """In a process whose fresh head is another one."""
    whole = lora(tmp_path / "whole")
    whole.train()
    with pytest.raises(Killed):
        lora(tmp_path / "killed", KillAt(3)).train()
    base = tiny.scorer()
    torch.nn.init.normal_(base.score.weight)
    resumed = lora(tmp_path / "killed", model=base)
    resumed.resume()
    weights = dict(resumed.model.named_parameters())
    for name, weight in whole.model.named_parameters():
        assert torch.equal(weights[name], weight) or not weight.requires_grad, name


def test_a_merge_is_checked(tmp_path, monkeypatch):
    made = lora(tmp_path, max_steps=2)
    made.train()
    monkeypatch.setattr(type(made.model.base_model), "merge_and_unload", lambda *a, **k: tiny.scorer())
    with pytest.raises(ValueError, match="differs from its adapter by"):
        made.merged()


# ---- frozen layers


@pytest.mark.parametrize("peft", [None, LoraConfig(**LORA)])
def test_layers_are_frozen(tmp_path, peft):
    """The first block and the embeddings stay; a killed run goes on with what trains."""
    keys = {"peft": peft, "num_layers_unfrozen": 1, "optimizer": "adamw"}
    whole = trainer(tmp_path / "whole", **keys)
    before = {name: weight.clone() for name, weight in whole.model.named_parameters()}
    whole.train()
    moved = {name for name, weight in whole.model.named_parameters() if not torch.equal(weight, before[name])}
    assert moved and not any("layers.0" in name or "embed_tokens" in name for name in moved)
    assert {"layers.1" in name or "score" in name or "model.norm" in name for name in moved} == {True}
    assert all("lora" in name or "score" in name for name in moved) is (peft is not None)
    with pytest.raises(Killed):
        trainer(tmp_path / "killed", KillAt(3), **keys).train()
    resumed = trainer(tmp_path / "killed", **keys)
    resumed.resume()
    weights = dict(resumed.model.named_parameters())
    assert all(torch.equal(weights[name], weight) for name, weight in whole.model.named_parameters())


# ---- memory


@pytest.mark.parametrize("peft", [None, LoraConfig(**LORA)])
@pytest.mark.parametrize("kind", ["llama", "gpt2", "bert"])
def test_gradient_checkpointing_changes_nothing(tmp_path, kind, peft):
    found = {}
    for flag in (False, True):
        seen = FirstGradients()
        model = tiny.scorer(kind)
        made = trainer(
            tmp_path, seen, model=model, peft=peft, gradient_checkpointing=flag, max_steps=1, seed=3,
            max_grad_norm=1e9, optimizer="adamw",
        )  # fmt: skip
        made.train()
        assert any(getattr(m, "gradient_checkpointing", False) for m in model.modules()) is flag
        found[flag] = {n: g for n, g in seen.found.items() if g is not None}
    assert len(found[True]) > 3 and tiny.far_gradients(found[True], found[False]) <= 1e-5


@pytest.mark.parametrize("peft", [None, LoraConfig(**LORA)])
def test_bf16_scores_are_rounded_and_weights_are_not(tmp_path, peft):
    data = groups(4)
    exact, made = (trainer(tmp_path, peft=peft, bf16=flag) for flag in (False, True))
    made.model.load_state_dict(exact.model.state_dict())
    part = made.data_collator(data)["parts"][0]
    far = tiny.far(made.scores(made.model, part), exact.scores(exact.model, part))
    assert 1e-6 < far < 0.1
    assert made.compute_loss(made.model, part).dtype == torch.float32
    made.train()
    assert all(p.dtype == torch.float32 and p.isfinite().all() for p in made.model.parameters())


# ---- dropout

DROPOUT = {
    "llama": {"attention_dropout": 0.3},
    "gpt2": {"resid_pdrop": 0.3, "embd_pdrop": 0.3, "attn_pdrop": 0.3},
    "opt": {"dropout": 0.3, "attention_dropout": 0.3},
    "bert": {},  # 0.1 is BERT's own
}


@pytest.mark.parametrize("kind", DROPOUT)
def test_dropout_is_off(tmp_path, kind):
    data = groups(4)
    made = trainer(tmp_path, model=tiny.scorer(kind, **DROPOUT[kind]), train=data)
    made.model.train()
    part = made.data_collator(data)["parts"][0]
    found = [made.compute_loss(made.model, part) for _ in range(2)]
    assert torch.equal(*found)
    assert found[0].item() == pytest.approx(padded_loss(tiny.scorer(kind), data).item(), rel=1e-5)
    left = trainer(tmp_path, model=tiny.scorer(kind, **DROPOUT[kind]), train=data, disable_dropout=False)
    left.model.train()
    assert not torch.equal(*(left.compute_loss(left.model, part) for _ in range(2)))


def test_held_out_scores_have_no_noise(tmp_path):
    made = trainer(tmp_path, model=tiny.scorer("gpt2", **DROPOUT["gpt2"]), disable_dropout=False, max_steps=1)
    made.train()
    assert made.evaluate() == made.evaluate()


def test_dropout_stays_in_the_configuration(tmp_path):
    made = trainer(tmp_path / "run", model=tiny.scorer("gpt2", resid_pdrop=0.25))
    made.save_model(str(tmp_path / "model"))
    again = AutoModelForSequenceClassification.from_pretrained(tmp_path / "model")
    assert again.config.resid_pdrop == 0.25 == again.transformer.h[0].mlp.dropout.p


# ---- encoders


@pytest.mark.parametrize("kind", ["bert", "roberta", "distilbert", "deberta-v2"])
def test_an_encoder_is_plain_transformers(tmp_path, kind):
    """Loss and gradients over documents; a question stands before each of its answers."""
    plain, data = tiny.scorer(kind), groups(5)
    wanted = padded_loss(plain, data)
    wanted.backward()
    made = trainer(tmp_path, model=tiny.scorer(kind), train=data, microbatch_tokens=60)
    loss = sum(
        made.compute_loss(made.model, part, num_items_in_batch=sum(len(g.pairs) for g in data))
        for part in made.data_collator(data)["parts"]
    )
    loss.backward()
    assert loss.item() == pytest.approx(wanted.item(), rel=1e-5)
    assert tiny.far_gradients(tiny.gradients(made.model), tiny.gradients(plain)) <= 1e-5


def test_an_encoder_from_texts_to_a_plain_folder(tmp_path):
    """Scores are those of `tokenizer(prompt + answer)` through plain transformers; also after a merge."""
    tiny.save(tiny.scorer("bert", vocab_size=104), tmp_path / "base", tiny.encoder_tokenizer())
    for name, peft in (("full", None), ("adapter", LoraConfig(**LORA))):
        made = trainer(
            tmp_path / "run",
            model=str(tmp_path / "base"),
            train=WORDS,
            held=WORDS,
            peft=peft,
            optimizer="adamw",
        )
        made.train()
        (part,) = made.data_collator(made.train_dataset)["parts"]
        wanted = made.scores(made.model.eval(), part)
        model = made.merged() if peft else made.model
        tiny.save(model, tmp_path / name, made.processing_class)
        plain = AutoModelForSequenceClassification.from_pretrained(tmp_path / name)
        tokenizer = AutoTokenizer.from_pretrained(tmp_path / name)
        texts = [row["prompt"] + row[side] for row in WORDS for side in ("chosen", "rejected")]
        with torch.no_grad():
            found = plain(**tokenizer(texts, padding=True, return_tensors="pt")).logits[:, 0]
        assert tiny.far(found, wanted) <= 1e-5


def test_a_folder_is_a_model(tmp_path):
    """Its head is drawn by the seed; the tokenizer comes with it."""
    tiny.save(tiny.causal(vocab_size=330), tmp_path / "base")
    rows = [{"prompt": "What is 1 + 2?", "chosen": " 3", "rejected": " 4"}]
    made = [trainer(tmp_path, model=str(tmp_path / "base"), train=rows, held=rows, seed=s) for s in (1, 1, 2)]
    first, second, third = (each.model.score.weight for each in made)
    assert torch.equal(first, second) and not torch.equal(first, third)
    assert made[0].processing_class.eos_token == "<|eos|>"
    assert set(made[0].evaluate()) >= {"eval_loss", "eval_accuracy"}


# ---- tokenizers, pads and heads


def special(**tokens):
    raw = train_tokenizer(["What is 1 + 2? It is 3."], 300).backend_tokenizer
    return PreTrainedTokenizerFast(tokenizer_object=raw, **tokens)


ROWS = [{"prompt": "What is 1 + 2?", "chosen": f" {n}.", "rejected": " It is 4. Or is it"} for n in (3, 5)]


EOS = "<|eos|>"


@pytest.mark.parametrize("tokens", [{}, {"pad_token": EOS}, {"unk_token": EOS, "bos_token": EOS}])
def test_a_pad_is_given_that_is_not_eos(tmp_path, tokens):
    """Plain transformers reads the saved model's scores, padded, where they were trained: at eos."""
    model = tiny.scorer(vocab_size=300)
    model.config.pad_token_id = model.config.eos_token_id = None
    tokenizer = special(eos_token=EOS, **tokens)
    made = trainer(tmp_path / "run", model=model, tokenizer=tokenizer, train=ROWS, held=ROWS)
    assert made.model.config.eos_token_id == 1
    assert made.model.config.pad_token_id == made.processing_class.pad_token_id not in (None, 1)
    made.train()
    (part,) = made.data_collator(made.train_dataset)["parts"]
    wanted = made.scores(made.model.eval(), part)
    made.save_model(str(tmp_path / "model"))
    plain = AutoModelForSequenceClassification.from_pretrained(tmp_path / "model")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "model")
    texts = [row["prompt"] + row[side] + EOS for row in ROWS for side in ("chosen", "rejected")]
    batch = tokenizer(texts, padding=True, return_tensors="pt", return_token_type_ids=False)
    with torch.no_grad():
        found = plain(**batch).logits[:, 0]
    assert tiny.far(found, wanted) <= 1e-5


@pytest.mark.parametrize(("pad", "eos"), [(None, 1), (None, None), (1, 1), (1, [0, 1])])
def test_a_model_without_a_pad_of_its_own_is_refused(tmp_path, pad, eos):
    model = tiny.scorer()
    model.config.pad_token_id, model.config.eos_token_id = pad, eos
    with pytest.raises(ValueError, match=f"LlamaForSequenceClassification: pad_token_id is {pad}"):
        trainer(tmp_path, model=model)


def test_a_tokenizer_without_eos_is_refused(tmp_path):
    with pytest.raises(ValueError, match="processing_class: no eos token"):
        trainer(
            tmp_path, model=tiny.scorer(vocab_size=300), tokenizer=special(pad_token="<|pad|>"), train=ROWS
        )


@pytest.mark.parametrize(
    ("model", "says"),
    [
        (lambda: tiny.causal(), "LlamaForCausalLM with . labels is no sequence classification"),
        (lambda: tiny.scorer(num_labels=2), "LlamaForSequenceClassification with 2 labels"),
        (lambda: AutoModel.from_config(tiny.config_of("llama", num_labels=1)), "LlamaModel with 1 labels"),
    ],
)
def test_a_model_without_one_score_is_refused(tmp_path, model, says):
    with pytest.raises(ValueError, match=says):
        trainer(tmp_path, model=model())


def test_a_document_longer_than_the_model_is_refused(tmp_path):
    """64 positions; RoBERTa counts from behind its pad id."""
    prompt, response = map(tuple, tiny.drawn([30, 35]))
    long = GroupedAnswers(prompt, (response, (3,)), ((0, 1),), name="s/3")
    with pytest.raises(ValueError, match=r"train_dataset, s/3: response 0 ends at token 65, .* room for 64"):
        trainer(tmp_path, train=[long])
    with pytest.raises(ValueError, match="room for 63"):
        trainer(tmp_path, model=tiny.scorer("roberta"), train=[long])
    made = trainer(tmp_path, train=[long], max_length=40)
    assert [len(r) for r in made.train_dataset[0].responses] == [10, 1]


# ---- numbers that are none


def test_a_loss_that_is_not_finite_stops_before_the_update(tmp_path):
    model = tiny.scorer()
    data = [*groups(3), GroupedAnswers((29, 4), ((5,), (6,)), ((0, 1),), name="s/29"), *groups(3, 9)]
    data = [g for g in data if g.name or 29 not in (*g.prompt, *(t for r in g.responses for t in r))]
    made = trainer(tmp_path, model=model, train=data, held=data[:1], save_strategy="no")
    with torch.no_grad():  # what is wrong from the start, the trainer refuses
        model.model.embed_tokens.weight[29] = math.nan
    before = model.score.weight.clone()
    with pytest.raises(ValueError, match=r"step \d+: the loss of s/29 is not finite"):
        made.train()
    assert model.score.weight.isfinite().all()
    assert made.state.global_step > 0 or torch.equal(model.score.weight, before)
    with pytest.raises(ValueError, match="the score of s/29 is not finite"):
        made.evaluate(data)


def test_nothing_held_out_is_said(tmp_path):
    made = trainer(tmp_path)
    made.eval_dataset = None
    with pytest.raises(ValueError, match="no eval_dataset"):
        made.evaluate()


# ---- what Trainer brings


def test_several_held_out_sets(tmp_path):
    some, others = groups(4, 30), groups(5, 40)
    found = trainer(tmp_path, held={"some": some, "others": others}).evaluate()
    for name, held in (("some", some), ("others", others)):
        alone = trainer(tmp_path, held=held).evaluate()
        for key in ("loss", "accuracy", "score_mean", "score_std"):
            assert found[f"eval_{name}_{key}"] == alone[f"eval_{key}"]


def test_rows_may_be_evaluated_that_were_not_there_before(tmp_path):
    made, held = trainer(tmp_path, held=groups(4, 30)), groups(5, 40)
    assert made.evaluate(held, metric_key_prefix="test") == {
        key.replace("eval_", "test_"): value for key, value in trainer(tmp_path, held=held).evaluate().items()
    }
    with pytest.raises(ValueError, match="eval_dataset, row 0: no pair"):
        made.evaluate([GroupedAnswers((5,), ((7,),), ())])


def test_own_metrics_see_the_scores_of_each_pair(tmp_path):
    held = groups(4, 30)
    made = trainer(tmp_path, held=held)
    made.compute_metrics = lambda found: {"lead": (found.predictions @ [1, -1]).mean()}
    own = padded_scores(tiny.scorer(), held)
    leads = [(s[b] - s[w]).item() for g, s in zip(held, own, strict=True) for b, w in g.pairs]
    assert made.evaluate()["eval_lead"] == pytest.approx(sum(leads) / len(leads), rel=1e-4)


def test_the_best_model_is_kept_and_stopping_early_works(tmp_path):
    held = groups(5, 50)
    made = trainer(
        tmp_path, EarlyStoppingCallback(2), held=held, max_steps=40, learning_rate=0.3,
        eval_strategy="steps", eval_steps=2, save_steps=2, load_best_model_at_end=True,
        metric_for_best_model="eval_loss", greater_is_better=False,
    )  # fmt: skip
    made.train()
    assert made.state.global_step < 40
    losses = [log["eval_loss"] for log in made.state.log_history if "eval_loss" in log]
    assert made.evaluate()["eval_loss"] == pytest.approx(min(losses))

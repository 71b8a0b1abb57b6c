"""Scores are plain transformers' scores, read at a document's last token."""

from __future__ import annotations

import pytest
import tiny
import torch
from transformers import AutoModelForTokenClassification

from tasks.lm.attention import blocks
from tasks.lm.attention.forest import Segment, enable_forest, plant, run_forest, serve_forest
from tasks.lm.heads import scores
from tasks.lm.heads.scores import STACKS, forest_scores, score_documents
from tasks.lm.model.kinds import is_encoder

DECODERS = ("llama", "mistral", "qwen2", "qwen3", "gemma", "phi3", "gpt2", "gpt_neox", "opt", "gemma2")
PADDED_DECODERS = ("gptj", "bloom")
PADDED_ENCODERS = ("deberta-v2", "modernbert", "albert")


def plain_scores(model, documents, pad=tiny.PAD, extra=2) -> torch.Tensor:
    """Right-padded rows through the model's own forward; pad differs from eos."""
    width = max(map(len, documents)) + extra
    ids = torch.tensor([d + [pad] * (width - len(d)) for d in documents])
    mask = torch.tensor([[1] * len(d) + [0] * (width - len(d)) for d in documents])
    return model(input_ids=ids, attention_mask=mask).logits[:, 0]


def runs(monkeypatch) -> list[int]:
    """Counts calls of the forest attention from here on."""
    calls, attend = [], blocks._attend
    monkeypatch.setattr(blocks, "_attend", lambda *a: (calls.append(1), attend(*a))[1])
    return calls


@pytest.mark.parametrize("kind", [*DECODERS, *STACKS, *PADDED_DECODERS, *PADDED_ENCODERS])
@pytest.mark.parametrize("rows", [1, 3, 100])
@torch.no_grad()
def test_scores_are_those_of_plain_transformers(monkeypatch, kind, rows):
    """Some documents end with eos, some are cut off; whole batches and parts of them; packed where served."""
    model = tiny.scorer(kind)
    documents = tiny.drawn((5, 12, 1, 33, 7)) + [[*d, tiny.EOS] for d in tiny.drawn((4, 9), 1)]
    wanted = plain_scores(model, documents)
    assert wanted.std() > 0.05, "far from uniform"
    calls = runs(monkeypatch)
    found = score_documents(model, documents, rows)
    assert found.shape == (7,) and found.dtype == torch.float32
    assert tiny.far(found, wanted) <= 1e-5
    assert bool(calls) == (kind not in PADDED_DECODERS + PADDED_ENCODERS)
    assert is_encoder(model) == (kind in (*STACKS, *PADDED_ENCODERS))


@pytest.mark.parametrize("kind", ["llama", "gpt2", "gptj", "bert"])
@pytest.mark.parametrize("rows", [2, 100])
@torch.no_grad()
def test_a_prompt_that_neighbours_share_is_read_once(monkeypatch, kind, rows):
    """By decoders that serve the forest; the scores are the same, also where nothing follows the prompt."""
    model, laid = tiny.scorer(kind), []
    first, second = tiny.drawn((20, 4), 3)
    answers = tiny.drawn((3, 5, 1, 2, 6, 2), 4)
    documents = [first + a for a in answers[:3]]
    documents += [second + answers[3], first, first + answers[4], answers[5]]
    prompts = [20, 20, 20, 4, 20, 20, 0]
    monkeypatch.setattr(scores, "plant", lambda *a, **k: laid.append(plant(*a, **k)) or laid[-1])
    found = score_documents(model, documents, rows, prompts)
    assert tiny.far(found, plain_scores(model, documents)) <= 1e-5
    tokens = sum(len(forest.tokens) for forest in laid[-4 if rows == 2 else -1 :])
    saved = {2: 20, 100: 40}[rows] if kind != "bert" else 0
    assert tokens == sum(map(len, documents)) - saved


@pytest.mark.parametrize("kind", [*DECODERS, *STACKS, "gptj", "deberta-v2"])
def test_loss_and_gradients_are_those_of_plain_transformers(kind):
    model, documents = tiny.scorer(kind), tiny.drawn((5, 12, 1, 33, 7))
    weights = torch.tensor([0.5, -1.0, 2.0, 1.0, -0.7])
    (plain_scores(model, documents) * weights).sum().backward()
    wanted = tiny.gradients(model)
    serve_forest(model)
    grown = plant([Segment(d) for d in documents], is_causal=not is_encoder(model))
    (forest_scores(model, grown, [4, 2, 0, 1, 3]) * weights[[4, 2, 0, 1, 3]]).sum().backward()
    assert tiny.far_gradients(tiny.gradients(model), wanted) <= 1e-5


@pytest.mark.parametrize("kind", ["llama", "gptj"])
def test_answers_that_share_a_question_score_as_whole_documents(kind):
    """A tree, with an answer to an answer; padded rows repeat the question."""
    model = tiny.scorer(kind)
    question, first, second, third = tiny.drawn((6, 3, 9, 2))
    documents = [question + first, question + second, question + first + third]
    wanted = plain_scores(model, documents)
    serve_forest(model)
    tree = plant([Segment(question), Segment(first, 0), Segment(second, 0), Segment(third, 1)])
    assert tiny.far(forest_scores(model, tree, [1, 2, 3]), wanted) <= 1e-5


@pytest.mark.parametrize("kind", ["roberta", "ctrl"])
@pytest.mark.parametrize("pad", [tiny.PAD, 31])
@torch.no_grad()
def test_any_padding_id(kind, pad):
    """RoBERTa counts positions from behind it; CTRL looks for it to find a document's end."""
    model = tiny.scorer(kind, pad_token_id=pad)
    documents = tiny.drawn((5, 12, 1), high=31)
    wanted = plain_scores(model, documents, pad)
    assert tiny.far(score_documents(model, documents, 8), wanted) <= 1e-5


@torch.no_grad()
def test_encoder_decoders_read_by_their_own_heads():
    """T5 at the eos that each document must have; T5Gemma, whose head has a decoder's name, further on."""
    documents = [[*d, tiny.EOS] for d in tiny.drawn((5, 12, 1))]
    t5 = tiny.scorer("t5")
    assert tiny.far(score_documents(t5, documents, 8), plain_scores(t5, documents)) <= 1e-5
    half = tiny.LLAMA | {"head_dim": 8, "vocab_size": 32, "cross_attention_hidden_size": 16}
    half |= {"pad_token_id": tiny.PAD, "eos_token_id": tiny.EOS}
    gemma = tiny.scorer("t5gemma", encoder=half, decoder=half | {"is_decoder": True})
    assert tiny.far(score_documents(gemma, documents, 8), plain_scores(gemma, documents, extra=0)) <= 1e-5


@pytest.mark.parametrize(("kind", "pad"), [("llama", 0), ("gpt2", 0), ("gptj", 0), ("gptj", None)])
def test_without_the_last_token_as_well(kind, pad):
    """As the shorter documents alone score, gradients too; answers share a question, one stands alone."""
    model = tiny.scorer(kind, pad_token_id=pad)
    question, one, two, alone = tiny.drawn((4, 3, 5, 6))
    documents = [question + one, question + two, alone]
    short = [documents[2][:-1], documents[0][:-1]]
    weights = torch.tensor([0.5, -1.0, 2.0, 1.0, -0.7])
    wanted = torch.stack([model(input_ids=torch.tensor([d])).logits[0, 0] for d in [*documents, *short]])
    (wanted * weights).sum().backward()
    slopes = tiny.gradients(model)
    serve_forest(model)
    tree = plant([Segment(question), Segment(one, 0), Segment(two, 0), Segment(alone)])
    found = forest_scores(model, tree, [1, 2, 3], but_last=[2, 0])
    assert tiny.far(found, wanted) <= 1e-5
    (found * weights).sum().backward()
    assert tiny.far_gradients(tiny.gradients(model), slopes) <= 1e-5


def test_nothing_is_read_without_its_only_token():
    model = tiny.scorer()
    serve_forest(model)
    with pytest.raises(ValueError, match="segment 1 of a forest is nothing without its last token"):
        forest_scores(model, plant([Segment((3, 4)), Segment((5,), 0)]), [0, 1], but_last=[0, 1])
    encoder = tiny.scorer("bert")
    with pytest.raises(ValueError, match="BertForSequenceClassification sees a document as a whole"):
        forest_scores(encoder, plant([Segment((3, 4))], is_causal=False), [0], but_last=[0])


@torch.no_grad()
def test_a_model_without_a_pad_id_is_read_row_by_row():
    model = tiny.scorer("gptj", pad_token_id=None)
    documents = tiny.drawn((5, 12, 1))
    alone = [model(input_ids=torch.tensor([d])).logits[0, 0] for d in documents]
    assert tiny.far(score_documents(model, documents, 8), torch.stack(alone)) <= 1e-5


@pytest.mark.parametrize("kind", ["llama", "bert", "gptj"])
def test_nothing_stays_on_the_model(kind):
    """Neither a plain forward nor the next forest sees a hook of this one."""
    model, documents = tiny.scorer(kind), tiny.drawn((5, 3))
    first = score_documents(model, documents, 8)
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
    assert torch.equal(score_documents(model, documents, 8), first)


@pytest.mark.parametrize("kind", ["llama", "bert"])
def test_adapters_and_wrappers_are_seen_through(kind):
    """LoRA on every linear layer; the whole wrapped model runs, as distributed training needs it to."""
    from peft import LoraConfig, get_peft_model

    class Wrapper(torch.nn.Module):
        def __init__(self, module):
            super().__init__()
            self.module, self.calls = module, 0

        def forward(self, *args, **keys):
            self.calls += 1
            return self.module(*args, **keys)

    adapter = LoraConfig(task_type="SEQ_CLS", target_modules="all-linear", r=4, init_lora_weights=False)
    model = get_peft_model(tiny.scorer(kind), adapter).eval()
    documents = tiny.drawn((5, 12, 1))
    wanted = plain_scores(model, documents)
    wanted.sum().backward()
    gradients = tiny.gradients(model)
    assert any("lora_A" in name for name in gradients)
    enable_forest(model)
    wrapper, grown = Wrapper(model), plant([Segment(d) for d in documents], is_causal=kind == "llama")
    found = forest_scores(wrapper, grown, range(3))
    found.sum().backward()
    assert wrapper.calls == 1
    assert tiny.far(found.detach(), wanted.detach()) <= 1e-5
    assert tiny.far_gradients(tiny.gradients(model), gradients) <= 1e-5


@pytest.mark.parametrize("kind", ["llama", "bert", "gptj", "deberta-v2"])
def test_the_wrong_kind_of_forest_is_refused(kind):
    model = tiny.scorer(kind)
    serve_forest(model)
    grown = plant([Segment((5, 6))], is_causal=is_encoder(model))
    with pytest.raises(ValueError, match=f"a forest of is_causal={not is_encoder(model)} is wanted"):
        forest_scores(model, grown, [0])


@pytest.mark.parametrize(("kind", "name"), [("llama", "LlamaAttention"), ("bert", "BertSelfAttention")])
def test_the_wrong_kind_of_forest_never_runs(kind, name):
    """Under the scores too: the attention itself refuses, in whichever layer."""
    model = tiny.scorer(kind)
    enable_forest(model)
    ways = ("causal", "bidirectional") if kind == "llama" else ("bidirectional", "causal")
    with pytest.raises(ValueError, match=f"{name} is {ways[0]}, but the forest was planted {ways[1]}"):
        run_forest(model.base_model, plant([Segment((5, 6))], is_causal=kind != "llama"))


def test_models_that_give_no_score_are_refused():
    grown = plant([Segment((5,))])
    with pytest.raises(ValueError, match="LlamaForCausalLM with 2 labels is no sequence classification"):
        forest_scores(tiny.causal(), grown, [0])
    tagger = AutoModelForTokenClassification.from_config(tiny.config_of("llama", num_labels=1))
    with pytest.raises(ValueError, match="LlamaForTokenClassification with 1 labels is no sequence"):
        forest_scores(tagger, grown, [0])
    with pytest.raises(
        ValueError, match="LlamaForSequenceClassification with 3 labels is no sequence classification"
    ):
        forest_scores(tiny.scorer(num_labels=3), grown, [0])


def test_dropout_is_off_while_scoring():
    model = tiny.scorer("gpt2", attn_pdrop=0.5, resid_pdrop=0.5, embd_pdrop=0.5).train()
    documents = tiny.drawn((4, 6))
    assert torch.equal(score_documents(model, documents, 8), score_documents(model, documents, 8))

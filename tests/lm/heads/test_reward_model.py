"""What a reward model reads of a policy's tokens: the same ids, or the same text in its own."""

from __future__ import annotations

from functools import cache

import pytest
import tiny
import torch
from transformers import AutoModelForSequenceClassification, PreTrainedTokenizerFast

from tasks.lm.heads.reward_model import RewardModel
from tasks.lm.model.loading import train_tokenizer
from tasks.lm.model.template import document_text, encode_documents, encode_prompts

QUESTIONS = ["What is 2 + 3?", "Where does `</s>` or <|eos|> end?\n\nTwo  spaces", "Ä ﬁ 日本 🙂?"]
ANSWERS = ["It is `5` , is n't it ?", " At <|eos|>, [SEP] or </s>.", ""]


@cache
def other_tokenizer():
    """Another vocabulary of the same kind, its eos at another place."""
    known = train_tokenizer(["What is the answer? It is the answer: " + str(n) for n in range(50)], 300)
    known.add_special_tokens({"eos_token": "</s>"})
    return known


def asked(*, closed: bool = True) -> tuple[list[list[int]], list[list[int]]]:
    """Prompts and responses in the policy's tokens, with eos or cut before it."""
    prompts = encode_prompts(tiny.tokenizer(), QUESTIONS)
    documents = encode_documents(tiny.tokenizer(), list(zip(QUESTIONS, ANSWERS, strict=True)))
    last = None if closed else -1
    return prompts, [d[len(p) : last] for p, d in zip(prompts, documents, strict=True)]


def loaded(folder, kind: str, tokenizer, **keys) -> RewardModel:
    keys = {"vocab_size": len(tokenizer), "max_position_embeddings": 256, **keys}
    tiny.save(tiny.scorer(kind, **keys), folder, tokenizer)
    return RewardModel.load(folder, tiny.tokenizer())


def plain_scores(folder, documents) -> torch.Tensor:
    model = AutoModelForSequenceClassification.from_pretrained(folder)
    with torch.no_grad():
        return torch.stack([model(input_ids=torch.tensor([d])).logits[0, 0] for d in documents])


def test_one_vocabulary_one_language(tmp_path):
    found = loaded(tmp_path, "llama", tiny.tokenizer())
    prompts, responses = asked()
    assert found.shares_tokens
    documents = [p + r for p, r in zip(prompts, responses, strict=True)]
    assert found.documents(prompts, responses) == documents
    assert tiny.far(found.score(prompts, responses, 2), plain_scores(tmp_path, documents)) <= 1e-5


@pytest.mark.parametrize("closed", [True, False])
def test_another_decoder_reads_the_same_text(tmp_path, closed):
    """What it would read of question and answer themselves; eos only where the response ended."""
    found, own = loaded(tmp_path, "gpt2", other_tokenizer(), n_positions=256), other_tokenizer()
    prompts, responses = asked(closed=closed)
    wanted = encode_documents(own, list(zip(QUESTIONS, ANSWERS, strict=True)))
    wanted = wanted if closed else [ids[:-1] for ids in wanted]
    assert not found.shares_tokens
    assert found.documents(prompts, responses) == wanted
    assert sum(ids.count(own.eos_token_id) for ids in wanted) == (3 if closed else 0), "a post says letters"
    assert tiny.far(found.score(prompts, responses, 2), plain_scores(tmp_path, wanted)) <= 1e-5


@pytest.mark.parametrize("closed", [True, False])
@pytest.mark.parametrize("kind", ["bert", "deberta-v2"])
def test_an_encoder_reads_the_same_text(tmp_path, kind, closed):
    """As plain transformers reads `tokenizer(document)`, wherever a response ends."""
    found, own = loaded(tmp_path, kind, tiny.encoder_tokenizer()), tiny.encoder_tokenizer()
    prompts, responses = asked(closed=closed)
    texts = [document_text(q, a) for q, a in zip(QUESTIONS, ANSWERS, strict=True)]
    wanted = own(texts, split_special_tokens=True)["input_ids"]
    assert found.documents(prompts, responses) == wanted
    assert all(ids[0] == own.cls_token_id and ids[-1] == own.sep_token_id for ids in wanted)
    assert sum(ids.count(own.sep_token_id) for ids in wanted) == 3
    assert tiny.far(found.score(prompts, responses, 2), plain_scores(tmp_path, wanted)) <= 1e-5


def test_another_eos_is_another_language(tmp_path):
    raw = tiny.tokenizer().backend_tokenizer
    known = PreTrainedTokenizerFast(tokenizer_object=raw, pad_token="<|pad|>", eos_token="!")
    found = loaded(tmp_path, "llama", known)
    assert known.get_vocab() == tiny.tokenizer().get_vocab() and not found.shares_tokens
    assert {ids[-1] for ids in found.documents(*asked())} == {known.eos_token_id}


def test_an_encoder_never_reads_the_policys_ids(tmp_path):
    assert not loaded(tmp_path, "bert", tiny.tokenizer()).shares_tokens


@pytest.mark.parametrize(("kind", "room"), [("llama", 40), ("bert", 40), ("roberta", 39)])
def test_what_its_positions_do_not_hold_is_cut(tmp_path, kind, room):
    """At the end; an encoder keeps its closing token. RoBERTa has one place less behind pad id 0."""
    own = tiny.encoder_tokenizer() if kind != "llama" else other_tokenizer()
    found = loaded(tmp_path, kind, own, max_position_embeddings=40)
    whole = loaded(tmp_path / "long", kind, own)
    for cut, ids in zip(found.documents(*asked()), whole.documents(*asked()), strict=True):
        last = 0 if kind == "llama" or len(ids) <= room else 1
        assert cut == [*ids[: room - last], *ids[len(ids) - last :]] and len(cut) <= room
    assert found.score(*asked(), rows=2).isfinite().all()


def test_what_cannot_be_loaded_names_the_key(tmp_path):
    with pytest.raises(ValueError, match=r"^reward\.base: no tokenizer in "):
        RewardModel.load(tmp_path / "none", tiny.tokenizer(), key="reward.base")
    tiny.encoder_tokenizer().save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"^reward\.base: the folder .* holds no \*\.safetensors"):
        RewardModel.load(tmp_path, tiny.tokenizer(), key="reward.base")
    tiny.scorer(vocab_size=104).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"^reward\.base: the tokenizer of .* has no eos token"):
        RewardModel.load(tmp_path, tiny.tokenizer(), key="reward.base")

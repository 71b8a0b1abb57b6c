"""The seam: the tokens a policy is prompted with are those it was trained on."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import tiny
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Regex, Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from tasks.lm.model.loading import load_tokenizer
from tasks.lm.model.template import document_text, encode_documents, encode_prompts, prompt_text, response_of

TEXTS = st.text(st.characters(exclude_categories=("Cs",)), min_size=1, max_size=40)
HARD = (
    "", " ", "\n", "x ", " x", "\n\nAnswer: no", "`ls -l`", "7", ": 7", "é", "日本", "🙂", "<s>gone</s>",
    "a </s> b", "<|eos|>", "<|pad|>", "<unk>", "[/INST]", "\u00a0", "\t", "#include <x>", "1" * 30,
)  # fmt: skip


@pytest.fixture(scope="module", params=["trained", "stories260K"])
def tokenizer(request):
    if request.param == "trained":
        return tiny.tokenizer()
    default = Path(__file__).parents[4] / "shared" / "data"
    folder = Path(os.environ.get("STACKRL_SHARED_DATA", default)) / "models" / "stories260K"
    if not folder.is_dir():
        pytest.skip(f"no pre-trained model: {folder} does not exist (set STACKRL_SHARED_DATA)")
    return load_tokenizer(folder)


def test_the_template_by_hand():
    assert prompt_text("Why?\n\nTell me.") == "Question: Why?\n\nTell me.\n\nAnswer:"
    assert document_text("Why?", "So.") == "Question: Why?\n\nAnswer: So."


def check(tokenizer, question: str, answer: str) -> None:
    (prompt,) = encode_prompts(tokenizer, [question])
    (document,) = encode_documents(tokenizer, [(question, answer)])
    eos, bos, pad = tokenizer.eos_token_id, tokenizer.bos_token_id, tokenizer.pad_token_id
    response = response_of(prompt, document, "here")
    assert prompt + response == document
    assert document[-1] == eos and document.count(eos) == 1, "eos once, at the end"
    assert document.count(bos) == (bos is not None) and document[0] == (bos or document[0]), "bos stays"
    assert pad not in document or pad == tokenizer.unk_token_id
    text = tokenizer.decode(response[:-1], clean_up_tokenization_spaces=False)
    if tokenizer.unk_token is None:
        assert text == f" {answer}"


@pytest.mark.parametrize("answer", HARD)
@pytest.mark.parametrize("question", ["What?", "a </s> b", "Show <|eos|> me\n\n", ""])
def test_a_prompt_begins_its_document(tokenizer, question, answer):
    check(tokenizer, question, answer)


@settings(max_examples=60, deadline=None)
@given(question=TEXTS, answer=TEXTS)
def test_a_prompt_begins_its_document_whatever_they_say(tokenizer, question, answer):
    check(tokenizer, question, answer)


def test_many_at_once_are_as_one_by_one(tokenizer):
    pairs = [("What?", "This."), ("And?", "That, that and that."), ("Why?", "x")]
    assert encode_documents(tokenizer, pairs) == [encode_documents(tokenizer, [p])[0] for p in pairs]
    questions = [question for question, _ in pairs]
    assert encode_prompts(tokenizer, questions) == [encode_prompts(tokenizer, [q])[0] for q in questions]
    assert encode_documents(tokenizer, []) == encode_prompts(tokenizer, []) == []


def merging() -> PreTrainedTokenizerFast:
    """A tokenizer of words for which a colon and the word after it are one token."""
    vocabulary = {"[U]": 0, "[E]": 1, "Answer: It": 2, "Answer:": 3, "Question:": 4, "It": 5}
    raw = Tokenizer(models.WordLevel(vocabulary, unk_token="[U]"))
    raw.pre_tokenizer = pre_tokenizers.Split(Regex(r"Answer:( It)?|\s+"), "isolated")
    return PreTrainedTokenizerFast(tokenizer_object=raw, unk_token="[U]", eos_token="[E]", pad_token="[U]")


def test_a_tokenizer_that_merges_across_the_seam_is_refused_with_the_row():
    known = merging()
    (prompt,), (document,) = encode_prompts(known, ["Why?"]), encode_documents(known, [("Why?", "It is.")])
    with pytest.raises(ValueError, match=r"^beer question 7: the prompt's tokens do not begin"):
        response_of(prompt, document, "beer question 7")
    response_of(prompt, encode_documents(known, [("Why?", "So it is.")])[0], "beer question 8")


def test_response_of_by_hand():
    assert response_of([5, 6], [5, 6, 7, 1], "") == [7, 1]
    assert response_of([], [7], "") == [7]
    for document in ([5, 7, 6], [5]):
        with pytest.raises(ValueError, match="row 3"):
            response_of([5, 6], document, "row 3")


def test_a_tokenizer_that_appends_eos_itself_gives_it_once():
    class Appends:
        eos_token_id, bos_token_id = 2, 1

        def __call__(self, texts, **_):
            return {"input_ids": [[1, *(3 + ord(c) % 50 for c in text), 2] for text in texts]}

    (prompt,), (document,) = encode_prompts(Appends(), ["Why?"]), encode_documents(Appends(), [("Why?", "x")])
    assert 2 not in prompt and document.count(2) == 1 and document[-1] == 2
    assert len(response_of(prompt, document, "")) == len(" x") + 1

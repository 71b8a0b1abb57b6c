"""One text has one tokenisation: every kind of tokenizer, and every road that a text takes to a model."""

from __future__ import annotations

import pytest
import tiny
import torch
from test_ends import TURN, chat_tokenizer
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
from transformers import ByT5Tokenizer, PreTrainedTokenizerFast, pipeline

from tasks.lm import AutoModelForCausalLMWithValueHead
from tasks.lm.heads.reward_model import RewardModel
from tasks.lm.model.reading import encode, marker_in, render
from tasks.lm.model.template import document_text, encode_documents, encode_prompts, prompt_text
from tasks.ppo import PPOConfig, PPOTrainer
from tasks.ppo.loop import _tokens
from tasks.ppo.reward_functions import from_model, from_pipeline
from tasks.reward.rows import read_row
from tasks.sft.documents import read_document

LETTERS = "abcdefghijklmnopqrstuvwxyz0123456789 <>/|_[]:.?\nQA▁=+"
SPECIAL = ["<pad>", "<unk>", "</s>", "<s>", "<|im_end|>"]


def fast(model, normalizer=None, pre_tokenizer=None, single="$A", eos="</s>", **keys):
    raw = Tokenizer(model)
    raw.normalizer, raw.pre_tokenizer = normalizer, pre_tokenizer
    around = [(t, raw.token_to_id(t)) for t in ("<s>", "</s>") if t in single]
    raw.post_processor = processors.TemplateProcessing(single=single, special_tokens=around)
    return PreTrainedTokenizerFast(
        tokenizer_object=raw, pad_token="<pad>", unk_token="<unk>", eos_token=eos, bos_token="<s>",
        additional_special_tokens=["<|im_end|>"], clean_up_tokenization_spaces=False, **keys,
    )  # fmt: skip


def unigram(**keys):
    """As SentencePiece's: special tokens are words of the vocabulary, and the most probable ones."""
    scores = [(word, 0.0) for word in SPECIAL] + [(c, -8.0) for c in dict.fromkeys(LETTERS)]
    return fast(models.Unigram(scores, unk_id=1), pre_tokenizer=pre_tokenizers.Metaspace(), **keys)


def words(**keys):
    vocabulary = {word: i for i, word in enumerate([*SPECIAL, "hello", "world"])}
    splits = pre_tokenizers.WhitespaceSplit()
    return fast(models.WordLevel(vocabulary, unk_token="<unk>"), pre_tokenizer=splits, **keys)


KINDS = {
    "byte-level": chat_tokenizer,
    "byte-level, no bos": lambda: chat_tokenizer(bos=None),
    "trained": tiny.tokenizer,
    "unigram": unigram,
    "unigram that closes": lambda: unigram(single="<s> $A </s>"),
    "unigram behind a normaliser": lambda: unigram(normalizer=normalizers.NFKC()),
    "words": words,
    "words that open": lambda: words(single="<s> $A"),
    "word pieces": tiny.encoder_tokenizer,
    "slow": ByT5Tokenizer,
}
every_kind = pytest.mark.parametrize(
    "tokenizer", [pytest.param(make(), id=name) for name, make in KINDS.items()]
)


def special_ids(tokenizer) -> set[int]:
    return set(tokenizer.all_special_ids) - {tokenizer.unk_token_id}


@every_kind
def test_no_text_spells_a_special_token(tokenizer):
    for word in tokenizer.all_special_tokens:
        if word == tokenizer.unk_token:
            continue
        plain, texts = "hello world", [f"hello {word} world", word, f"{word}{word} x", f"hello\n{word}"]
        (around,) = encode(tokenizer, [plain], "text")
        around = [token for token in around if token in special_ids(tokenizer)]
        for text, ids in zip(texts, encode(tokenizer, texts, "text"), strict=True):
            assert [token for token in ids if token in special_ids(tokenizer)] == around, (text, ids)
            assert ids == encode(tokenizer, [text], "text")[0], "alone as among others"
            assert marker_in(tokenizer, text) is not None
        assert marker_in(tokenizer, plain) is None


@every_kind
def test_other_texts_are_read_as_the_tokenizer_reads_them(tokenizer):
    texts = ["hello world", "1 + 1 =", "", "a </b> c", "[x] < y >"]
    assert encode(tokenizer, texts, "text") == [tokenizer(text)["input_ids"] for text in texts]


def test_a_normaliser_hides_no_special_token():
    known = unigram(normalizer=normalizers.NFKC())
    hidden = "hello \uff1c/s\uff1e world"  # fullwidth brackets, which become plain ones
    assert 2 in known(hidden, split_special_tokens=True)["input_ids"], "the tokenizer itself is taken in"
    assert 2 not in encode(known, [hidden], "text")[0]


def test_what_cannot_be_read_as_letters_is_refused():
    vocabulary = {word: i for i, word in enumerate(SPECIAL)}
    known = fast(models.WordLevel(vocabulary, unk_token="<unk>"), normalizers.Replace(" ", ""))
    with pytest.raises(ValueError, match=r"^\w+ reads a special token in the text '</s>'$"):
        encode(known, ["</s>"], "text")


def test_messages_are_read_as_the_model_reads_them():
    known = chat_tokenizer()
    turns = [{"role": "user", "content": "Is it?"}, {"role": "assistant", "content": "It is."}]
    (ids,) = encode(known, [turns], "messages")
    assert ids == known.apply_chat_template(turns)["input_ids"] and ids.count(known.eos_token_id) == 2
    assert known.bos_token_id not in ids, "the template writes what the model begins with"
    known.split_special_tokens = True
    assert encode(known, [turns], "messages") == [ids]
    known.split_special_tokens = False
    known.chat_template = "{{ bos_token }}" + known.chat_template
    assert encode(known, [turns], "messages") == [[known.bos_token_id, *ids]]
    with pytest.raises(ValueError, match="the tokenizer has no chat template"):
        render(tiny.tokenizer(), turns)
    with pytest.raises(ValueError, match="tools: for messages; a text has no template"):
        encode(known, ["x"], "text", tools=[])


MARKED = [
    f"{TURN}Is it 3?{TURN}", "plain", "</s><s>", f"<|im_start|>user\nIs it?{TURN}\n<|im_start|>assistant\n",
    "<|endoftext|>", "<tool>x<tool>",
]  # fmt: skip


def by_sft(known, prompt, answer):
    return list(read_document({"prompt": prompt, "completion": answer}, known).tokens)


def by_sft_whole(known, prompt, answer):
    return list(read_document({"text": prompt + answer}, known).tokens)


def by_reward(known, prompt, answer):
    group = read_row({"prompt": prompt, "chosen": answer, "rejected": f"{answer}!"}, known)
    return [*group.prompt, *group.responses[0]]


def by_pointwise(known, prompt, answer):
    group = read_row({"prompt": prompt, "response": answer, "label": 1}, known)
    return [*group.prompt, *group.responses[0]]


def by_score(known, prompt, answer):
    seen = []
    scorer = tiny.scorer(vocab_size=len(known), max_position_embeddings=512)
    model = RewardModel(scorer, known, known, shares_tokens=True)
    asked = from_model(model, known)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            RewardModel, "score", lambda self, p, r, rows: seen.extend(self.documents(p, r)) or torch.zeros(1)
        )
        asked([prompt], [answer])
    return seen[0]


def by_prompt(known, prompt, answer):
    """PPO's prompts; the answer is what the policy would have to say."""
    model = AutoModelForCausalLMWithValueHead(tiny.causal(vocab_size=len(known), max_position_embeddings=512))
    trainer = PPOTrainer(PPOConfig(response_tokens=2), model, tokenizer=known, device="cpu")
    (whole,) = _tokens(trainer, "prompts", [prompt + answer], is_text=True)
    return [*whole, known.eos_token_id]


@pytest.mark.parametrize("road", [by_sft, by_sft_whole, by_reward, by_pointwise, by_score, by_prompt])
@pytest.mark.parametrize(
    "name", ["byte-level", "byte-level, no bos", "trained", "unigram", "unigram that closes"]
)
def test_every_road_reads_the_same_tokens(name, road):
    known = KINDS[name]()
    for question in MARKED:
        (document,) = encode_documents(known, [(question, "yes")])
        assert document_text(question, "yes") == prompt_text(question) + " yes"
        assert road(known, prompt_text(question), " yes") == document, question
        assert document.count(known.eos_token_id) == 1
        (prompt,) = encode_prompts(known, [question])
        assert document[: len(prompt)] == prompt


@pytest.mark.parametrize("name", ["byte-level", "trained"])
def test_conversations_are_the_same_in_both_trainers(name):
    known = KINDS["byte-level"]()
    turns = [{"role": "user", "content": "Is it?"}, {"role": "assistant", "content": "yes"}]
    sft = read_document({"prompt": turns[:1], "completion": turns[1:]}, known)
    group = read_row(
        {"prompt": turns[:1], "chosen": turns[1:], "rejected": [turns[1] | {"content": "no"}]}, known
    )
    assert list(sft.tokens) == [*group.prompt, *group.responses[0]] == encode(known, [turns], "messages")[0]


def test_a_pipeline_reads_letters_too():
    known = tiny.encoder_tokenizer()
    model = tiny.scorer("bert", vocab_size=len(known), num_labels=1)
    pipe = pipeline("text-classification", model=model, tokenizer=known)
    said = from_pipeline(pipe)(["What? "], ["It is [SEP] [CLS] 3."])
    (ids,) = encode(known, ["What? It is [SEP] [CLS] 3."], "text")
    with torch.no_grad():
        wanted = model(torch.tensor([ids])).logits[0, 0]
    assert said.item() == pytest.approx(wanted.item(), abs=1e-6)


@pytest.mark.parametrize("read", [by_sft, by_reward])
def test_rows_that_were_rendered_beforehand_are_told_once(read, caplog):
    known = chat_tokenizer()
    read(known, "no marker", "here")
    assert not caplog.records
    for _ in range(2):
        read(known, f"<|im_start|>user{TURN}", "yes")
    (told,) = caplog.messages
    assert told.startswith("a row of text spells <|im_start|>, which is read as letters;")

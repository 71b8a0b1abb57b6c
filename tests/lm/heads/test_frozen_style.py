"""A rule on style and a head on a frozen encoder: what they read of texts, and that a score is one number."""

from __future__ import annotations

import json

import pytest
import tiny
import torch

from tasks.lm.heads.frozen_style import COUNTED, HEAD, WRITTEN, Head, features_of
from tasks.lm.heads.reward_model import RewardModel, frozen_style
from tasks.lm.model.loading import load_encoder, save_model
from tasks.lm.model.template import encode_prompts, prompt_text
from tasks.ppo.reward_functions import from_model

QUESTIONS = ["What is 2 + 3?", "Where does [SEP] end?\n\nTwo  spaces", "How?", "How?"]
ANSWERS = ["It is `5`, isn't it", "i dont know [SEP] or </s>.\n\n- one\n- two", "", "So it is, because."]
KINDS = ["bert", "roberta", "distilbert", "modernbert"]


def head(size: int = 16) -> Head:
    """One of random numbers that reads five and seven tokens."""
    torch.manual_seed(3)
    drawn = torch.randn(len(COUNTED) + len(WRITTEN) + size, dtype=torch.float64).tolist()
    return Head(5, 7, tuple(drawn[:-size]), tuple(drawn[-size:]))


def made(kind: str = "bert"):
    known = tiny.encoder_tokenizer()
    return frozen_style(tiny.encoder(kind, vocab_size=len(known)), known, head())


def saved(folder):
    model = made()
    save_model(model.encoder, model.tokenizer, folder)
    (folder / HEAD).write_text(model.head.text())
    return model


@torch.no_grad()
@pytest.mark.parametrize("kind", KINDS)
def test_by_hand(kind):
    """[CLS] question [SEP] answer [SEP], five and seven characters; the mean is over the last two parts."""
    model, known = made(kind), tiny.encoder_tokenizer()
    cls, sep = known.cls_token_id, known.sep_token_id
    for question, answer in zip(QUESTIONS, ANSWERS, strict=True):
        asked, said = (known.convert_tokens_to_ids(list(text)) for text in (question[:5], answer[:7]))
        ids = torch.tensor([[cls, *asked, sep, *said, sep]])
        first = len(asked) + 2
        types = {"token_type_ids": (torch.arange(ids.shape[1]) >= first).long()[None]}
        keys = types if kind in ("bert", "roberta") else {}
        keys = {"input_ids": ids, "attention_mask": torch.ones_like(ids), **keys}
        states = model.encoder(**keys)[0][0, first:].mean(0)
        assert tiny.far(model.means([question], [answer])[0], states) <= 1e-5
        style, weights = (torch.tensor(part).double() for part in model.head[2:])
        wanted = features_of([question], [answer])[0] @ style + states.double() @ weights
        assert model.scores([question], [answer]).item() == pytest.approx(wanted.item(), rel=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_neighbours_and_padding_change_nothing(kind):
    model = made(kind)
    alone = torch.cat([model.scores([q], [a]) for q, a in zip(QUESTIONS, ANSWERS, strict=True)])
    for rows in (1, 2, 64):
        assert tiny.far(model.scores(QUESTIONS, ANSWERS, rows), alone) <= 1e-5
    assert tiny.far(model.scores(QUESTIONS[::-1], ANSWERS[::-1]), alone.flip(0)) <= 1e-5
    assert len(set(alone.tolist())) == 4 and model.scores([], []).shape == (0,)


def test_what_a_text_counts():
    """Three sentences in lower case, eleven words; a list, marks, an aside, an open end."""
    answer = "i dont know , see the other answer!! \n- wait...\n@bob has it"
    counted, written = features_of(["Who has it, Bob?"], [answer])[0].split([5, 24])
    named = dict(zip((*COUNTED, *WRITTEN), torch.cat([counted, written]).tolist(), strict=True))
    assert named["characters"] == pytest.approx(torch.tensor(len(answer) + 1.0).log().item())
    assert named["words of the question"] == pytest.approx(torch.tensor(4.0).log().item())  # bob, has, it
    assert named["paragraphs"] == pytest.approx(torch.tensor(2.0).log().item())
    assert named["lower-case sentences"] == pytest.approx(1 / 4)  # of - wait... and @bob … no
    assert named["sloppy words"] == pytest.approx(2 / 16) and named["spaces before punctuation"] == 1 / 16
    for name in ("list items", "reasons"):
        assert named[name] == pytest.approx(torch.tensor(2.0 if name == "list items" else 1.0).log().item())
    for name in ("other answers", "open end", "lower-case start", "at sign"):
        assert named[name] == 1, name
    assert named["comments"] == named["image"] == named["bold"] == named["links"] == 0


def test_letters_of_a_special_token_are_letters():
    model = made()
    assert tiny.far(model.means(["[SEP]"], ["[CLS]"]), model.means(["[SEP"], ["[CLS]"])) > 1e-3
    assert [len(ids) for ids in model._ids(["[SEP]"], 9)] == [5]


def test_of_a_policys_tokens(tmp_path):
    """Texts lose the template; ids and texts give one score; eos is no letter; a prompt may be cut."""
    wanted, words = saved(tmp_path), tiny.tokenizer()
    found = RewardModel.load(tmp_path, words)
    prompts = encode_prompts(words, QUESTIONS)
    responses = [words(f" {answer}")["input_ids"] for answer in ANSWERS]
    closed = [[*ids, words.eos_token_id] for ids in responses]
    scores = wanted.scores(QUESTIONS, ANSWERS)
    assert found.parts(prompts, closed) == (QUESTIONS, ANSWERS)
    for each in (responses, closed):
        assert tiny.far(found.score(prompts, each, 2).double(), scores) <= 1e-5
    (tmp_path / "scores.json").write_text('{"mean": 1.0, "std": 2.0}')
    score = from_model(str(tmp_path), words, normalize=True)
    texts = [prompt_text(q) for q in QUESTIONS], [f" {a}" for a in ANSWERS]
    assert tiny.far(score(*texts).double(), (scores - 1) / 2) <= 1e-5
    assert tiny.far(score(prompts, closed).double(), (scores - 1) / 2) <= 1e-5
    ((asked,), (answer,)) = found.parts([prompts[0][-12:]], closed[:1])
    assert asked.strip() == QUESTIONS[0] and asked != QUESTIONS[0] and answer == ANSWERS[0]


def test_a_head_is_kept_to_the_last_digit(tmp_path):
    (tmp_path / HEAD).write_text(head().text())
    assert Head.read(tmp_path) == head()
    known = json.loads((tmp_path / HEAD).read_text())
    for change, message in (
        ({"format": 2}, "head.json: format 2, 1 is read"),
        ({"style": {"characters": 1.0}}, "it lacks 'code blocks'"),
    ):
        (tmp_path / HEAD).write_text(json.dumps(known | change))
        with pytest.raises(ValueError, match=message):
            Head.read(tmp_path)


def test_what_does_not_fit_names_the_key(tmp_path):
    saved(tmp_path)
    (tmp_path / HEAD).write_text(head(5).text())
    with pytest.raises(ValueError, match=r"^artifacts/reward/model: .*its head is for 5 states, .* has 16"):
        RewardModel.load(tmp_path, tiny.tokenizer())
    with pytest.raises(ValueError, match="cls token before a text and a sep token behind"):
        frozen_style(tiny.encoder(), tiny.tokenizer(), head())
    with pytest.raises(ValueError, match=r"^reward\.base: .* has 2 layers, 3 are asked for"):
        load_encoder(tmp_path, key="reward.base", layers=3)
    tiny.seq2seq().save_pretrained(tmp_path / "t5")
    with pytest.raises(ValueError, match=r"^reward\.base: .* is an encoder-decoder"):
        load_encoder(tmp_path / "t5", key="reward.base")


@torch.no_grad()
@pytest.mark.parametrize("kind", KINDS[:3])  # ModernBERT has a norm behind its last layer
def test_lower_layers_are_what_all_layers_pass_through(tmp_path, kind):
    whole, ids = tiny.encoder(kind), torch.tensor([[5, 6, 7]])
    whole.save_pretrained(tmp_path)
    cut = load_encoder(tmp_path, layers=1).eval()
    states = whole(input_ids=ids, output_hidden_states=True).hidden_states[1]
    assert tiny.far(cut(input_ids=ids)[0], states) <= 1e-5 and cut.config.num_hidden_layers == 1

"""Scores from pipelines, reward models, files and mixes, beside what their models say by hand."""

from __future__ import annotations

import copy
import json

import made_trainers
import numpy as np
import pytest
import tiny
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast, pipeline

from tasks.lm.heads.reward_model import RewardModel
from tasks.lm.model.template import encode_documents, encode_prompts
from tasks.ppo.batch import read_scores
from tasks.ppo.reward_functions import from_file, from_model, from_pipeline, mix, texts_of

PROMPTS, RESPONSES = ["What is 2+3?", "Why"], [" It is 5.", " Who knows? It was so, and it is so."]


def classifier(room: int = 64, **keys):
    labels = {"num_labels": 3, "id2label": {0: "BAD", 1: "MEH", 2: "GOOD"}}
    known = tiny.encoder_tokenizer()
    keys = {"vocab_size": len(known), "max_position_embeddings": room, **labels, **keys}
    return pipeline("sentiment-analysis", model=tiny.scorer("bert", **keys), tokenizer=known)


def logits(pipe, text: str, most: int | None = None) -> torch.Tensor:
    ids = pipe.tokenizer(text, truncation=most is not None, max_length=most)["input_ids"]
    with torch.no_grad():
        return pipe.model(torch.tensor([ids])).logits[0]


@pytest.mark.parametrize(("label", "place"), [("BAD", 0), ("GOOD", 2)])
def test_a_pipeline_gives_the_raw_logit_of_a_label(label, place):
    pipe = classifier()
    both = from_pipeline(pipe, label, batch_size=2)(PROMPTS, RESPONSES)
    alone = from_pipeline(pipe, label, reads="response")(PROMPTS, RESPONSES)
    texts = [p + r for p, r in zip(PROMPTS, RESPONSES, strict=True)]
    assert tiny.far(both, [logits(pipe, text)[place] for text in texts]) <= 1e-5
    assert tiny.far(alone, [logits(pipe, text)[place] for text in RESPONSES]) <= 1e-5


def test_a_text_too_long_for_the_pipeline_is_cut():
    pipe = classifier(room=12)
    found = from_pipeline(pipe, "GOOD")(PROMPTS, RESPONSES)
    cut = [logits(pipe, p + r, most=12)[2] for p, r in zip(PROMPTS, RESPONSES, strict=True)]
    assert tiny.far(found, cut) <= 1e-5


def test_the_only_label_needs_no_name_and_gets_no_sigmoid():
    pipe = classifier(num_labels=1, id2label={0: "LABEL_0"})
    found = from_pipeline(pipe)(PROMPTS, RESPONSES)
    assert found[0].item() == pytest.approx(logits(pipe, PROMPTS[0] + RESPONSES[0])[0].item(), rel=1e-5)


def test_what_a_pipeline_cannot_score():
    pipe = classifier()
    for keys, words in (
        ({}, "name one of BAD, MEH, GOOD"),
        ({"label": "LABEL_1"}, "no 'LABEL_1'; it has BAD"),
        ({"label": "BAD", "reads": "prompt"}, "both or response"),
    ):
        with pytest.raises(ValueError, match=words):
            from_pipeline(pipe, **keys)
    with pytest.raises(ValueError, match="pipe must be a text-classification pipeline"):
        from_pipeline(pipe.model, "BAD")
    with pytest.raises(ValueError, match="give it the policy's tokenizer"):
        from_pipeline(pipe, "BAD")([[1, 2]], [[3]])


def test_a_pipeline_reads_the_text_of_token_ids():
    pipe, known = classifier(), tiny.tokenizer()
    prompts, responses = (known(texts)["input_ids"] for texts in (PROMPTS, RESPONSES))
    responses[0].append(known.eos_token_id)  # it is no part of the text
    found = from_pipeline(pipe, "GOOD", tokenizer=known)([torch.tensor(p) for p in prompts], responses)
    assert torch.equal(found, from_pipeline(pipe, "GOOD")(PROMPTS, RESPONSES))


def test_a_response_keeps_the_space_it_begins_with():
    """SentencePiece's decoders drop the first space of a text; the response does not begin one."""
    words = {"<pad>": 0, "▁two": 1, "▁words": 2, "▁more": 3}
    raw = Tokenizer(models.WordLevel(words, unk_token="<pad>"))
    raw.pre_tokenizer, raw.decoder = pre_tokenizers.Metaspace(), decoders.Metaspace()
    known = PreTrainedTokenizerFast(tokenizer_object=raw, pad_token="<pad>", eos_token="▁more")
    assert known.decode([2]) == "words"
    assert texts_of(known, [[1], [1, 1]], [[2, 0], []]) == (["two", "two two"], [" words", ""])


def test_a_letter_parted_by_the_seam_is_no_reason_to_lose_the_response():
    known = tiny.tokenizer()
    ids = known("日")["input_ids"]
    assert len(ids) == 3
    (prompt,), (response,) = texts_of(known, [ids[:1]], [ids[1:] + known("!")["input_ids"]])
    assert prompt == "\N{REPLACEMENT CHARACTER}" and response == known.decode(ids[1:]) + "!"


def test_a_text_keeps_the_spaces_its_tokens_say():
    known = copy.deepcopy(tiny.tokenizer())
    known.clean_up_tokenization_spaces = True
    ids = known([" is n't", " it , so ?"])["input_ids"]
    assert texts_of(known, ids[:1], ids[1:]) == ([" is n't"], [" it , so ?"])


def documents():
    """Prompts and finished responses in the policy's tokens."""
    pairs = list(zip(["What is 2 + 3?", "Why?"], ["It is `5`.", "Who knows?"], strict=True))
    prompts = encode_prompts(tiny.tokenizer(), [q for q, _ in pairs])
    whole = encode_documents(tiny.tokenizer(), pairs)
    return prompts, [d[len(p) :] for p, d in zip(prompts, whole, strict=True)]


def test_a_reward_model_is_read_at_the_last_token(tmp_path):
    known, prompts, responses = tiny.tokenizer(), *documents()
    model = tiny.scorer(vocab_size=len(known), max_position_embeddings=256)
    with torch.no_grad():
        last = [model(torch.tensor([p + r])).logits[0, 0] for p, r in zip(prompts, responses, strict=True)]
    folder = tiny.save(model, tmp_path / "model")
    texts = texts_of(known, prompts, responses)
    for given in (model, folder, str(folder), RewardModel.load(folder, known)):
        score = from_model(given, known)
        assert tiny.far(score(prompts, responses), last) <= 1e-5
        assert tiny.far(score(*texts), last) <= 1e-5  # of a text, too, the last token is eos
        assert score.reads_tokens


def test_a_text_ends_with_one_eos_whatever_the_tokenizer_adds():
    known, (prompts, responses) = copy.deepcopy(tiny.tokenizer()), documents()
    score = from_model(tiny.scorer(vocab_size=len(known), max_position_embeddings=256), known)
    texts, wanted = texts_of(known, prompts, responses), score(prompts, responses)
    known.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="$A <|eos|>", special_tokens=[("<|eos|>", known.eos_token_id)]
    )
    assert known("a")["input_ids"][-1] == known.eos_token_id
    assert tiny.far(score(*texts), wanted) <= 1e-5


def test_a_reward_models_scores_are_normalised_when_asked(tmp_path):
    known, prompts, responses = tiny.tokenizer(), *documents()
    folder = tiny.save(tiny.scorer(vocab_size=len(known), max_position_embeddings=256), tmp_path)
    with pytest.raises(ValueError, match=r"normalize: no scores\.json beside"):
        from_model(folder, known, normalize=True)
    (folder / "scores.json").write_text(json.dumps({"mean": 0.5, "std": 0.25}))
    raw = from_model(folder, known)(prompts, responses)
    assert tiny.far(from_model(folder, known, normalize=True)(prompts, responses), (raw - 0.5) / 0.25) <= 1e-6
    (folder / "scores.json").write_text(json.dumps({"mean": 0.5, "std": 0.0}))
    assert from_model(folder, known, normalize=True)(prompts, responses).isfinite().all()
    with pytest.raises(ValueError, match=r"normalize: no scores\.json"):
        from_model(RewardModel.load(folder, known), known, normalize=True)


def test_what_is_no_reward_model(tmp_path):
    with pytest.raises(ValueError, match="no sequence classification with one label"):
        from_model(tiny.scorer(num_labels=2), tiny.SPECIAL)
    with pytest.raises(ValueError, match=r"no sequence classification|LlamaForCausalLM"):
        from_model(tiny.causal(), tiny.SPECIAL)
    with pytest.raises(ValueError, match="model: no tokenizer in"):
        from_model(tmp_path / "none", tiny.SPECIAL)


ROWS = [
    {"prompt": "What?", "response": " Two\nlines, \u2028 one \"cell\"", "score": 2},
    {"prompt": "What?", "response": " Nothing", "score": -0.5, "rater": "a"},
    {"prompt": "What?", "response": " Nothing ", "score": 1, "rater": "b"},
]  # fmt: skip


def as_csv(rows) -> str:
    cell = lambda value: '"' + str(value).replace('"', '""') + '"'  # noqa: E731
    lines = [[row[name] for name in ("score", "prompt", "response")] for row in rows]
    return "\n".join(",".join(map(cell, line)) for line in [["score", "prompt", "response"], *lines])


@pytest.mark.parametrize("suffix", ["jsonl", "csv"])
@pytest.mark.parametrize("start", ["", "\ufeff"])
def test_a_file_of_human_scores(tmp_path, suffix, start):
    lines = "\n\n".join(json.dumps(row, ensure_ascii=False) for row in ROWS)
    (tmp_path / f"s.{suffix}").write_text(
        start + (as_csv(ROWS) if suffix == "csv" else lines + "\n"), "utf-8"
    )
    score = from_file(tmp_path / f"s.{suffix}")
    found = score(["What?", " What?"], ["Nothing", ROWS[0]["response"]])
    assert found.tolist() == [0.25, 2]  # two raters: their mean
    with pytest.raises(ValueError, match=r"s\.\w+ has no score for 'Unseen' in answer to 'What\?'"):
        score(["What?", "What?"], ["Nothing", "Unseen"])


def test_lines_within_a_cell_are_the_texts_own(tmp_path):
    (tmp_path / "s.csv").write_bytes(b'prompt,response,score\r\na,"b\r\nc",1\r\na,"b\nc",2\r\n')
    assert from_file(tmp_path / "s.csv")(["a", "a"], ["b\nc", "b\r\nc"]).tolist() == [2, 1]


@pytest.mark.parametrize(
    ("name", "content"),
    [("s.json", b'{"prompt": " a\\n", "response": " b ", "score": 1}'),
     ("s.csv", b"prompt,response,score\r a , b ,1\r")],
)  # fmt: skip
def test_white_space_around_a_text_and_old_line_ends_do_not_matter(tmp_path, name, content):
    (tmp_path / name).write_bytes(content)
    assert from_file(tmp_path / name)(["a"], ["b"]).tolist() == [1]


def test_a_long_text_is_quoted_in_part(tmp_path):
    (tmp_path / "s.jsonl").write_text(json.dumps(ROWS[0]))
    with pytest.raises(ValueError, match=r"no score for 'x{60}…' in answer to 'What'"):
        from_file(tmp_path / "s.jsonl")(["What"], ["x" * 100])


def test_a_file_scores_token_ids_by_their_text(tmp_path):
    known = tiny.tokenizer()
    (tmp_path / "s.jsonl").write_text(json.dumps(ROWS[1]))
    ids = known(["What?", " Nothing"])["input_ids"]
    score = from_file(tmp_path / "s.jsonl", tokenizer=known)
    assert score([ids[0]], [[*ids[1], known.eos_token_id]]).tolist() == [-0.5]


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("s.jsonl", '{"prompt": "a", "response": "b", "score": 1}\n{"prompt"', r"s\.jsonl, line 2: not JSON"),
        ("s.jsonl", '\n{"prompt": "a", "response": "b"}', "line 2: a row needs prompt, response, score"),
        ("s.jsonl", "[1, 2, 3]", "line 1: a row needs"),
        ("s.jsonl", '{"prompt": "a", "response": 3, "score": 1}', "line 1: prompt and response must be"),
        ("s.jsonl", '{"prompt": "a", "response": "b", "score": NaN}', "the score nan is no finite number"),
        ("s.jsonl", '{"prompt": "a", "response": "b", "score": "good"}', "the score 'good' is no finite"),
        ("s.jsonl", '{"prompt": "a", "response": "b", "score": [1]}', r"the score \[1\] is no finite"),
        ("s.jsonl", '{"prompt": "a", "response": "b", "score": 1%s}' % (400 * "0"), "the score 10+ is no"),
        ("s.jsonl", '{"prompt": ["a"], "response": "b", "score": 1}', "line 1: prompt and response must be"),
        ("s.jsonl", '{"prompt": "a", "response": "b", "score": Infinity}', "the score inf is no finite"),
        ("s.csv", "prompt,response,score\na,b," + "x" * 99, "the score 'x{59} is no finite"),
        ("s.jsonl", "", "holds no scores"),
        ("s.csv", "prompt,response,score\na,b,1\na,c", r"s\.csv, line 3: a row needs"),
        ("s.csv", 'prompt,response,score\na,"b\nb",1\na,c,x', "line 4: the score 'x' is no finite number"),
        ("s.csv", 'prompt,response,score\na,"b"b,1', "line 2: "),
        ("s.csv", "question,answer,votes\na,b,1", "line 2: a row needs prompt, response, score"),
        ("s.txt", "a b 1", r"scores are read from \.jsonl"),
        ("s.jsonl", b"\xff\xfe", r"s\.jsonl cannot be read"),
        ("s.jsonl", None, r"s\.jsonl cannot be read"),
    ],
)
def test_a_bad_row_names_file_and_line(tmp_path, name, content, words):
    if content is not None:
        (tmp_path / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(ValueError, match=words):
        from_file(tmp_path / name)


def length(prompts, responses):
    return [float(len(r)) for r in responses]


def per_token(prompts, responses):
    return [torch.arange(len(r)) for r in responses]


def test_a_mix_is_a_weighted_sum():
    ones = lambda prompts, responses: np.ones((len(prompts), 1))  # noqa: E731 - a column counts as numbers
    found = mix({length: 0.5, ones: -2})([[7]] * 3, [[1], [2, 3], [4, 5, 6]])
    assert found.tolist() == [-1.5, -1.0, -0.5]


def test_a_mix_of_rewards_per_token():
    twice = lambda prompts, responses: [[2.0] * len(r) for r in responses]  # noqa: E731
    found = mix({per_token: 1, twice: 0.5})([[7]] * 2, [[1, 2, 3], [4]])
    assert [row.tolist() for row in found] == [[1, 2, 3], [1]]


def test_what_cannot_be_mixed():
    for weights, words in (({}, "no reward function"), ({"a": 1}, "'a' is no function"),
                           ({length: float("nan")}, "the weight of length is nan"),
                           ({length: "1"}, "the weight of length is '1'")):  # fmt: skip
        with pytest.raises(ValueError, match=words):
            mix(weights)
    with pytest.raises(ValueError, match="length gives a number per response, per_token a reward per token"):
        mix({length: 1, per_token: 1})([[7]] * 2, [[1], [2, 3]])
    longer = lambda prompts, responses: [[1.0], [1.0] * 3]  # noqa: E731
    with pytest.raises(ValueError, match=r"response 1 .* different numbers of tokens: 2 \(per_token\), 3"):
        mix({per_token: 1, longer: 1})([[7]] * 2, [[2], [2, 3]])
    with pytest.raises(ValueError, match="none: scores: NoneType is no sequence of 1 numbers"):

        def none(prompts, responses):
            return None

        mix({length: 1, none: 1})([[7]], [[1]])


def test_a_mix_reads_tokens_where_all_its_parts_do():
    model = from_model(tiny.scorer(), tiny.SPECIAL)
    assert mix({model: 1}).reads_tokens and not mix({model: 1, length: 1}).reads_tokens


def test_the_loop_hands_tokens_to_what_reads_them_and_texts_to_all_else():
    known, seen = tiny.tokenizer(), []
    policy, ask = {"vocab_size": len(known)}, {"updates": 1, "preflight": False, "monitor": {"responses": 4}}

    def varied(prompts, responses):
        seen.append((prompts, responses))
        return [float(len(r)) for r in responses]

    trainer = made_trainers.trainer(model_keys=policy, given={"tokenizer": known}, **ask)
    trainer.train(["What is 1?", "Why?"], varied)
    texts = seen[1]  # a look, the rollout, a look
    varied.reads_tokens = True
    trainer = made_trainers.trainer(model_keys=policy, given={"tokenizer": known}, **ask)
    trainer.train(["What is 1?", "Why?"], varied)
    tokens = seen[4]
    assert {type(x) for row in tokens[1] for x in row} == {int} and texts == texts_of(known, *tokens)
    varied.reads_tokens = False
    for wrong in ([5], [6]):  # in a rollout, in a look at what is held out

        def rude(prompts, responses, wrong=wrong):
            return varied(prompts, responses)[prompts[0] == wrong :]

        with pytest.raises(ValueError, match=r"rude: scores holds \d rows for \d responses"):
            made_trainers.trainer(**ask).train([[5]], rude, held_out=[[6], [7]])


@pytest.mark.parametrize(
    "given",
    [[1, 2.5], np.array([1, 2.5]), torch.tensor([1, 2.5], dtype=torch.bfloat16), (torch.tensor(1), [2.5]),
     torch.tensor([[1.0], [2.5]], requires_grad=True)],
)  # fmt: skip
def test_scores_in_any_dress(given):
    found = read_scores("f", given, 2)
    assert [row.reshape(()).item() for row in found] == [1, 2.5]
    assert all(row.dtype == torch.float32 and not row.requires_grad for row in found)


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ([1.0], "f holds 1 rows for 2 responses"),
        ([1.0, float("nan")], "f\[1\] is not finite: nan"),
        ([[1.0, float("inf")], [1.0]], r"f\[0\] is not finite: \[1.0, inf\]"),
        (["good", "bad"], "f\[0\] is 'good', no number"),
        ([1.0, None], "f\[1\] is None, no number"),
        ([1.0, {"score": 1}], "f\[1\] is .*no number"),
        ([1.0, ["a"]], "f\[1\] is .*no number"),
        (torch.ones(2, 2, 2), r"f\[0\] has the shape \(2, 2\)"),
        (3.0, "f: float is no sequence of 2"),
        ("ab", "f: str is no sequence"),
        ({0: 1.0, 1: 2.0}, "f: dict is no sequence"),
        (None, "f: NoneType is no sequence"),
    ],
)
def test_what_is_no_score(given, words):
    with pytest.raises(ValueError, match=words):
        read_scores("f", given, 2)

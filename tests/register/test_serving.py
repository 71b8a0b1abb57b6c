"""Registered models in the hands of people who do not know us: without our package, by MLflow's own doors."""

import importlib
import json
import os
import signal
import socket
import subprocess
import time
import urllib.error
import urllib.request

import mlflow
import pandas as pd
import pytest
import tiny
import torch
from made_models import tokenizer
from tokenizers import Tokenizer, pre_tokenizers
from tokenizers.models import Unigram
from tokenizers.processors import TemplateProcessing
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    GenerationConfig,
    PreTrainedTokenizerFast,
)

from params.schema import Params
from tasks.lm.heads.frozen_style import HEAD, FrozenStyle, Head
from tasks.lm.heads.reward_model import load_frozen_style
from tasks.lm.model.template import document_text, prompt_text
from tasks.register import checks, holdings, models, recipe
from tasks.run import tracking

GREEDY = {"do_sample": False}
QUESTIONS = ["What is 1 + 2?", "How?", "Is it 3.", "What is <|eos|>?", "How?"]
ANSWERS = ["It is 3.", "", "It is.", "<|eos|>", "no"]


@pytest.fixture(scope="module")
def served(finished):
    """name of a model -> its folder in the registry."""
    held = holdings.in_file(finished / "mlflow.db", [f"stackrl-{kind}" for kind in recipe.MODELS])
    places = {name: holdings.local_folder(each.versions[0].place) for name, each in held.items()}
    return {name.removeprefix("stackrl-"): place for name, place in places.items()}


@pytest.fixture(scope="module")
def policy(served):
    return mlflow.pyfunc.load_model(str(served["policy"]))


@pytest.fixture(scope="module")
def reward(served):
    return mlflow.pyfunc.load_model(str(served["reward"]))


def by_hand(finished, question, most):
    """The likeliest tokens, one forward each, of the prompt's letters."""
    model = AutoModelForCausalLM.from_pretrained(finished / "artifacts/ppo/model").eval()
    ids = tokenizer()(prompt_text(question), split_special_tokens=True)["input_ids"]
    start = len(ids)
    while len(ids) < start + most and (len(ids) == start or ids[-1] != tokenizer().eos_token_id):
        ids.append(model(torch.tensor([ids])).logits[0, -1].argmax().item())
    return tokenizer().decode(ids[start:], skip_special_tokens=True).replace("\ufffd", "").strip()


def test_it_answers_the_question_and_nothing_else(finished, policy):
    expected = [by_hand(finished, question, 12) for question in QUESTIONS]
    assert policy.predict(QUESTIONS, params=GREEDY | {"max_new_tokens": 12}) == expected
    assert all(expected) and not any("Answer:" in text for text in expected)


def test_rows_side_by_side_answer_as_each_alone(policy):
    together = policy.predict(QUESTIONS, params=GREEDY)
    assert together == [policy.predict([question], params=GREEDY)[0] for question in QUESTIONS]
    frames = (
        pd.DataFrame({"question": QUESTIONS, "more": 1}, index=[9, 9, 3, 2, 1]),
        pd.DataFrame(QUESTIONS),
        pd.Series(QUESTIONS),
        {"question": QUESTIONS},
        [{"question": question} for question in QUESTIONS],
    )
    for frame in frames:
        assert policy.predict(frame, params=GREEDY) == together
    assert policy.predict("How?", params=GREEDY) == policy.predict({"question": "How?"}, params=GREEDY)
    assert policy.predict("How?", params=GREEDY) == [together[1]]


def test_the_numbers_are_the_runs_own_and_can_be_asked_for(policy, served):
    ppo = Params().ppo
    defaults = {spec.name: spec.default for spec in policy.metadata.signature.params}
    assert defaults == {
        "max_new_tokens": ppo.response_tokens, "do_sample": True, "temperature": ppo.temperature,
        "top_k": 0, "top_p": 1.0, "seed": -1,
    }  # fmt: skip
    saved = GenerationConfig.from_pretrained(served["policy"] / "model")
    assert {name: getattr(saved, name) for name in recipe.SAMPLING}.items() <= defaults.items()
    assert saved.eos_token_id == tokenizer().eos_token_id
    assert policy.predict(QUESTIONS) != policy.predict(QUESTIONS), "sampled"
    assert policy.predict(QUESTIONS, params={"seed": 3}) == policy.predict(QUESTIONS, params={"seed": 3})
    likeliest = policy.predict(QUESTIONS, params=GREEDY)
    for narrow in ({"top_k": 1}, {"top_p": 1e-6}):
        assert policy.predict(QUESTIONS, params=narrow) == likeliest, narrow
    cold, hot = (policy.predict(QUESTIONS, params={"seed": 3, "temperature": t}) for t in (0.01, 2.0))
    assert cold != hot
    model = policy.unwrap_python_model()
    for most in (1, 3):
        how = {**model.defaults, "max_new_tokens": most}
        ids = torch.tensor([model.prompt("How?", 0, how)])
        assert policy.predict("How?", params={"max_new_tokens": most, **GREEDY})[0] == (
            by_tokens(model, ids, most)
        )


def by_tokens(model, ids, most):
    said = model.model.generate(input_ids=ids, max_new_tokens=most, do_sample=False, pad_token_id=0)
    assert said.shape[1] == ids.shape[1] + most
    text = model.tokenizer.decode(said[0, ids.shape[1] :], skip_special_tokens=True)
    return text.replace("\ufffd", "").strip()


@pytest.mark.parametrize(
    ("asked", "params", "line"),
    [
        ([""], {}, "question of row 0: '' is no text"),
        (["How?", 3], {}, "question of row 1: 3 is no text"),
        (pd.DataFrame({"question": ["How?", float("nan")]}), {}, "question of row 1: nan is no text"),
        (pd.DataFrame({"title": ["How?"], "question": ["a"]}), {}, "the first column is 'title'"),
        ([None], {}, "question of row 0: None"),
        ([3], {}, "can not safely convert"),
        ([], {}, "missing inputs"),
        (["How?"], {"max_new_tokens": "six"}, "max_new_tokens"),
        (["How?"], {"max_new_tokens": 0}, "max_new_tokens is 0"),
        (["How?"], {"temperature": 0.0}, "temperature is 0.0.*do_sample=false"),
        (["How?"], {"top_p": 1.5}, "top_p is 1.5"),
        (["How?"], {"top_k": -1}, "top_k is -1"),
        (["How?", "How? " * 60], {}, "question of row 1: .* too many for the model's 64 positions"),
        (["How?"], {"max_new_tokens": 60}, "question of row 0: .* max_new_tokens 60 too many"),
    ],
)
def test_what_is_no_question_is_one_line(policy, asked, params, line):
    with pytest.raises((ValueError, mlflow.MlflowException), match=f"(?i){line}") as caught:
        policy.predict(asked, params=params)
    assert "\n" not in str(caught.value)


def test_a_score_is_the_trainings_own_by_every_loader(finished, served, reward):
    """The document with its eos, unpadded, by plain transformers: no sigmoid."""
    model = AutoModelForSequenceClassification.from_pretrained(finished / "artifacts/reward/model").eval()
    expected, words = [], tokenizer()
    for pair in zip(QUESTIONS, ANSWERS, strict=True):
        ids = words(document_text(*pair), split_special_tokens=True)["input_ids"] + [words.eos_token_id]
        expected.append(model(torch.tensor([ids])).logits.item())
    assert min(expected) < 0, "a sigmoid is never negative"
    frame = pd.DataFrame({"answer": ANSWERS, "question": QUESTIONS, "more": 1})
    assert reward.predict(frame) == pytest.approx(expected, abs=1e-5)
    assert reward.predict({"question": QUESTIONS, "answer": ANSWERS}) == pytest.approx(expected, abs=1e-5)
    assert reward.predict({"question": QUESTIONS[0], "answer": ANSWERS[0]}) == pytest.approx(expected[:1])
    documents = checks.documents_of(words, False, list(zip(QUESTIONS, ANSWERS, strict=True)))
    assert checks.training_scores(model, documents) == pytest.approx(expected, abs=1e-5)
    pipe = mlflow.transformers.load_model(str(served["reward"]))
    (score,) = pipe(document_text(QUESTIONS[0], ANSWERS[0]) + words.eos_token)
    assert score["score"] == pytest.approx(expected[0], abs=1e-5)


@pytest.mark.parametrize(
    ("frame", "line"),
    [
        (pd.DataFrame({"question": ["a", "b"], "answer": ["a", float("nan")]}), "answer of row 1: nan"),
        (pd.DataFrame({"question": ["a", " "], "answer": ["a", "b"]}), "question of row 1: ' '"),
        ({"question": ["a", "b"], "answer": ["c"]}, "2 questions and 1 answers"),
        ({"question": ["a"]}, "missing inputs"),
        (["a"], "missing inputs"),
    ],
)
def test_what_is_no_answer_is_one_line(reward, frame, line):
    with pytest.raises((ValueError, mlflow.MlflowException), match=line):
        reward.predict(frame)


def test_a_model_is_one_folder_of_weights_without_a_pickle(served, finished):
    for kind, place in served.items():
        names = sorted(path.name for path in place.rglob("*") if path.is_file())
        assert names.count("model.safetensors") == 1
        assert not any(name.endswith((".pkl", ".bin", ".pt")) or "LICENSE" in name for name in names)
        required = (place / "requirements.txt").read_text().split()
        assert [line.split("==")[0] for line in required] == ["mlflow", "torch", "transformers"]
        assert all("==" in line and "+" not in line for line in required)
        code = place / ("score.py" if kind == "reward" else "answer.py")
        assert code.read_text() == (recipe.SERVING / code.name).read_text()
        assert "import tasks" not in code.read_text() and "from tasks" not in code.read_text()
        loaded = mlflow.pyfunc.load_model(str(place))
        example, params = loaded.input_example, mlflow.models.Model.load(str(place))
        example = params.load_input_example(str(place)) if example is None else example
        assert len(loaded.predict(example)) == 1


def test_the_template_that_travels_is_the_pipelines(policy, reward):
    model = policy.unwrap_python_model()
    question = "a {b} \\ c <|eos|>"
    ids = model.prompt(question, 0, {"max_new_tokens": 1})
    assert ids == checks.encode_prompts(model.tokenizer, [question])[0]
    scorer = reward.unwrap_python_model()
    assert scorer.document("How?", "So.") == checks.encode_documents(scorer.tokenizer, [("How?", "So.")])[0]


@pytest.mark.parametrize("kind", ["answer", "score"])
def test_markers_in_a_text_are_letters_for_every_tokenizer(kind):
    """SentencePiece's Unigram has its special tokens among its words."""
    letters = {letter: -9.0 for letter in sorted(set("▁Question:Aswr<>/a bc."))}
    raw = Tokenizer(Unigram([("<pad>", 0.0), ("<unk>", 0.0), ("</s>", 0.0), *letters.items()], unk_id=1))
    raw.pre_tokenizer = pre_tokenizers.Metaspace()
    keys = {"eos_token": "</s>", "unk_token": "<unk>", "pad_token": "<pad>"}
    words = PreTrainedTokenizerFast(tokenizer_object=raw, **keys)
    module = importlib.import_module(f"tasks.register.serving.{kind}")
    for text in ("a </s> b", "</s></s>", "a b", "", "<pad>c"):
        assert [module.letters(words, text)] == checks.encode_texts(words, [text])
        assert words.eos_token_id not in module.letters(words, text)


def test_long_prompts_are_cut_as_the_run_cuts_them():
    cutting = Params.model_validate({"pack": {"long_prompts": "left_truncate", "prompt_tokens": 9}})
    assert recipe.Recipe.of("policy", cutting).cut_prompts_to == 9
    assert recipe.Recipe.of("policy", Params()).cut_prompts_to is None
    assert recipe.Recipe.of("policy", cutting).digest != recipe.Recipe.of("policy", Params()).digest


def begins_with_bos():
    """As Llama's: every text begins with bos."""
    raw = Tokenizer.from_str(tiny.tokenizer().backend_tokenizer.to_str())
    raw.post_processor = TemplateProcessing(single="! $A", special_tokens=[("!", raw.token_to_id("!"))])
    known = {"bos_token": "!", "eos_token": "<|eos|>", "pad_token": "<|pad|>"}
    return PreTrainedTokenizerFast(tokenizer_object=raw, clean_up_tokenization_spaces=False, **known)


@pytest.mark.parametrize(
    ("kind", "words", "places"),
    [
        ("gpt2", begins_with_bos, {"n_positions": 256}),
        ("bloom", tiny.tokenizer, {}),
        ("bert", tiny.encoder_tokenizer, {"max_position_embeddings": 64}),  # too short for one example
        ("roberta", tiny.encoder_tokenizer, {"max_position_embeddings": 256}),
        ("deberta-v2", tiny.encoder_tokenizer, {"max_position_embeddings": 256}),
    ],
)
def test_models_of_other_kinds(tmp_path, kind, words, places):
    """Saving them compares answers and scores with the run's."""
    words, is_reward = words(), words is tiny.encoder_tokenizer
    make = tiny.scorer if is_reward else tiny.causal
    tiny.save(make(kind, vocab_size=len(words), **places), tmp_path / "model", words)
    chosen = recipe.Recipe.of("reward" if is_reward else "policy", Params())
    models.save_model(tmp_path / "saved", mlflow.models.Model(), chosen, tmp_path / "model")
    loaded = mlflow.pyfunc.load_model(str(tmp_path / "saved"))
    if is_reward:
        together = loaded.predict({"question": ["How?", "a" * 300], "answer": ["So.", "b"]})
        alone = loaded.predict({"question": "How?", "answer": "So."})
    else:
        together, alone = (loaded.predict(asked, params=GREEDY) for asked in (["How?", "What is?"], "How?"))
    assert together[:1] == (pytest.approx(alone) if is_reward else alone)


def test_a_model_that_reads_texts_is_served_by_the_code_that_trained_it(tmp_path, stranger):
    """Moved, without our package and without the folder it came from: the run's own scores; one flavour."""
    words, folder = tiny.encoder_tokenizer(), tmp_path / "model"
    tiny.save(tiny.encoder(vocab_size=len(words)), folder, words)
    drawn = torch.randn(29 + 16, generator=torch.Generator().manual_seed(0)).tolist()
    (folder / HEAD).write_text(Head(5, 7, tuple(drawn[:29]), tuple(drawn[29:])).text())
    chosen = recipe.Recipe.of("reward", Params(reward={"way": "frozen_style", "base": "x"}))
    assert chosen.digest != recipe.Recipe.of("reward", Params()).digest
    made = mlflow.models.Model()
    models.save_model(tmp_path / "saved", made, chosen, folder)
    wanted = load_frozen_style(folder, words).scores(QUESTIONS, ANSWERS).tolist()
    folder.rename(tmp_path / "elsewhere")
    (tmp_path / "saved").rename(tmp_path / "moved")
    assert "transformers" not in made.flavors
    assert str(tmp_path) not in (tmp_path / "moved/MLmodel").read_text()
    code = f"""
import json, mlflow
model = mlflow.pyfunc.load_model({str(tmp_path / "moved")!r})
print(json.dumps(list(model.predict({{"question": {QUESTIONS!r}, "answer": {ANSWERS!r}}}))))
"""
    said = stranger("-c", code, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL).communicate()[0]
    assert json.loads(said.splitlines()[-1]) == pytest.approx(wanted, abs=1e-5)


def test_what_reads_texts_otherwise_is_not_registered(tmp_path, monkeypatch):
    words = tiny.encoder_tokenizer()
    tiny.save(tiny.encoder(vocab_size=len(words)), tmp_path / "model", words)
    (tmp_path / "model" / HEAD).write_text(Head(5, 7, (0.0,) * 29, (1.0,) * 16).text())
    chosen = recipe.Recipe.of("reward", Params(reward={"way": "frozen_style", "base": "x"}))
    monkeypatch.setattr(FrozenStyle, "scores", lambda *_: torch.tensor([9.0, 9.0]))
    with pytest.raises(ValueError, match=r"mlflow\.pyfunc gives a score of .*run 9"):
        models.save_model(tmp_path / "saved", mlflow.models.Model(), chosen, tmp_path / "model")


def test_a_model_that_says_something_else_is_not_registered(layout, monkeypatch):
    from tasks import register

    monkeypatch.setattr(checks, "training_scores", lambda *_: [9.0, 9.0])
    with pytest.raises(ValueError, match=r"artifacts/reward/model: mlflow\.pyfunc gives a score of .*run 9"):
        register.run(Params(), layout)
    names = {model.name for model in tracking.connect(layout).search_registered_models()}
    assert names == {"stackrl-sft"}
    monkeypatch.undo()
    monkeypatch.chdir(layout.root)
    monkeypatch.setattr(checks, "greedy_answers", lambda *_: ["no", "no"])
    with pytest.raises(ValueError, match=r"to 'What .*' mlflow\.pyfunc answers .*, the run 'no'"):
        register.run(Params(), layout)


CONSUMER = """
import json, sys
for name in ("accelerate", "peft", "datasets", "dvc", "prefect"): sys.modules[name] = None  # not required
import mlflow
mlflow.set_tracking_uri(sys.argv[1])
policy = mlflow.pyfunc.load_model("models:/stackrl-policy@champion")
reward = mlflow.pyfunc.load_model("models:/stackrl-reward@champion")
pipe = mlflow.transformers.load_model("models:/stackrl-sft@candidate")
said = policy.predict(["How?"], params={"do_sample": False})
score = reward.predict({"question": ["How?"], "answer": ["So."]})
plain = pipe("Question: How?\\n\\nAnswer:", max_new_tokens=5, do_sample=False)[0]["generated_text"]
print("RESULT", json.dumps([said, score, plain]))
"""


@pytest.mark.slow
def test_a_stranger_loads_by_alias(registered, stranger):
    uri = tracking.tracking_uri(registered)
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    printed, complaint = stranger("-c", CONSUMER, uri, **pipes).communicate()
    assert "RESULT " in printed, complaint[-3000:]
    said, score, plain = json.loads(printed.split("RESULT ", 1)[1])
    ours = mlflow.pyfunc.load_model(str(registered.home / next_place(registered, "stackrl-policy")))
    assert said == ours.predict(["How?"], params=GREEDY) and len(score) == 1
    assert plain.startswith("Question: How?\n\nAnswer:") and len(plain) > len("Question: How?\n\nAnswer:")


def next_place(layout, name):
    return holdings.local_folder(holdings.in_file(layout.home / "mlflow.db", [name])[name].versions[0].place)


def post(port, body):
    """Status and body of a POST to /invocations."""
    headers, url = {"Content-Type": "application/json"}, f"http://127.0.0.1:{port}/invocations"
    request = urllib.request.Request(url, json.dumps(body).encode(), headers)
    try:
        with urllib.request.urlopen(request) as answer:
            return answer.status, json.loads(answer.read())
    except urllib.error.HTTPError as error:
        return error.code, json.loads(error.read())


@pytest.mark.slow
def test_a_stranger_serves_and_posts(registered, stranger, tmp_path):
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    place = next_place(registered, "stackrl-policy")
    words = ["-m", "mlflow", "models", "serve", "-m", str(place), "--env-manager", "local"]
    with (tmp_path / "serve.log").open("wb") as log:
        server = stranger(
            *words, "--port", str(port), "--workers", "1", stdout=log, stderr=log, start_new_session=True
        )
    try:
        deadline = time.monotonic() + 180
        while True:
            try:
                urllib.request.urlopen(f"http://127.0.0.1:{port}/ping", timeout=2).close()
                break
            except OSError:
                said = (tmp_path / "serve.log").read_text()
                assert server.poll() is None and time.monotonic() < deadline, said
                time.sleep(0.2)
        asked = {"inputs": QUESTIONS, "params": {"do_sample": False, "max_new_tokens": 6}}
        expected = mlflow.pyfunc.load_model(str(place)).predict(QUESTIONS, params=asked["params"])
        assert post(port, asked) == (200, {"predictions": expected})
        split = {"dataframe_split": {"columns": ["question"], "data": [[text] for text in QUESTIONS]}}
        assert post(port, {**split, "params": asked["params"]}) == (200, {"predictions": expected})
        status, said = post(port, {"inputs": ["How?"], "params": {"max_new_tokens": "six"}})
        assert status == 400 and "max_new_tokens" in json.dumps(said)
        example = json.loads((place / "serving_input_example.json").read_text())
        assert post(port, example)[0] == 200
    finally:
        os.killpg(server.pid, signal.SIGTERM)
        server.wait(30)

import hashlib
import json
import os
import subprocess
import sys
from functools import cache
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import yaml
from transformers import LlamaConfig, LlamaForCausalLM, LlamaForSequenceClassification

from params.schema import Params
from tasks import register
from tasks.lm.loading import save_model, train_tokenizer
from tasks.register import IDENTITY, folder_md5, main, promote, run
from tasks.run import tracking
from tasks.run.files import write_json
from tasks.run.layout import Layout

NAMES = ("stackrl-sft", "stackrl-reward", "stackrl-policy")
DATA = {"artifacts/data/sft.parquet": "d1" * 16, "artifacts/pack/tokenizer": "70" * 16 + ".dir"}


@cache
def tokenizer():
    return train_tokenizer(["Question: What is 1 + 2?\n\nAnswer: It is 3."] * 3, 300)


def write_model(folder, kind, seed):
    torch.manual_seed(seed)
    words = tokenizer()
    config = LlamaConfig(
        vocab_size=len(words), hidden_size=16, intermediate_size=24, num_hidden_layers=2,
        num_attention_heads=2, max_position_embeddings=64, pad_token_id=words.pad_token_id,
        eos_token_id=words.eos_token_id, bos_token_id=None, num_labels=1,
    )  # fmt: skip
    auto = LlamaForSequenceClassification if kind == "reward" else LlamaForCausalLM
    folder.mkdir(parents=True, exist_ok=True)
    save_model(auto(config).eval(), words, folder)


def write_lock(root, ppo="90"):
    """As DVC writes it, as far as register reads it; md5s by hand, so that a test can change one."""
    md5s = {"sft": "5f", "reward": "4e", "ppo": ppo}
    models = {f"artifacts/{stage}/model": md5 * 16 + ".dir" for stage, md5 in md5s.items()}
    outs = {path.split("/")[1]: [] for path in DATA | models}
    for path, md5 in (DATA | models).items():
        outs[path.split("/")[1]].append({"path": path, "hash": "md5", "md5": md5})
    stages = {stage: {"cmd": f"python -m tasks {stage}", "outs": each} for stage, each in outs.items()}
    (root / "dvc.lock").write_text(yaml.safe_dump({"schema": "2.0", "stages": stages}))


@pytest.fixture(scope="module")
def template(tmp_path_factory):
    root = tmp_path_factory.mktemp("template")
    for seed, stage in enumerate(("sft", "reward", "ppo")):
        write_model(root / f"artifacts/{stage}/model", stage, seed)
    (root / "dvc.yaml").write_text("stages: {register: {cmd: x, deps: [], params: [register], outs: []}}\n")
    (root / "params.yaml").write_text(yaml.safe_dump(Params().model_dump(mode="json")))
    write_json(root / "artifacts/reward_eval/metrics.json", {"accuracy": 0.85})
    write_lock(root)
    tracking.connect(Layout(root, root))  # an empty store
    return root


@pytest.fixture
def layout(tmp_path, monkeypatch, template):
    for name in ("MLFLOW_TRACKING_URI", "RANK", "DVC_ROOT", tracking.PARENT_VARIABLE):
        monkeypatch.delenv(name, raising=False)
    root = tmp_path / "repository"
    subprocess.run(["cp", "-r", template, root], check=True)
    monkeypatch.chdir(root)
    return Layout.here()


def win(layout, low):
    write_json(layout.artifact("policy_eval", "metrics.json"), {"win_rate": 0.7, "win_rate_low": low})


def registry(layout):
    """name -> {version: md5} and name -> {alias: version}."""
    client = tracking.connect(layout)
    found = {name: client.search_model_versions(f"name='{name}'") for name in NAMES}
    versions = {name: {one.version: one.tags[IDENTITY] for one in each} for name, each in found.items()}
    return versions, {name: dict(client.get_registered_model(name).aliases) for name in NAMES}


def test_registering_twice_leaves_one_version_of_each(layout):
    win(layout, 0.55)
    assert missing(layout, "stackrl") is False  # never registered: DVC runs the stage by itself
    result = run(Params(), layout)
    first = layout.artifact("register", "registered.json").read_text()
    assert json.loads(first) == {n: m * 16 + ".dir" for n, m in zip(NAMES, ("5f", "4e", "90"), strict=True)}
    assert result.metrics == {"models": 3.0, "beats_sft": 1.0}
    run(Params(), layout)
    versions, aliases = registry(layout)
    assert versions == {name: {1: md5} for name, md5 in json.loads(first).items()}
    assert aliases == {name: {"candidate": 1, "champion": 1} for name in NAMES}
    assert layout.artifact("register", "registered.json").read_text() == first
    assert "MLFLOW_TRACKING_URI" not in os.environ


def test_new_weights_are_a_second_version_and_the_champion_stays(layout):
    win(layout, 0.55)
    run(Params(), layout)
    write_lock(layout.root, ppo="91")
    run(Params(), layout)
    versions, aliases = registry(layout)
    assert versions["stackrl-policy"] == {1: "90" * 16 + ".dir", 2: "91" * 16 + ".dir"}
    assert aliases["stackrl-policy"] == {"candidate": 2, "champion": 1}
    assert aliases["stackrl-sft"] == aliases["stackrl-reward"] == {"candidate": 1, "champion": 1}
    write_lock(layout.root, ppo="90")
    run(Params(), layout)  # back to the first: no third version
    versions, aliases = registry(layout)
    assert list(versions["stackrl-policy"]) == [2, 1]
    assert aliases["stackrl-policy"] == {"candidate": 1, "champion": 1}


@pytest.mark.parametrize("low", [None, 0.5, 0.2])
def test_a_policy_that_does_not_beat_sft_is_no_champion_until_promoted(layout, low, capsys):
    if low is not None:
        win(layout, low)
    assert run(Params(), layout).metrics["beats_sft"] == 0.0
    assert registry(layout)[1] == {name: {"candidate": 1} for name in NAMES}
    assert main(["promote", "stackrl-policy", "1"]) == 0
    assert registry(layout)[1]["stackrl-policy"] == {"candidate": 1, "champion": 1}
    assert main(["promote", "stackrl-policy", "9"]) == 1
    assert "stackrl-policy 9" in capsys.readouterr().err.splitlines()[-1]
    with pytest.raises(ValueError, match="nobody 1"):
        promote(layout, "nobody", "1")


def test_a_version_says_what_it_was_made_from(layout):
    win(layout, 0.25)
    author = ["-c", "user.name=n", "-c", "user.email=e"]
    for words in (["init", "-q"], [*author, "commit", "-qm", "x", "--allow-empty"]):
        subprocess.run(["git", *words], check=True)
    run(Params(), layout)
    client = tracking.connect(layout)
    version = client.get_model_version_by_alias("stackrl-policy", "candidate")
    tags = version.tags
    assert tags[IDENTITY] == "90" * 16 + ".dir" and len(tags["mlflow.source.git.commit"]) == 40
    assert tags["stackrl.git.dirty"] == "true"  # params.yaml is not committed
    assert {f"dvc.{path}": md5 for path, md5 in DATA.items()}.items() <= tags.items()
    assert (
        tags["params.ppo.init_kl_coef"] == str(Params().ppo.init_kl_coef) and tags["params.model.base"] == ""
    )
    assert tags["reward_eval.accuracy"] == "0.85" and tags["policy_eval.win_rate_low"] == "0.25"
    assert "Question: " in version.description
    names = {item.path for item in client.list_artifacts(version.run_id)}
    assert {"params.yaml", "dvc.yaml", "dvc.lock"} <= names
    made_by = client.get_run(version.run_id)
    assert made_by.info.status == "FINISHED" and made_by.data.tags["stackrl.stage"] == "register"
    inputs = {one.dataset.name: one.dataset.digest for one in made_by.inputs.dataset_inputs}
    assert inputs == {Path(path).name: md5 for path, md5 in DATA.items()}


def test_a_lost_registry_is_noticed(layout):
    run(Params(), layout)
    assert missing(layout, "stackrl") is False and missing(layout, "other") is True
    client = tracking.connect(layout)
    client.delete_model_version("stackrl-reward", "1")
    assert missing(layout, "stackrl") is True


def test_a_version_whose_upload_failed_does_not_count():
    def version(number, status, md5="a"):
        return SimpleNamespace(version=str(number), status=status, tags={IDENTITY: md5})

    states = ((2, "READY"), (10, "READY"), (11, "FAILED_REGISTRATION"))
    found = [version(*each) for each in states] + [version(12, "READY", "b")]
    client = SimpleNamespace(search_model_versions=lambda _: found)
    assert version_of(client, "any", "a") == "10" and version_of(client, "any", "c") is None


def test_a_failure_in_the_middle_is_mended_by_the_next_run(layout, monkeypatch):
    calls, log = [], register._log_version

    def fail_at_the_second(*arguments):
        calls.append(arguments)
        if len(calls) == 2:
            raise OSError("killed")
        log(*arguments)

    with monkeypatch.context() as patch, pytest.raises(OSError, match="killed"):
        patch.setattr(register, "_log_version", fail_at_the_second)
        run(Params(), layout)
    assert not layout.artifact("register", "registered.json").exists()
    run(Params(), layout)
    assert [list(versions) for versions in registry(layout)[0].values()] == [[1], [1], [1]]


def test_a_missing_model_is_named(layout):
    (layout.artifact("ppo", "model") / "config.json").unlink()
    with pytest.raises(ValueError, match="artifacts/ppo/model holds no model"):
        run(Params(), layout)


def test_outside_dvc_the_folder_has_the_md5_that_dvc_would_give_it(layout):
    for name, text in {"b.txt": "b\n", "a/c.txt": "c\n", "a.txt": ""}.items():
        (layout.root / "folder" / name).parent.mkdir(parents=True, exist_ok=True)
        (layout.root / "folder" / name).write_text(text)
    subprocess.run(["git", "init", "-q"], check=True)
    for words in (["init", "-q"], ["add", "-q", "folder"]):
        subprocess.run([sys.executable, "-m", "dvc", *words], check=True)
    expected = yaml.safe_load((layout.root / "folder.dvc").read_text())["outs"][0]["md5"]
    assert folder_md5(layout.root / "folder") == expected
    (layout.root / "dvc.lock").unlink()
    run(Params(), layout)
    found = json.loads(layout.artifact("register", "registered.json").read_text())
    assert found["stackrl-sft"] == folder_md5(layout.artifact("sft", "model"))
    assert len({hashlib.md5(md5.encode()).hexdigest() for md5 in found.values()}) == 3


CONSUMER = """
import json, sys
class Ours:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in ("tasks", "params", "flows"):
            raise ModuleNotFoundError(name)
sys.meta_path.insert(0, Ours())
try:
    import tasks
except ModuleNotFoundError:
    pass
else:
    raise SystemExit("tasks can be imported")
import mlflow
mlflow.set_tracking_uri(sys.argv[1])
prompt = "Question: What is 1 + 2?\\n\\nAnswer:"
pipe = mlflow.transformers.load_model("models:/stackrl-policy@champion")
generated = pipe(prompt, max_new_tokens=5, do_sample=False)[0]["generated_text"]
served = mlflow.pyfunc.load_model("models:/stackrl-policy@champion").predict([prompt])
scores = mlflow.pyfunc.load_model("models:/stackrl-reward@candidate").predict([prompt, prompt + " It is 3."])
print("RESULT", json.dumps([generated, list(served), scores["score"].tolist()]))
"""


def test_a_consumer_without_our_package_generates_and_scores(layout, tmp_path):
    win(layout, 0.55)
    run(Params(), layout)
    away = tmp_path / "away"
    away.mkdir()
    uri = tracking.tracking_uri(layout)
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "MLFLOW_DISABLE_TELEMETRY": "true"}
    command = [sys.executable, "-I", "-c", CONSUMER, uri]
    done = subprocess.run(command, cwd=away, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    generated, served, scores = json.loads(done.stdout.split("RESULT ", 1)[1])
    prompt = "Question: What is 1 + 2?\n\nAnswer:"
    assert generated.startswith(prompt) and len(generated) > len(prompt)
    assert len(served) == 1 and isinstance(served[0], str)
    model = LlamaForSequenceClassification.from_pretrained(layout.artifact("reward", "model"))
    with torch.no_grad():
        rows = [tokenizer()(text, return_tensors="pt") for text in (prompt, prompt + " It is 3.")]
        raw = [model(**row).logits.item() for row in rows]
    assert scores == pytest.approx(raw, abs=1e-6) and min(raw) < 0  # a sigmoid is never negative

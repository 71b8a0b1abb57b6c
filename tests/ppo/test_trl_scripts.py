"""Scripts written for TRL 0.11 run here when their imports are changed, and nothing else.

They use what TRL's examples use: the sentiment notebook, `ppo.py`, `ppo_multi_adapter.py`, and StackLLaMA's
`rl_training.py`. Where STACKRL_PPO_PEER_PYTHON names a python with trl==0.11.4, the same files run there as
they stand, which shows that they are scripts of TRL's.
"""

from __future__ import annotations

import json
import os
import re
import runpy
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import adapted
import pytest
import tiny
import torch
from safetensors.torch import load_file
from seq2seq_models import model_of
from transformers import AutoModelForCausalLM

from tasks.ppo import PPOTrainer

PEER = os.environ.get("STACKRL_PPO_PEER_PYTHON")
SCRIPTS = Path(__file__).parent / "scripts"
MOVES = {  # a name of TRL's -> where it is here
    "AutoModelForCausalLMWithValueHead": "tasks.lm", "AutoModelForSeq2SeqLMWithValueHead": "tasks.lm",
    "PPOConfig": "tasks.ppo", "PPOTrainer": "tasks.ppo", "LengthSampler": "tasks.ppo",
    "set_seed": "tasks.ppo",
}  # fmt: skip
TEXTS = [f"The film number {n} was {'good' if n % 2 else 'bad'}, I say" for n in range(10)]


def rewritten(name: str) -> str:
    """A script with other imports."""

    def moved(line: re.Match) -> str:
        return "\n".join(f"from {MOVES[n.strip()]} import {n.strip()}" for n in line[1].split(","))

    text = (SCRIPTS / f"{name}.py").read_text(encoding="utf-8")
    found = re.sub(r"^from trl[.\w]* import (.+)$", moved, text, flags=re.MULTILINE)
    assert not re.search(r"^\s*(from|import) trl", found, flags=re.MULTILINE)
    return found


def saved(model, folder: Path, tokenizer) -> Path:
    """A folder that transformers 4 and 5 read alike."""
    tiny.save(model, folder, tokenizer)
    path = folder / "tokenizer_config.json"
    config = json.loads(path.read_text()) | {"tokenizer_class": "PreTrainedTokenizerFast"}
    config |= {"model_input_names": ["input_ids", "attention_mask"]}
    unknown = "backend", "extra_special_tokens"
    path.write_text(json.dumps({k: v for k, v in config.items() if k not in unknown}))
    return folder


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    root, known, encoded = tmp_path_factory.mktemp("scripts"), tiny.tokenizer(), tiny.encoder_tokenizer()
    keys = {"vocab_size": len(known), "max_position_embeddings": 128}
    names = {0: "NEGATIVE", 1: "POSITIVE"}
    labels = {"num_labels": 2, "id2label": names, "label2id": {name: n for n, name in names.items()}}
    made = {
        "gpt2": (tiny.causal("gpt2", vocab_size=len(known), n_positions=128), known),
        "llama": (tiny.causal("llama", **keys), known),
        "t5": (model_of("t5", vocab_size=len(known)), known),
        "classifier": (
            tiny.scorer("distilbert", vocab_size=len(encoded), **labels, max_position_embeddings=256),
            encoded,
        ),
        "reward": (tiny.scorer("llama", **keys, num_labels=1), known),
    }  # fmt: skip
    found = {name: saved(model, root / name, tokenizer) for name, (model, tokenizer) in made.items()}
    adapted.saved_scorer(root / "adapter", found["llama"], num_labels=2)
    lines = [json.dumps({"text": t, "question": t}) + "\n" for t in TEXTS]
    (root / "texts.jsonl").write_text("".join(lines))
    return SimpleNamespace(root=root, texts=root / "texts.jsonl", adapter=root / "adapter", **found)


def arguments(name: str, files, result: Path) -> list[str]:
    """Of each script and case."""
    sentiment = ["--query_dataset", files.texts, "--reward_model", f"sentiment-analysis:{files.classifier}"]
    small = ["--batch_size", "4", "--mini_batch_size", "2", "--ppo_epochs", "2", "--learning_rate", "1e-3"]
    stack = [
        "--model_name",
        files.llama,
        "--tokenizer_name",
        files.llama,
        "--reward_model_name",
        files.reward,
    ]
    stack += ["--questions", files.texts, "--output_dir", f"{result}/", "--save_freq", "1"]
    one_base = ["--model_name", files.llama, "--dataset_name", files.texts, "--rm_adapter", files.adapter]
    asked = {
        "sentiment_notebook": [files.gpt2, files.classifier, files.texts, result],
        "command_line": ["--model_name", files.gpt2, *sentiment, *small, "--tracker_project_name", "mine"],
        "command_line seq2seq": ["--model_name", files.t5, *sentiment, *small, "--use_seq2seq"],
        "command_line peft": ["--model_name", files.llama, *sentiment, *small, "--use_peft", "--lora_r", "4"],
        "one_base": [*one_base, "--use_safetensors", "True", "--score_clip", "3.0"],
        "stack_exchange": [*stack, "--reward_baseline", "0.5"],
        "stack_exchange adafactor": [*stack, "--adafactor", "True", "--early_stopping", "True"],
    }
    return [str(each) for each in asked[name]]


CASES = [
    "sentiment_notebook", "command_line", "command_line seq2seq", "command_line peft", "one_base",
    "stack_exchange", "stack_exchange adafactor",
]  # fmt: skip


@pytest.mark.parametrize("name", CASES)
def test_a_script_of_trls_runs_with_other_imports(name, files, tmp_path, monkeypatch):
    updates = []
    step = PPOTrainer.step

    def noted(self, *given):
        updates.append(step(self, *given))
        return updates[-1]

    monkeypatch.setattr(PPOTrainer, "step", noted)
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    script = tmp_path / "script.py"
    script.write_text(rewritten(name.split()[0]), encoding="utf-8")
    monkeypatch.setattr(sys, "argv", [str(script), *arguments(name, files, tmp_path / "result")])
    known = runpy.run_path(str(script), run_name="__main__")
    assert len(updates) == 2, "ten texts make two batches of four"
    assert all(abs(stats["ppo/mean_scores"]) < 100 and stats["ppo/steps_skipped"] == 0 for stats in updates)
    if name == "sentiment_notebook":
        plain = AutoModelForCausalLM.from_pretrained(tmp_path / "result")
        weights = known["model"].pretrained_model.state_dict()
        assert all(torch.equal(value, weights[n]) for n, value in plain.state_dict().items())
    if name.startswith("stack_exchange"):
        weights = load_file(tmp_path / "result" / "step_1" / "adapter_model.safetensors")
        assert weights and any(value.any() for key, value in weights.items() if "lora_B" in key)


def test_the_default_of_use_safetensors_reads_no_pickle(files, tmp_path, monkeypatch, caplog):
    """TRL's script says use_safetensors=False; safetensors are read all the same."""
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    script = tmp_path / "script.py"
    script.write_text(rewritten("one_base"), encoding="utf-8")
    given = arguments("one_base", files, tmp_path)[:6]
    monkeypatch.setattr(sys, "argv", [str(script), *given])
    runpy.run_path(str(script), run_name="__main__")
    assert "a pickle never is" in caplog.text


@pytest.mark.slow
@pytest.mark.skipif(PEER is None, reason="STACKRL_PPO_PEER_PYTHON names no python with trl==0.11.4")
@pytest.mark.parametrize("name", CASES)
def test_the_script_is_one_of_trls(name, files, tmp_path):
    given = arguments(name, files, tmp_path / "out")
    command = [PEER, "-W", "ignore", SCRIPTS / f"{name.split()[0]}.py", *given]
    quiet = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"} | {"HF_DATASETS_CACHE": str(tmp_path)}
    done = subprocess.run(command, capture_output=True, text=True, env=quiet)
    assert done.returncode == 0 and "step:" in done.stdout, done.stderr[-3000:]

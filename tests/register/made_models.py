"""Three tiny models as a finished run leaves them, and what the registry says of them."""

from functools import cache

import torch
import yaml
from transformers import LlamaConfig, LlamaForCausalLM, LlamaForSequenceClassification

from tasks.lm.model.loading import save_model, train_tokenizer
from tasks.register import IDENTITY
from tasks.run import tracking
from tasks.run.files import write_json

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


def judged(layout, *against):
    """policy_eval's verdict: a champion, unless something speaks against it."""
    metrics = {"win_rate_low": 0.6, "champion": float(not against)}
    write_json(layout.artifact("policy_eval", "metrics.json"), metrics)
    said = {"is_champion": not against, "reasons": list(against or ["the monitor found nothing", "right"])}
    write_json(layout.artifact("policy_eval", "card.json"), {"champion": said})


def registry(layout):
    """name -> {version: md5} and name -> {alias: version}."""
    client = tracking.connect(layout)
    found = {name: client.search_model_versions(f"name='{name}'") for name in NAMES}
    versions = {name: {one.version: one.tags[IDENTITY] for one in each} for name, each in found.items()}
    return versions, {name: dict(client.get_registered_model(name).aliases) for name in NAMES}

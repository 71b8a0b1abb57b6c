"""The same rows through TRL's RewardTrainer: the same loss. Needs STACKRL_PEER_PYTHON, a python with trl."""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path

import pytest
import tiny
from made_rewards import chat_tokenizer, trainer

PEER = os.environ.get("STACKRL_PEER_PYTHON")
SCRIPT = Path(__file__).parents[1] / "benchmarks" / "peer_trl.py"


def turns(*contents: str) -> list[dict[str, str]]:
    return [{"role": ("user", "assistant")[i % 2], "content": c} for i, c in enumerate(contents)]


SUMS = [("What is 2 + 3?", "It is 5.", "It is 6, I think."), ("And 1 + 1?", "2", "It is `3`."),
        ("What is 4 + 0?", "Four.", "Four"), ("Why?", "<|eos|>", "Because 1 + 2 is 3.<|eos|>")]  # fmt: skip
ROWS = {
    "prompt": [{"prompt": q, "chosen": f" {a}", "rejected": f" {b}"} for q, a, b in SUMS],
    "no prompt": [{"chosen": f"{q} {a}", "rejected": f"{q} {b}"} for q, a, b in SUMS],
    "conversation": [
        {"prompt": turns(q), "chosen": turns(q, a)[1:], "rejected": turns(q, b)[1:]} for q, a, b in SUMS
    ],
    "whole conversation": [{"chosen": turns(q, a), "rejected": turns(q, b)} for q, a, b in SUMS],
    "token ids": [
        {"chosen_ids": a + b, "rejected_ids": a + c, "margin": 0.5 * i}
        for i, (a, b, c) in enumerate([tiny.drawn((6, 3, 5), 1), tiny.drawn((2, 8, 1), 2)] * 2)
    ],
}


@pytest.mark.slow
@pytest.mark.skipif(PEER is None, reason="STACKRL_PEER_PYTHON names no python with trl")
@pytest.mark.parametrize(
    ("kind", "options"), [*((kind, {}) for kind in ROWS), ("prompt", {"center_rewards_coefficient": 0.01})]
)
def test_the_loss_is_that_of_trl(tmp_path, kind, options):
    rows, model = ROWS[kind], tiny.scorer(vocab_size=330)
    model.save_pretrained(tmp_path / "reward")
    chat_tokenizer().save_pretrained(tmp_path / "tokenizer")
    (tmp_path / "reward.json").write_text(json.dumps(rows))
    settings = {"per_device_train_batch_size": 4, "max_steps": 2, "gradient_checkpointing": False, **options}
    command = [PEER, str(SCRIPT), "reward", str(tmp_path), json.dumps(settings)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]
    wanted = json.loads(done.stdout.splitlines()[-1])["loss"]
    own = options | ({"margin": 1.0} if kind == "token ids" else {})
    made = trainer(tmp_path, model=model, train=rows, tokenizer=chat_tokenizer(), **own)
    (part,) = made.data_collator(made.train_dataset)["parts"]
    loss = made.compute_loss(made.model, part).item()
    assert loss == pytest.approx(wanted, rel=1e-5)

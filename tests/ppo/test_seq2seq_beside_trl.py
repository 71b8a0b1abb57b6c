"""PPOTrainer on T5 beside that of TRL 0.11.4, which trains all of a response but its first token.

Needs STACKRL_PPO_PEER_PYTHON, a python with trl==0.11.4 (see tests/ppo/test_beside_trl.py). TRL's responses
begin with the start token. Where ours mask their first token, the update is TRL's.
"""

from __future__ import annotations

import json
import os
import runpy
import subprocess
from pathlib import Path
from types import SimpleNamespace

import pytest
import tiny
import torch
from safetensors.torch import load_file, save_file

from tasks.lm import AutoModelForSeq2SeqLMWithValueHead
from tasks.ppo import PPOConfig, PPOTrainer

PEER = os.environ.get("STACKRL_PPO_PEER_PYTHON")
SCRIPT = Path(__file__).parents[1] / "benchmarks" / "peer_ppo.py"
OURS = SimpleNamespace(
    AutoModelForSeq2SeqLMWithValueHead=AutoModelForSeq2SeqLMWithValueHead,
    PPOConfig=PPOConfig,
    PPOTrainer=PPOTrainer,
)
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(PEER is None, reason="STACKRL_PPO_PEER_PYTHON names no python with trl==0.11.4"),
]
CONFIG = {"batch_size": 8, "mini_batch_size": 4, "ppo_epochs": 2, "learning_rate": 1e-3, "init_kl_coef": 0.1}
SPECIAL = {"vocab_size": 32, "pad_token_id": tiny.PAD, "eos_token_id": tiny.EOS}
MODELS = {
    "t5": {"model_type": "t5", **tiny.T5, **SPECIAL, "dropout_rate": 0.0},
    "bart": {"model_type": "bart", **tiny.BART, **SPECIAL, **tiny.NO_DROPOUT},
}
STARTS = {"t5": tiny.PAD, "bart": tiny.EOS}
TOLD = (
    "objective/kl", "objective/entropy", "ppo/mean_non_score_reward", "ppo/mean_scores", "ppo/std_scores",
    "ppo/loss/policy", "ppo/loss/value", "ppo/loss/total", "ppo/policy/approxkl", "ppo/policy/policykl",
    "ppo/policy/clipfrac", "ppo/policy/advantages_mean", "ppo/policy/entropy", "ppo/returns/mean",
    "ppo/val/vpred", "ppo/val/error", "ppo/val/clipfrac", "ppo/val/mean", "ppo/learning_rate",
)  # fmt: skip


def step(model: str, masks_first: bool = True, least: int = 2, seed: int = 11) -> dict:
    """Of this seed KL to the reference is positive; right of the shortest response TRL sees padding."""
    draw = torch.Generator().manual_seed(seed)
    lengths = [torch.randint(low, most, (8,), generator=draw).tolist() for low, most in ((1, 9), (least, 7))]
    queries, responses = (tiny.drawn(each, seed + i) for i, each in enumerate(lengths, 1))
    action = {"queries": queries, "responses": responses, "scores": torch.randn(8, generator=draw).tolist()}
    if masks_first:
        action["masks"] = [[0] + [1] * (len(row) - 1) for row in responses]
    return action | {"peer_responses": [[STARTS[model], *row] for row in responses]}


def case(*actions: dict, model: str = "t5", **keys) -> dict:
    found = {"weights": f"{model}-policy", "reference": f"{model}-reference", "padding": "right"}
    found |= {"seq2seq": True, "model": MODELS[model], "config": CONFIG | keys}
    return found | {"actions": actions or [step(model)]}


ENDS = step("t5", masks_first=False) | {"responses": [[tiny.EOS]] * 8, "peer_responses": [[0, tiny.EOS]] * 8}
AGREE = {
    "t5": case(), "bart": case(model="bart"), "four epochs": case(ppo_epochs=4),
    "three steps, adaptive KL": case(*(step("t5", seed=s) for s in (11, 12, 14)), target=0.5, horizon=50),
    "gamma, lambda, narrow clipping": case(gamma=0.9, lam=0.6, cliprange=0.02, cliprange_value=0.03),
    "the whole KL": case(kl_penalty="full"),
}  # fmt: skip
CASES = AGREE | {"unmasked": case(step("t5", masks_first=False)), "[start, eos]": case(ENDS)}


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Of every case what it is, the start, and what both found and where they came."""
    play, folder = runpy.run_path(str(SCRIPT))["play"], tmp_path_factory.mktemp("seq2seq")
    for kind in MODELS:
        draw = torch.Generator().manual_seed(5)
        head = {"v_head.summary.weight": 0.3 * torch.randn(1, 16, generator=draw),
                "v_head.summary.bias": torch.tensor([0.1])}  # fmt: skip
        policy = {n: w.clone() for n, w in tiny.seq2seq(kind, **tiny.NO_DROPOUT).state_dict().items()}
        noise: dict[int, torch.Tensor] = {}  # of tied weights it is one
        near = {n: w * (1 + 0.05 * noise.setdefault(w.shape, torch.randn(w.shape, generator=draw)))
                for n, w in policy.items()}  # fmt: skip
        save_file(policy | head, folder / f"{kind}-policy.safetensors")
        save_file(near | head, folder / f"{kind}-reference.safetensors")

    def read(name: str):
        found = json.loads((folder / f"{name}.found.json").read_text())
        return found, load_file(folder / f"{name}.found.safetensors")

    files, ours = {name: f"{number}" for number, name in enumerate(CASES)}, {}
    for name, file in files.items():
        (folder / f"{file}.json").write_text(json.dumps(CASES[name]))
        play(folder, file, OURS)
        ours[name] = read(file)
    done = subprocess.run(
        [PEER, SCRIPT, folder, *files.values()], capture_output=True, text=True, timeout=600
    )
    assert done.returncode == 0, done.stderr[-2000:]
    starts = {name: load_file(folder / f"{CASES[name]['weights']}.safetensors") for name in CASES}
    return {name: (starts[name], ours[name], read(file)) for name, file in files.items()}


def far_weights(start, ours, trl) -> float:
    assert ours.keys() == trl.keys() == start.keys()
    names = [name for name in start if "k_proj.bias" not in name]  # whose gradient is 0
    way, other = (torch.cat([(w[n] - start[n]).double().flatten() for n in names]) for w in (ours, trl))
    assert other.norm() > 0
    return float((way - other).norm() / other.norm())


@pytest.mark.parametrize("name", AGREE)
def test_the_numbers_are_those_of_trl(runs, name):
    start, (ours, own), (trl, other) = runs[name]
    assert ours["error"] is None and trl["error"] is None
    for found, wanted in zip(ours["actions"], trl["actions"], strict=True):
        assert tiny.far(found["norms"], wanted["norms"]) <= 1e-4
        for key in TOLD:
            assert found["stats"][key] == pytest.approx(wanted["stats"][key], rel=1e-4, abs=1e-6), key
    moved = far_weights(start, own, other)
    print(f"{name}: weights {moved:.1e}")
    assert moved <= 1e-4


def test_the_first_token_makes_the_difference(runs):
    """TRL's step of the same responses is the masked one; ours is another where nothing is masked."""
    start, (_, own), (_, other) = runs["unmasked"]
    assert far_weights(start, other, runs["t5"][2][1]) <= 1e-6
    assert far_weights(start, own, other) > 0.1


def test_a_response_that_ends_at_once(runs):
    """TRL has nothing to train there, and fails (trl#679)."""
    start, (ours, own), (trl, _) = runs["[start, eos]"]
    assert "IndexError" in trl["error"]
    assert ours["error"] is None and any(not torch.equal(own[name], start[name]) for name in start)

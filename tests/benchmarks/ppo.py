"""PPOTrainer beside TRL 0.11.4's, in one run: same weights, same prompts, same responses, same first losses.

    STACKRL_PPO_PEER_PYTHON=<python with trl==0.11.4> python tests/benchmarks/ppo.py [hydra] [onednn] [step]

LLaMA, 8 layers, 512 wide, vocabulary 32,000; prompts of 32 to 256 tokens, 48 new ones each, batch 16,
minibatch 4, 4 epochs, two threads; `hydra`: the first 6 layers are frozen and shared with the reference. TRL
in float32, at its default generation batch of 4 and told ours; ours in float32 and under bfloat16 autocast.
`rollouts` or `step`: these alone. Each in a process of its own, the first call excluded, medians of the
others; memory is the peak above the imports' own. Nothing is timed before the losses of a step agree.
"""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
import tempfile
from pathlib import Path
from statistics import median
from types import SimpleNamespace

import torch
from peer_ppo import play
from safetensors.torch import save_file
from transformers import AutoConfig, AutoModelForCausalLM

from tasks.lm import AutoModelForCausalLMWithValueHead
from tasks.lm.numerics.matmul import use_onednn_products
from tasks.ppo import PPOConfig, PPOTrainer
from tasks.run.devices import keep_freed_memory

MODEL = {
    "model_type": "llama", "hidden_size": 512, "intermediate_size": 1376, "num_hidden_layers": 8,
    "num_attention_heads": 8, "num_key_value_heads": 8, "vocab_size": 32000,
    "max_position_embeddings": 512, "pad_token_id": 0, "eos_token_id": 1, "bos_token_id": None,
}  # fmt: skip
CONFIG = {"batch_size": 16, "mini_batch_size": 4, "ppo_epochs": 4, "learning_rate": 1.41e-5}
SHORTEST, LONGEST, NEW = 32, 256, 48  # tokens
SHARED = {"hydra": {"num_shared_layers": 6}, "full": {}}  # further arguments of the trainer
ONEDNN = "STACKRL_BENCHMARK_ONEDNN"  # for the processes that are started
THREADS, DTYPES = 2, ("float32", "bfloat16")
ROLLOUTS, STEPS = 6, 3  # calls, the first of which is not timed
TOLERANCE = 1e-4
LOSSES = "ppo/loss/policy", "ppo/loss/value"


def trainer(config: PPOConfig, *args: object, **keys: object) -> PPOTrainer:
    """With the allocator of a stage, and its products under `machine.onednn` where that word is given."""
    keep_freed_memory()
    if config.dtype == "float32" and ONEDNN in os.environ:
        use_onednn_products()
    return PPOTrainer(config, *args, **keys)


def actions() -> dict[str, list[dict]]:
    """Calls of generate and of step; no token ends a response."""
    draw = random.Random(0)
    ids = lambda n: [draw.randrange(2, MODEL["vocab_size"]) for _ in range(n)]  # noqa: E731
    rows = CONFIG["batch_size"]
    prompts = [ids(draw.randint(SHORTEST, LONGEST)) for _ in range(rows)]
    keys = {"max_new_tokens": NEW, "do_sample": True, "top_k": 0, "top_p": 1.0, "eos_token_id": -1,
            "pad_token_id": MODEL["pad_token_id"], "return_prompt": False}  # fmt: skip
    scores = [draw.gauss(0, 1) for _ in prompts]
    step = {"queries": prompts, "responses": [], "scores": scores, "watch": False}
    return {
        "rollouts": [{"prompts": prompts, "keys": keys} for _ in range(ROLLOUTS)],
        "step": [dict(step) for _ in range(STEPS)],
    }


def write_weights(folder: Path) -> None:
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**MODEL))
    head = torch.nn.Linear(MODEL["hidden_size"], 1)
    state = dict(model.state_dict()) | {f"v_head.summary.{n}": w for n, w in head.state_dict().items()}
    save_file(state, folder / "policy.safetensors")


def played(folder: Path, side: str, kind: str, calls: list[dict], tuning: str, **keys) -> dict:
    """What `trl`, or ours in the dtype of this name, found of some calls, in a process of its own.

    `tuning`: one of SHARED. `keys`: of the calls of generate. The calls of step get the orders of their
    passes from ours.
    """
    name = "-".join([kind, side, *map(str, keys.values())])
    if keys:
        calls = [call | {"keys": call["keys"] | keys} for call in calls]
    case = {"model": MODEL, "weights": "policy", "config": CONFIG, "threads": THREADS, "actions": calls}
    case["trainer"] = SHARED[tuning]
    (folder / f"{name}.json").write_text(json.dumps(case))
    peer = os.environ["STACKRL_PPO_PEER_PYTHON"], str(Path(__file__).with_name("peer_ppo.py"))
    command = peer if side == "trl" else (sys.executable, __file__, "ours", side)
    done = subprocess.run([*command, str(folder), name], capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"{name} ends with {done.returncode}: {done.stderr[-2000:]}")
    found = json.loads((folder / f"{name}.found.json").read_text())
    if found["error"]:
        raise RuntimeError(f"{name}: {found['error']}")
    for call, noted in zip(calls, json.loads((folder / f"{name}.json").read_text())["actions"], strict=True):
        call.update(noted)
    return found | {"seconds": median([call["seconds"] for call in found["actions"]][1:] or [0.0])}


def check_losses(folder: Path, step: dict, tuning: str) -> float:
    """Largest relative difference of the losses of one step.

    Raises:
        RuntimeError: it is too large, and there is nothing to time.
    """
    sides = (played(folder, side, "step", [step], tuning) for side in ("float32", "trl"))
    ours, trl = (found["actions"][0]["stats"] for found in sides)
    far = max(abs(ours[name] - trl[name]) / abs(trl[name]) for name in LOSSES)
    if not far <= TOLERANCE:
        raise RuntimeError(f"the losses differ: {[(name, ours[name], trl[name]) for name in LOSSES]}")
    return far


def say(comparison: str, **numbers: float) -> None:
    """One line."""
    rounded = {name.replace("_", " "): float(f"{number:.4g}") for name, number in numbers.items()}
    print(json.dumps({"comparison": comparison} | rounded), flush=True)


def main(folder: Path, kinds: list[str], tuning: str) -> None:
    """Print a JSON line for each comparison; of rollouts or steps alone where only those are named."""
    write_weights(folder)
    calls, rows = actions(), CONFIG["batch_size"]
    (sampled,) = played(folder, "float32", "rollouts", calls["rollouts"][:1], tuning)["actions"]
    for step in calls["step"]:
        step["responses"] = sampled["tokens"][0]
    if "step" in kinds:
        say("losses of a step", largest_difference=check_losses(folder, calls["step"][0], tuning))
    found = {
        side: {kind: played(folder, side, kind, calls[kind], tuning) for kind in kinds}
        for side in (*DTYPES, "trl")
    }
    found["trl, our batch"] = dict(found["trl"])
    if "rollouts" in kinds:
        found["trl, our batch"]["rollouts"] = played(
            folder, "trl", "rollouts", calls["rollouts"], tuning, batch_size=rows
        )
    parts = {kind: [kind] for kind in kinds} | ({"rollouts and step": kinds} if len(kinds) > 1 else {})
    for name, summed in parts.items():
        seconds = {side: sum(found[side][kind]["seconds"] for kind in summed) for side in found}
        megabytes = {side: max(found[side][kind]["megabytes"] for kind in summed) for side in found}
        for side in DTYPES:
            for peer in ("trl", "trl, our batch") if "rollouts" in summed else ("trl",):
                say(
                    f"{name}, ours in {side} against {peer}",
                    times_as_fast=seconds[peer] / seconds[side],
                    memory=megabytes[side] / megabytes[peer],
                    samples_per_second=rows / seconds[side],
                    seconds=seconds[side], peers_seconds=seconds[peer],
                    megabytes=megabytes[side], peers_megabytes=megabytes[peer],
                )  # fmt: skip


OURS = SimpleNamespace(
    AutoModelForCausalLMWithValueHead=AutoModelForCausalLMWithValueHead,
    PPOConfig=PPOConfig,
    PPOTrainer=trainer,
)
if __name__ == "__main__":
    if sys.argv[1:2] == ["ours"]:
        play(Path(sys.argv[3]), sys.argv[4], OURS, dtype=sys.argv[2])
    else:
        with tempfile.TemporaryDirectory() as name:
            words = sys.argv[1:]
            if "onednn" in words:
                os.environ[ONEDNN] = "1"
            kinds = [word for word in words if word in ("rollouts", "step")] or ["rollouts", "step"]
            main(Path(name), kinds, "hydra" if "hydra" in words else "full")

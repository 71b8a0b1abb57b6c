"""PPOTrainer beside that of TRL 0.11.4: the same numbers where TRL is right, right ones where it is not.

Needs STACKRL_PPO_PEER_PYTHON, a python with trl==0.11.4. Both trainers play the same cases through the same
interface (tests/benchmarks/peer_ppo.py); TRL takes the rows in the order in which ours did.
"""

from __future__ import annotations

import json
import os
import runpy
import subprocess
from collections.abc import Callable
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from types import SimpleNamespace

import pytest
import tiny
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from tasks.lm import AutoModelForCausalLMWithValueHead
from tasks.ppo import PPOConfig, PPOTrainer

PEER = os.environ.get("STACKRL_PPO_PEER_PYTHON")
SCRIPT = Path(__file__).parents[1] / "benchmarks" / "peer_ppo.py"
OURS = SimpleNamespace(
    AutoModelForCausalLMWithValueHead=AutoModelForCausalLMWithValueHead,
    PPOConfig=PPOConfig,
    PPOTrainer=PPOTrainer,
)
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(PEER is None, reason="STACKRL_PPO_PEER_PYTHON names no python with trl==0.11.4"),
]
CONFIG = {"batch_size": 8, "mini_batch_size": 4, "ppo_epochs": 2, "learning_rate": 1e-3, "init_kl_coef": 0.1}
MODELS = {
    "llama": {"model_type": "llama", **tiny.LLAMA},
    "gpt2": {"model_type": "gpt2", **tiny.GPT2, "resid_pdrop": 0.5, "embd_pdrop": 0.5},
}
SAME = 1e-4  # of a statistic; of the step that the weights make


# ---- cases


def batch(seed: int = 11, response_tokens: int | None = None) -> dict:
    """A step of prompts and responses of uneven lengths; of this seed KL to the reference is positive."""
    draw = torch.Generator().manual_seed(seed)
    lengths = [torch.randint(1, most, (8,), generator=draw).tolist() for most in (9, 7)]
    scores = torch.randn(8, generator=draw).tolist()
    if response_tokens:
        lengths[1] = [response_tokens] * 8
    queries, responses = (tiny.drawn(each, seed + i) for i, each in enumerate(lengths, 1))
    return {"queries": queries, "responses": responses, "scores": scores}


def masked(*holes: int) -> dict:
    """A step whose responses have six tokens; in two thirds of them a tool's stand in the holes."""
    rows = [[int(t not in holes or row % 3 == 0) for t in range(6)] for row in range(8)]
    return batch(response_tokens=6) | {"masks": rows}


def case(*actions: dict, model: str = "llama", **keys) -> dict:
    """Actions, one step where none is named; keys of the configuration, or of the case."""
    found = {"weights": f"{model}-policy", "reference": f"{model}-reference", "actions": actions or [batch()]}
    found |= {
        name: keys.pop(name)
        for name in ("weights", "reference", "padding", "trainer", "lora")
        if name in keys
    }
    special = {"vocab_size": 32, "pad_token_id": tiny.PAD, "eos_token_id": tiny.EOS, "bos_token_id": None}
    return {"model": MODELS[model] | special, "config": CONFIG | keys, **found}


def greedy(*prompts: list[int], **keys) -> dict:
    """A call of generate; no token ends a response."""
    asked = {"do_sample": False, "max_new_tokens": 6, "pad_token_id": tiny.PAD, "eos_token_id": -1}
    return {"prompts": prompts, "keys": asked | keys}


THREE = [batch(seed) for seed in (11, 16, 18)]
AGREE = {
    "one epoch": case(ppo_epochs=1),
    "four epochs": case(ppo_epochs=4),
    "four epochs of the whole batch": case(ppo_epochs=4, mini_batch_size=8),
    "minibatches of one response": case(batch(response_tokens=4), mini_batch_size=1),
    "two minibatches a step": case(
        batch(response_tokens=4), mini_batch_size=2, gradient_accumulation_steps=2
    ),
    "padded on the right": case(padding="right"),
    "three steps, fixed KL": case(*THREE, adap_kl_ctrl=False),
    "three steps, adaptive KL": case(*THREE, target=0.5, horizon=50),
    "a dear KL": case(init_kl_coef=5.0),
    "whitened rewards": case(*THREE, whiten_rewards=True),
    **{f"kl_penalty {kind}": case(*THREE, kl_penalty=kind) for kind in ("abs", "mse", "full")},
    "gamma and lambda": case(gamma=0.9, lam=0.6),
    "lambda 0": case(lam=0.0),
    "narrow clipping": case(cliprange=0.02, cliprange_value=0.03, ppo_epochs=4),
    "no clipping": case(cliprange=50.0, cliprange_value=50.0, ppo_epochs=4),
    "a heavy value loss": case(vf_coef=2.0),
    "clipped scores": case(score_clip=0.4),
    "a masked head": case(masked(0, 1), lam=0.7),
    "a masked tail": case(masked(4, 5), lam=0.7, adap_kl_ctrl=False),
    "a masked gap": case(masked(2, 3), lam=1.0, gamma=1.0, adap_kl_ctrl=False),
    "early stopping": case(ppo_epochs=4, early_stopping=True, target_kl=1e-3),
}  # fmt: skip
OF_MINIBATCHES = {"ppo/returns/var", "ppo/val/var", "ppo/val/var_explained"}  # in TRL; of whole steps in ours


# ---- what a trainer made of them


@dataclass(repr=False)
class Run:
    """A case as one of the two played it."""

    case: dict
    found: dict
    start: dict[str, Tensor]
    end: dict[str, Tensor]
    is_trl: bool

    def steps(self) -> list[tuple[dict, list[float], dict]]:
        """Each step, the norms of its gradients, and its statistics; those of tokens as flat lists."""
        played = zip(self.case["actions"], self.found["actions"], strict=False)
        return [(a, f["norms"], self._of_tokens(a, f["stats"])) for a, f in played if "stats" in f]

    def moved(self) -> Tensor:
        """The way of all weights."""
        assert self.start.keys() == self.end.keys()
        return torch.cat([(self.end[n] - self.start[n]).double().flatten() for n in sorted(self.start)])

    def is_sound(self) -> bool:
        """Whether it came through: weights that moved, and numbers wherever one looks."""
        moved = self.moved()
        told = [torch.tensor(value) for _, _, statistics in self.steps() for value in statistics.values()]
        finite = all(bool(x.isfinite().all()) for x in [moved, *told])
        return not self.found["error"] and finite and bool(moved.abs().max() > 0)

    def _of_tokens(self, action: dict, stats: dict) -> dict:
        """Of every response token, row by row, and of the policy's own ones in the order of the passes.

        TRL has columns [S − 1] for each row, ours the responses, and in the passes the tokens alone.
        """
        lengths, told = list(map(len, action["responses"])), dict(stats)
        width = len(stats["objective/logprobs"][0])
        starts = [0] * len(lengths)
        if self.is_trl:
            starts = [width - n for n in lengths]
            if self.case.get("padding") == "right":
                starts = [len(query) - 1 for query in action["queries"]]
        for name in ("objective/logprobs", "objective/ref_logprobs"):
            each = zip(stats[name], starts, lengths, strict=True)
            told[name] = list(chain.from_iterable(row[s : s + n] for row, s, n in each))
        masks = action.get("masks") or [[1] * n for n in lengths]
        for name in ("ppo/policy/ratio", "ppo/policy/advantages") if self.is_trl else ():
            rows = torch.tensor(stats[name]).view(-1, width).tolist()
            order = chain.from_iterable(action["orders"])  # longer than the passes, where these stop early
            told[name] = [
                row[starts[i] + t]
                for row, i in zip(rows, order, strict=False)
                for t, own in enumerate(masks[i])
                if own
            ]
        return told


def write_weights(folder: Path) -> None:
    """Of each model: a policy, a reference near it, and the policy with a value head that sees nothing."""
    for kind in MODELS:
        draw = torch.Generator().manual_seed(5)
        head = {"v_head.summary.weight": 0.3 * torch.randn(1, 16, generator=draw),
                "v_head.summary.bias": torch.tensor([0.1])}  # fmt: skip
        policy = {name: weight.clone() for name, weight in tiny.causal(kind).state_dict().items()}
        near = {n: w * (1 + 0.05 * torch.randn(w.shape, generator=draw)) for n, w in policy.items()}
        blind = {n: torch.zeros_like(w) for n, w in head.items()}
        for name, state in {
            "policy": policy | head,
            "reference": near | head,
            "blind": policy | blind,
        }.items():
            save_file(state, folder / f"{kind}-{name}.safetensors")


@pytest.fixture(scope="module")
def runs(tmp_path_factory) -> dict[str, dict[str, Run]]:
    """Every case, of `ours` and `trl`."""
    play, folder = runpy.run_path(str(SCRIPT))["play"], tmp_path_factory.mktemp("beside")
    cases = AGREE | {name: case for name, (case, _) in DEFECTS.items()} | OTHERS
    files = {name: f"{number:02d}" for number, name in enumerate(cases)}
    write_weights(folder)

    def read(file: str, is_trl: bool) -> Run:
        played, found = (json.loads((folder / f"{file}{end}.json").read_text()) for end in ("", ".found"))
        start = load_file(folder / f"{played['weights']}.safetensors")
        return Run(played, found, start, load_file(folder / f"{file}.found.safetensors"), is_trl)

    ours = {}
    for name, file in files.items():
        (folder / f"{file}.json").write_text(json.dumps(cases[name]))
        play(folder, file, OURS)
        ours[name] = read(file, is_trl=False)
    done = subprocess.run(
        [PEER, SCRIPT, folder, *files.values()], capture_output=True, text=True, timeout=600
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return {"ours": ours, "trl": {name: read(file, is_trl=True) for name, file in files.items()}}


# ---- where TRL is right


@pytest.mark.parametrize("name", AGREE)
def test_the_numbers_are_those_of_trl(runs, name):
    """Every statistic that TRL has, relative to its size (to 0.01, where it is smaller), and the weights."""
    ours, trl, far = runs["ours"][name], runs["trl"][name], {}
    assert trl.is_sound() and ours.found["error"] is None
    for (_, norms, found), (_, peers, wanted) in zip(ours.steps(), trl.steps(), strict=True):
        assert wanted["objective/kl"] > 0 or not trl.case["config"].get("adap_kl_ctrl", True)  # else a defect
        assert tiny.far(norms, peers) <= SAME
        assert {key for key in wanted if key.startswith("time/")} <= found.keys()
        other = OF_MINIBATCHES if "gradient_accumulation_steps" in trl.case["config"] else set()
        for key in (key for key in wanted if key not in other and not key.startswith("time/")):
            a, b = (torch.tensor(x[key], dtype=torch.float64) for x in (found, wanted))
            assert a.shape == b.shape, key
            difference = float((a - b).abs().max() / b.abs().max().clamp(min=1e-2))
            far[key] = max(difference, far.get(key, 0.0))
    worst = max(far, key=far.get)
    moved = float((ours.moved() - trl.moved()).norm() / trl.moved().norm())
    print(f"{name}: statistics {far[worst]:.1e} ({worst}), weights {moved:.1e}")
    assert far[worst] <= SAME, worst
    assert ours.found["kl_coef"] == pytest.approx(trl.found["kl_coef"], rel=SAME)
    assert moved <= SAME


def test_the_cases_are_what_they_are_called(runs):
    first = {name: run.steps()[0] for name, run in runs["trl"].items() if name in AGREE}
    told = {name: statistics for name, (_, _, statistics) in first.items()}
    for key in ("ppo/policy/clipfrac", "ppo/val/clipfrac"):
        assert told["narrow clipping"][key] > 0.1 and told["no clipping"][key] == 0
    assert told["whitened rewards"]["ppo/returns/var"] > 2 * told["one epoch"]["ppo/returns/var"]
    assert abs(told["clipped scores"]["ppo/mean_scores"]) < 0.4 > told["clipped scores"]["ppo/std_scores"]
    assert 2 <= len(first["early stopping"][1]) < 8
    assert runs["trl"]["three steps, adaptive KL"].found["kl_coef"] != CONFIG["init_kl_coef"]


# ---- where TRL is wrong: what holds of ours, and not of TRL's


def has_right_advantages(run: Run, _) -> bool:
    """By hand: KL is free and every value 0, so that scores and λ alone count, and the policy's tokens."""
    ((action, _, found),) = run.steps()
    masks = action.get("masks") or [[1] * len(response) for response in action["responses"]]
    rewards = [[0.0] * (sum(mask) - 1) + [score] for mask, score in zip(masks, action["scores"], strict=True)]
    if run.case["config"].get("whiten_rewards"):
        every = torch.tensor(list(chain.from_iterable(rewards)))
        rewards = [
            ((torch.tensor(row) - every.mean()) / every.std() + every.mean()).tolist() for row in rewards
        ]
    rows, lam = [], run.case["config"]["lam"]
    for row in rewards:
        rows.append([sum(r * lam**k for k, r in enumerate(row[t:])) for t in range(len(row))])
    every = torch.tensor(list(chain.from_iterable(rows)))
    passes = torch.tensor([x for order in action["orders"] for i in order for x in rows[i]])
    return tiny.far(found["ppo/policy/advantages"], (passes - every.mean()) / every.std()) <= SAME


@torch.no_grad()
def reads_each_row_as_if_alone(run: Run, _) -> bool:
    ((action, _, found),) = run.steps()
    model, wanted = tiny.causal(run.case["model"]["model_type"]), []
    for query, response in zip(action["queries"], action["responses"], strict=True):
        logp = model(torch.tensor([query + response])).logits[0, len(query) - 1 : -1].log_softmax(-1)
        wanted += logp[range(len(response)), response].tolist()
    return tiny.far(found["objective/logprobs"], wanted) <= SAME


@torch.no_grad()
def shows_the_model_below_the_adapter(run: Run, _) -> bool:
    model, found = tiny.causal(), run.found["actions"]
    text, below = found[-1]["tokens"]
    wanted = [list(prompt) for prompt in PROMPTS]
    for row in wanted:
        for _ in range(6):
            row.append(int(model(torch.tensor([row])).logits[0, -1].argmax()))
    return text != wanted == below


def clips_every_update(run: Run, _) -> bool:
    ((_, norms, _),) = run.steps()
    return len(norms) == 4 and max(norms) <= 1.0001 * run.case["config"]["max_grad_norm"]


def stands_still_when_it_skips(run: Run, _) -> bool:
    """Adam's first step is no longer than the learning rate, and the second one is to be skipped."""
    return run.is_sound() and run.moved().abs().max() <= 1.001 * CONFIG["learning_rate"]


def is_one_big_batch(run: Run, side: dict[str, Run]) -> bool:
    return tiny.far(run.steps()[0][1], side["one big batch"].steps()[0][1]) <= SAME


def scales_scores(run: Run, _) -> bool:
    return run.is_sound() and run.steps()[0][2]["ppo/std_scores"] == pytest.approx(1, rel=1e-3)


def says_the_same_after_a_step(run: Run, _) -> bool:
    before, step, after = run.found["actions"]
    return before["tokens"] == after["tokens"] and not step["is_training"]


def returns_whole_prompts(run: Run, _) -> bool:
    return [row[:-6] for row in run.found["actions"][0]["tokens"][0]] == run.case["actions"][0]["prompts"]


def stops_after_the_second_pass(run: Run, _) -> bool:
    return len(run.steps()[0][1]) == 2


def is_sound(run: Run, _) -> bool:
    return run.is_sound()


PROMPTS = tiny.drawn([2, 5, 9, 3], 7)
SINGLE = {"queries": [[5, 6, 7]], "responses": [[9]], "scores": [1.0]}
EMPTY = batch() | {"responses": [[], *batch()["responses"][1:]]}
BLIND = {"weights": "llama-blind", "init_kl_coef": 0.0, "lam": 0.5, "adap_kl_ctrl": False}
WHOLE = {"mini_batch_size": 8}
LORA = {"r": 4, "lora_alpha": 64}
OTHERS = {"one big batch": case(ppo_epochs=1, **WHOLE)}
DEFECTS: dict[str, tuple[dict, Callable[[Run, dict[str, Run]], bool]]] = {
    "max_grad_norm clips the first update alone": (case(max_grad_norm=0.1), clips_every_update),
    "one response token makes the weights NaN": (case(SINGLE, batch_size=1, mini_batch_size=1), is_sound),
    "an infinite ratio makes the weights NaN": (case(learning_rate=30.0, ppo_epochs=4), is_sound),
    "an empty response is an IndexError": (case(EMPTY), is_sound),
    "use_score_scaling crashes": (case(use_score_scaling=True), scales_scores),
    "a skipped minibatch moves the weights": (
        case(batch(4), **WHOLE, ratio_threshold=1.001), stands_still_when_it_skips,
    ),
    "GPT-2 counts padding as positions": (case(model="gpt2"), reads_each_row_as_if_alone),
    "generate has dropout after a step": (
        case(greedy(*PROMPTS), batch(), greedy(*PROMPTS), model="gpt2", learning_rate=1e-30),
        says_the_same_after_a_step,
    ),
    "the constructor reseeds random numbers": (case(), lambda run, _: not run.found["reseeds"]),
    "early stopping looks at the sign of KL": (
        case(batch(12), **WHOLE, ppo_epochs=4, early_stopping=True, target_kl=1e-3),
        stops_after_the_second_pass,
    ),
    "negative KL makes KL cheaper": (
        case(batch(1), target=0.5, horizon=50),
        lambda run, _: run.is_sound() and run.found["kl_coef"] >= CONFIG["init_kl_coef"],
    ),
    "advantages decay over a tool's tokens": (case(masked(2, 3), **BLIND), has_right_advantages),
    "whiten_rewards pays the padding": (
        case(padding="right", whiten_rewards=True, **BLIND), has_right_advantages,
    ),
    "accumulated minibatches are no big batch": (
        case(ppo_epochs=1, mini_batch_size=2, gradient_accumulation_steps=4), is_one_big_batch,
    ),
    "a prompt that holds eos ends there": (case(greedy([5, tiny.EOS, 7], [8, 9])), returns_whole_prompts),
    "the reference's text is the adapter's": (
        case(
            batch(), greedy(*PROMPTS, generate_ref_response=True),
            reference=None, lora=LORA, learning_rate=0.1,
        ),
        shows_the_model_below_the_adapter,
    ),
    "num_shared_layers shares no memory": (
        case(reference=None, trainer={"num_shared_layers": 1}), lambda run, _: run.found["shared"] > 0,
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", DEFECTS)
def test_what_trl_does_wrong_is_right_here(runs, name):
    """A defect that TRL does not show is no pin: then the case is to be mended."""
    holds = DEFECTS[name][1]
    assert holds(runs["ours"][name], runs["ours"]), runs["ours"][name].found["error"]
    assert runs["trl"][name].found["error"] or not holds(runs["trl"][name], runs["trl"])

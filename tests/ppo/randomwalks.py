"""randomwalks, trlX's test task, anew from its description: short ways through a graph nobody shows.

A model first learns from 1,000 random walks which edges there are; PPO then pays it for how close a walk is
to the shortest one. `python tests/ppo/randomwalks.py <folder> [seeds]` does both for each seed, with a graph
of its own, and writes the curves of mean optimality as CSV and PNG.
"""

from __future__ import annotations

import sys
import tempfile
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace

import torch
from matplotlib.figure import Figure
from torch import Tensor
from transformers import AutoModelForCausalLM, LlamaConfig

from tasks.lm import AutoModelForCausalLMWithValueHead
from tasks.lm.sampling.generation import row_seeds
from tasks.ppo import PPOConfig, PPOTrainer
from tasks.run.curve import Curve
from tasks.sft import PackedRow, SFTConfig, SFTTrainer

NODES, GOAL, LONGEST, WALKS, EDGE = 21, 0, 10, 1000, 0.1  # nodes of a walk at most; probability of an edge
PAD, EOS, FIRST = 0, 1, 2  # node n is token n + FIRST
STARTS = [[node + FIRST] for node in range(NODES) if node != GOAL]
TOKENIZER = SimpleNamespace(pad_token_id=PAD, eos_token_id=EOS)
SHAPE = {
    "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4,
    "vocab_size": NODES + FIRST, "pad_token_id": PAD, "eos_token_id": EOS, "bos_token_id": None,
}  # fmt: skip
PPO = {
    "updates": 150, "batch_size": 100, "mini_batch_size": 100, "response_tokens": LONGEST, "eval_updates": 5,
    "learning_rate": 3e-4, "init_kl_coef": 0.0, "adap_kl_ctrl": False, "vf_coef": 1.0, "max_grad_norm": 1.0,
    "monitor": {"reward": "truth"},
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class World:
    """A directed graph, and how many nodes the shortest walk from each to the goal has, both ends counted."""

    edges: Tensor  # [NODES, NODES] bool, from row to column; the goal leads to itself alone
    shortest: list[int]

    def optimality(self, prompts: list[list[int]], responses: list[list[int]]) -> Tensor:
        """1 for a shortest walk to the goal, 0 for one of LONGEST nodes or that never arrives. -> [B].

        What steps along no edge, or ends before the goal, never arrives.
        """
        found = []
        for prompt, response in zip(prompts, responses, strict=True):
            nodes = [token - FIRST for token in [*prompt, *response]]
            walk = nodes[: nodes.index(GOAL) + 1] if GOAL in nodes else []
            arrives = min(walk, default=-1) >= 0 and all(self.edges[step] for step in pairwise(walk))
            best = self.shortest[nodes[0]]
            found.append(max(LONGEST - len(walk), 0) / (LONGEST - best) if arrives else 0.0)
        return torch.tensor(found)

    def walk(self, start: int, draw: torch.Generator) -> list[int]:
        """Nodes of a random walk until the goal, at most LONGEST."""
        nodes = [start]
        while nodes[-1] != GOAL and len(nodes) < LONGEST:
            nodes.append(int(torch.multinomial(self.edges[nodes[-1]].float(), 1, generator=draw)))
        return nodes


def shortest_walks(edges: Tensor) -> list[int]:
    """Nodes of the shortest walk from each node to the goal; LONGEST where none has fewer."""
    reached, found = torch.arange(NODES) == GOAL, [LONGEST] * NODES
    for length in range(1, LONGEST):
        found = [min(best, length) if there else best for best, there in zip(found, reached, strict=True)]
        reached = reached | (edges & reached).any(1)
    return found


def create_world(draw: torch.Generator) -> World:
    """The first graph drawn whose every node reaches the goal early enough."""
    while True:
        edges = torch.rand(NODES, NODES, generator=draw) < EDGE
        edges.fill_diagonal_(False)
        edges[GOAL] = torch.arange(NODES) == GOAL
        shortest = shortest_walks(edges)
        if max(shortest) < LONGEST:
            return World(edges, shortest)


def learn_walks(world: World, seed: int, draw: torch.Generator, epochs: int = 10):
    """A model that walks as the random walks do."""
    rows = []
    for start in torch.randint(GOAL + 1, NODES, (WALKS,), generator=draw).tolist():
        nodes = world.walk(start, draw)
        tokens = [node + FIRST for node in nodes] + [EOS] * (nodes[-1] == GOAL)
        rows.append(PackedRow(tuple(tokens), (len(tokens),), (0,)))
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(LlamaConfig(**SHAPE))
    keys = {"save_strategy": "no", "disable_tqdm": True, "use_cpu": True, "seed": seed}
    keys |= {"num_train_epochs": epochs, "per_device_train_batch_size": 50, "learning_rate": 3e-3}
    with tempfile.TemporaryDirectory() as folder:
        SFTTrainer(model, SFTConfig(folder, **keys), rows).train()
    return model


def create_trainer(seed: int, epochs: int = 10, **keys) -> tuple[PPOTrainer, World]:
    """A model that has learnt a graph's walks, in a trainer whose learning rate falls to nothing."""
    draw = torch.Generator().manual_seed(seed)
    world, config = create_world(draw), PPOConfig(**{**PPO, **keys})
    model = AutoModelForCausalLMWithValueHead(learn_walks(world, seed, draw, epochs))
    adam = torch.optim.Adam(model.parameters(), config.learning_rate)
    fall = torch.optim.lr_scheduler.LinearLR(adam, 1.0, 0.0, config.updates)
    given = {"tokenizer": TOKENIZER, "optimizer": adam, "lr_scheduler": fall, "seed": seed, "device": "cpu"}
    return PPOTrainer(config, model, **given), world


def mean_optimality(trainer: PPOTrainer, world: World, walks: int = 50) -> float:
    """Over as many walks from every start, by random numbers that no training sees."""
    prompts = walks * STARTS
    responses = trainer.sample(prompts, row_seeds(trainer.seed + 1, len(prompts))).lists()
    return world.optimality(prompts, responses).mean().item()


def main(folder: Path, seeds: int) -> None:
    """Train for each seed, print before and after, and write the curves."""
    curve = Curve([f"seed_{seed}" for seed in range(seeds)])
    for seed in range(seeds):
        trainer, world = create_trainer(seed)
        before = mean_optimality(trainer, world)
        found = trainer.train(STARTS, world.optimality, held_out=5 * STARTS).points("held_out_score")
        after = mean_optimality(trainer, world)
        print(f"seed {seed}: mean optimality {before:.3f} -> {after:.3f}", flush=True)
        for update, score in [(0, before), *zip(*found, strict=True)]:
            curve.add(update, **{f"seed_{seed}": round(score, 4)})
    curve.write(folder / "randomwalks.csv")
    panel = (figure := Figure(figsize=(6, 3), dpi=90, layout="constrained")).subplots()
    for seed in range(seeds):
        panel.plot(*curve.points(f"seed_{seed}"), label=f"seed {seed}", linewidth=1.4)
    panel.axhline(0.95, color="#999999", linewidth=0.8, linestyle="--")
    panel.set(xlabel="updates of 100 walks", ylabel="mean optimality", ylim=(0, 1.02))
    panel.legend(loc="lower right")
    figure.savefig(folder / "randomwalks.png", metadata={"Software": None})


if __name__ == "__main__":
    torch.set_num_threads(1)
    main(Path(sys.argv[1]), int(sys.argv[2]) if len(sys.argv) > 2 else 3)

"""The environment of randomwalks by hand, and the bar that PPO must clear in it."""

from __future__ import annotations

from itertools import pairwise

import pytest
import randomwalks
import torch
from randomwalks import EOS, FIRST, GOAL, LONGEST, NODES, PAD, STARTS, World, create_world, shortest_walks


def chain() -> World:
    """Every node leads to the one below it; node 3 also to 1 and, by a long way, to 20."""
    edges = torch.zeros(NODES, NODES, dtype=torch.bool)
    edges[torch.arange(1, NODES), torch.arange(NODES - 1)] = True
    edges[3, 1] = edges[3, 20] = edges[GOAL, GOAL] = True
    return World(edges, shortest_walks(edges))


def scored(walk: list[int], *rest: int) -> float:
    """Of a prompt of the first node, and a response of the others and further tokens."""
    tokens = [node + FIRST for node in walk]
    return chain().optimality([tokens[:1]], [[*tokens[1:], *rest]]).item()


def test_shortest_walks_by_hand():
    assert chain().shortest[:6] == [1, 2, 3, 3, 4, 5]
    assert chain().shortest[8:12] == [8, 9, 10, 10]  # 10 nodes, or more, are no walk in time


@pytest.mark.parametrize(
    ("walk", "rest", "wanted"),
    [
        ([3, 1, 0], (EOS,), 1.0),
        ([3, 2, 1, 0], (), 6 / 7),  # 4 nodes where 3 would do: (10 - 4) / (10 - 3)
        ([8, 7, 6, 5, 4, 3, 2, 1, 0], (EOS,), 1 / 2),
        ([9, 8, 7, 6, 5, 4, 3, 2, 1, 0], (), 0.0),  # the tenth node is too late
        ([3, 0], (EOS,), 0.0),  # there is no such edge
        ([3, 2, 3, 1, 0], (), 0.0),  # nor one upwards
        ([3, 1], (EOS, GOAL + FIRST), 0.0),  # ended before the goal
        ([3, 1], (PAD, GOAL + FIRST), 0.0),
        ([3, 2, 1], (), 0.0),
        ([3, 1, 0, 7], (PAD, EOS), 1.0),  # nothing counts behind the goal
    ],
)
def test_optimality_by_hand(walk, rest, wanted):
    assert scored(walk, *rest) == pytest.approx(wanted)


@pytest.mark.parametrize("seed", range(3))
def test_a_drawn_world_can_be_walked(seed):
    draw = torch.Generator().manual_seed(seed)
    world = create_world(draw)
    ways = world.edges.double()
    for node in range(NODES):  # the first power of the matrix that leads to the goal, plus one
        power, steps = torch.eye(NODES, dtype=torch.float64), 0
        while not power[node, GOAL]:
            power, steps = power @ ways, steps + 1
        assert world.shortest[node] == steps + 1 < LONGEST
    walks = [world.walk(start, draw) for start in range(1, NODES) for _ in range(5)]
    for walk in walks:
        assert all(world.edges[step] for step in pairwise(walk))
        assert GOAL not in walk[:-1] and (walk[-1] == GOAL or len(walk) == LONGEST)
    tokens = [[node + FIRST for node in walk] for walk in walks]
    found = world.optimality([t[:1] for t in tokens], [t[1:] for t in tokens])
    assert found.max() <= 1 and found.min() >= 0 and len(found.unique()) > 3


def test_both_trainings_run():
    trainer, world = randomwalks.create_trainer(0, epochs=1, updates=1, batch_size=20, mini_batch_size=20)
    curve = trainer.train(STARTS, world.optimality, held_out=STARTS)
    assert curve.points("held_out_score")[0] == [1] and trainer.optimizer.param_groups[0]["lr"] == 0
    assert 0 <= randomwalks.mean_optimality(trainer, world, walks=1) <= 1


@pytest.mark.slow
def test_ppo_finds_the_short_ways(caplog):
    trainer, world = randomwalks.create_trainer(0)
    assert randomwalks.mean_optimality(trainer, world) < 0.6  # random walks
    trainer.train(STARTS, world.optimality, held_out=STARTS)
    assert randomwalks.mean_optimality(trainer, world) >= 0.95
    assert "but" not in caplog.text, "the score is the truth: no look finds anything"

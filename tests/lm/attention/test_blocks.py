"""Blocks: who sees whom by hand, and what two ways of attending have in common."""

from __future__ import annotations

import pytest
import tiny
import torch

from tasks.lm.attention import blocks
from tasks.lm.attention.forest import Segment, enable_forest, plant, run_forest

CLOSE = 1e-5


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_small_and_large_blocks_are_attended_alike(monkeypatch, kind):
    """The two products for few keys and SDPA for many: the same hidden states and gradients."""
    keys = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0} if kind == "gpt2" else {}
    found, calls, sdpa = [], [], blocks.functional.scaled_dot_product_attention
    monkeypatch.setattr(
        blocks.functional, "scaled_dot_product_attention", lambda *a, **k: (calls.append(1), sdpa(*a, **k))[1]
    )
    for most in (blocks.SMALL_BLOCK, 0):
        monkeypatch.setattr(blocks, "SMALL_BLOCK", most)
        model = tiny.causal(kind, **keys)
        enable_forest(model)
        tokens = tiny.drawn((9, 4, 40))
        grown = plant([Segment(tokens[0]), Segment(tokens[1], 0), Segment(tokens[2], 0)])
        logits = run_forest(model, grown).logits
        logits.square().mean().backward()
        found.append((logits.detach(), tiny.gradients(model), len(calls)))
    assert found[0][2] == 0 < found[1][2], "each way was taken"
    assert tiny.far(found[1][0], found[0][0]) <= CLOSE
    assert tiny.far_gradients(found[1][1], found[0][1]) <= CLOSE


def test_a_block_by_hand():
    """A question of two tokens and an answer of one: side by side, two queries wide, three keys long."""
    (block,) = plant([Segment((5, 6)), Segment((7,), 0)]).sight.blocks
    assert block.shape == (2, 2, 3)
    assert block.queries.tolist() == [0, 1, 2, 2], "the answer's second query repeats its first place"
    assert block.keys.tolist() == [0, 1, 0, 0, 1, 2]
    assert block.sees[:, 0].tolist() == [
        [[True, False, False], [True, True, False]],
        [[True, True, True], [True, True, True]],
    ]
    assert block.real.tolist() == [0, 1, 2]


def test_a_bidirectional_block_by_hand():
    """Two documents side by side: every query sees the real keys of its document, and these only."""
    (block,) = plant([Segment((5, 6)), Segment((7,))], is_causal=False).sight.blocks
    assert block.keys.tolist() == [0, 1, 2, 0]
    assert block.sees[:, 0].tolist() == [[[True, True]], [[True, False]]]


def test_blocks_hold_every_token_once_and_bound_their_waste():
    segments = [Segment(t) for t in tiny.drawn((*range(1, 81), 300))]
    forest = plant([*segments, Segment(segments[4].tokens, 80), Segment(segments[5].tokens, 70)])
    held = torch.cat([b.queries[b.real] for b in forest.sight.blocks])
    assert sorted(held.tolist()) == list(range(len(forest.tokens)))
    assert torch.equal(held[forest.sight.order], torch.arange(len(forest.tokens)))
    for block in forest.sight.blocks:
        n, rows, columns = block.shape
        own = torch.bincount(block.real // rows)
        whole = block.sees[torch.arange(n), 0, own - 1].sum(1)
        for longest, lengths in ((rows, own), (columns, whole)):
            assert longest == lengths.max() and (longest <= 32 or longest < 1.5 * lengths.min())


@pytest.mark.parametrize("most", [blocks.SMALL_BLOCK, 0])
@pytest.mark.parametrize(("window", "wanted"), [(1, [1, 2, 4]), (2, [1, 1.5, 3]), (3, [1, 1.5, 7 / 3])])
def test_a_window_by_hand(monkeypatch, most, window, wanted):
    """A question of two tokens, an answer of one; all products are 0: each token averages what it sees."""
    monkeypatch.setattr(blocks, "SMALL_BLOCK", most)
    sight = plant([Segment((5, 6)), Segment((7,), 0)]).sight
    heads, values = torch.zeros(3, 1, 1), torch.tensor([1.0, 2.0, 4.0]).view(3, 1, 1)
    found = blocks.attend(sight, heads, heads, values, window=window)
    assert found.flatten().tolist() == pytest.approx(wanted)


@pytest.mark.parametrize("most", [blocks.SMALL_BLOCK, 0])
def test_a_bias_by_hand(monkeypatch, most):
    """log 3 for one place ahead, two documents: the first token counts its successor three times."""
    monkeypatch.setattr(blocks, "SMALL_BLOCK", most)
    sight = plant([Segment((5, 6)), Segment((7,))], is_causal=False).sight
    heads, values = torch.zeros(3, 1, 1), torch.tensor([1.0, 2.0, 4.0]).view(3, 1, 1)
    bias = torch.tensor([[0.0, 3.0, 9.0], [0.0, 1.0, 9.0], [9.0, 9.0, 9.0]]).log().clamp(min=0)[None, None]
    found = blocks.attend(sight, heads, heads, values, bias=bias)
    assert found.flatten().tolist() == pytest.approx([7 / 4, 3 / 2, 4])


@pytest.mark.parametrize("kind", ["llama", "gpt2", "mistral"])
def test_long_segments_are_attended_alone(monkeypatch, kind):
    """One causal call each instead of one masked one for all: the same states and gradients."""
    found = []
    tokens = tiny.drawn((9, 4, 13))
    for least in (blocks.LONG_RUNS, 2):
        monkeypatch.setattr(blocks, "LONG_RUNS", least)
        model = tiny.causal(kind, **({"sliding_window": None} if kind == "mistral" else {}))
        enable_forest(model)
        grown = plant([Segment(row) for row in tokens])
        logits = run_forest(model, grown).logits
        logits.square().mean().backward()
        found.append((logits.detach(), tiny.gradients(model)))
        assert grown.sight.runs == (() if least > 2 else (9, 4, 13))
    assert tiny.far(found[1][0], found[0][0]) <= CLOSE
    assert tiny.far_gradients(found[1][1], found[0][1]) <= CLOSE


def test_which_segments_are_runs(monkeypatch):
    """Long enough on average, all of them roots, and causal."""
    monkeypatch.setattr(blocks, "LONG_RUNS", 3)
    runs = lambda *segments, **keys: plant(list(segments), **keys).sight.runs  # noqa: E731
    assert runs(Segment((5, 6)), Segment((7, 8, 9, 4))) == (2, 4)
    assert runs(Segment((5, 6)), Segment((7, 8, 9))) == ()
    assert runs(Segment((5, 6)), Segment((7, 8, 9, 4), 0)) == ()
    assert runs(Segment((5, 6, 7, 8)), is_causal=False) == ()
    ahead = blocks.look([torch.arange(4, 8), torch.arange(4)], [torch.arange(4, 8), torch.arange(4)], True)
    assert ahead.runs == () and ahead.to("cpu").runs == () and len(ahead.blocks) == 1
    assert plant([Segment((5, 6, 7))]).sight.to("cpu").runs == (3,)


def test_a_window_shorter_than_a_run(monkeypatch):
    """It is seen by the blocks; one that reaches over all of a run changes nothing."""
    monkeypatch.setattr(blocks, "LONG_RUNS", 2)
    draw = torch.Generator().manual_seed(0)
    q, k, v = torch.randn(3, 7, 2, 4, generator=draw)
    sight = plant([Segment((5, 6, 7, 8)), Segment((9, 4, 3))]).sight
    assert sight.runs == (4, 3)
    near, far = (blocks.attend(sight, q, k, v, window=window) for window in (2, 4))
    assert tiny.far(blocks.attend(sight, q, k, v), far) == 0 and tiny.far(near, far) > 1e-2
    plain = blocks.replace(sight, runs=())
    assert tiny.far(near, blocks.attend(plain, q, k, v, window=2)) == 0
    assert tiny.far(blocks.attend(sight, q, k, v, window=3), blocks.attend(plain, q, k, v, window=3)) == 0
    scaled = blocks.attend(sight, q, k, v, scaling=3.0)
    assert tiny.far(scaled, blocks.attend(plain, q, k, v, scaling=3.0)) <= CLOSE < tiny.far(scaled, far)
    bias = torch.randn(1, 2, 7, 7, generator=draw)
    assert tiny.far(blocks.attend(sight, q, k, v, bias=bias), far) > 1e-2

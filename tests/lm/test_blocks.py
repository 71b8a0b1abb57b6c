"""Blocks: who sees whom by hand, and what two ways of attending have in common."""

from __future__ import annotations

import pytest
import tiny
import torch

from tasks.lm import blocks
from tasks.lm.forest import Segment, enable_forest, plant, run_forest

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

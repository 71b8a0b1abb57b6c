"""The exactness ladder's first step: a forest gives the numbers of its documents, one by one."""

from __future__ import annotations

import pytest
import tiny
import torch
from torch.nn import functional

from tasks.lm import forest
from tasks.lm.forest import Segment, enable_forest, forest_attention, plant, run_forest

SERVED = ("llama", "gpt2", "qwen2", "opt", "gpt_neox", "mistral", "gemma")
CLOSE = 1e-5


def path_of(segments, i) -> list[int]:
    """The tokens of a segment after those of its ancestors."""
    up = [] if segments[i].parent < 0 else path_of(segments, segments[i].parent)
    return [*up, *segments[i].tokens]


def nll(logits, labels):
    return functional.cross_entropy(logits.float(), torch.tensor(labels), reduction="sum")


def forest_loss(model, segments, places) -> torch.Tensor:
    """Sum of −log p of the tokens at `places` (segment, token of the segment; never a root's first)."""
    forest = plant(segments)
    predicts, labels = [], []
    for i, t in places:
        parent = segments[i].parent
        first = forest.starts[parent] + forest.lengths[parent] if t == 0 else forest.starts[i] + t
        predicts.append(first - 1)
        labels.append(segments[i].tokens[t])
    return nll(run_forest(model, forest, logits_to_keep=torch.tensor(predicts)).logits[0], labels)


def separate_loss(model, segments, places) -> torch.Tensor:
    """The same, every segment with its ancestors in a forward of its own, without the forest."""
    total = 0.0
    for i, t in places:
        row = path_of(segments, i)
        place = len(row) - len(segments[i].tokens) + t
        logits = model(input_ids=torch.tensor([row]), use_cache=False).logits[0]
        total = total + nll(logits[place - 1 : place], [row[place]])
    return total


def roots(lengths, seed=1) -> list[Segment]:
    return [Segment(tokens) for tokens in tiny.drawn(lengths, seed)]


def tree() -> list[Segment]:
    """Two questions, the second's answers before it is over; one answer has a follow-up (nested parents)."""
    tokens, parents = tiny.drawn((7, 5, 1, 1, 3, 1, 40), seed=2), (-1, 0, -1, 0, 1, -1, 2)
    return [Segment(t, parent) for t, parent in zip(tokens, parents, strict=True)]


@pytest.mark.parametrize("kind", SERVED)
@pytest.mark.parametrize("name", ["packed", "tree"])
def test_a_forest_gives_each_documents_loss_and_gradients(kind, name):
    """Every token of every segment, in every served architecture; lengths on both sides of a block's."""
    model = tiny.causal(kind)
    segments = roots((5, 1, 12, 34, 3, 50, 2, 1)) if name == "packed" else tree()
    places = [(i, t) for i, s in enumerate(segments) for t in range(len(s.tokens)) if t or s.parent >= 0]
    wanted = separate_loss(model, segments, places)
    wanted.backward()
    separate = tiny.gradients(model)
    enable_forest(model)
    found = forest_loss(model, segments, places)
    found.backward()
    assert tiny.far(found.item(), wanted.item()) <= CLOSE
    assert tiny.far_gradients(tiny.gradients(model), separate) <= CLOSE
    calls = [m.forest_calls for m in model.modules() if hasattr(m, "forest_calls")]
    assert calls == [1] * model.config.num_hidden_layers


@pytest.mark.parametrize("lengths", [(1,), (9,), (1, 1), (33, 32), (60, 1, 40, 33, 47, 48, 2)])
def test_hidden_states_of_any_lengths(lengths):
    model, segments = tiny.causal("gpt2"), roots(lengths, seed=sum(lengths))
    alone = [model(input_ids=torch.tensor([s.tokens])).logits[0] for s in segments]
    enable_forest(model)
    assert tiny.far(run_forest(model, plant(segments)).logits[0], torch.cat(alone)) <= CLOSE


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_small_and_large_blocks_are_attended_alike(monkeypatch, kind):
    """The two products for few keys and SDPA for many: the same hidden states and gradients."""
    keys = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0} if kind == "gpt2" else {}
    found, calls, sdpa = [], [], forest.functional.scaled_dot_product_attention
    monkeypatch.setattr(
        forest.functional, "scaled_dot_product_attention", lambda *a, **k: (calls.append(1), sdpa(*a, **k))[1]
    )
    for most in (forest.SMALL_BLOCK, 0):
        monkeypatch.setattr(forest, "SMALL_BLOCK", most)
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


def test_the_order_of_the_documents_does_not_matter():
    model, segments = tiny.causal(), roots((3, 40, 1, 20, 35, 7))
    enable_forest(model)
    there = run_forest(model, plant(segments)).logits[0].split([len(s.tokens) for s in segments])
    back = segments[::-1]
    found = run_forest(model, plant(back)).logits[0].split([len(s.tokens) for s in back])
    assert all(tiny.far(a, b) <= CLOSE for a, b in zip(found, there[::-1], strict=True))


def leak(segments, changed, kind="llama") -> float:
    """How much the last segment's hidden states move when the tokens of another one change."""
    model = tiny.scorer(kind).base_model
    enable_forest(model)
    found = []
    for tokens in (segments[changed].tokens, [(t + 9) % 32 for t in segments[changed].tokens]):
        row = list(segments)
        row[changed] = Segment(tokens, segments[changed].parent)
        hidden = run_forest(model, plant(row, is_causal=kind == "llama")).last_hidden_state
        found.append(hidden[0, -len(row[-1].tokens) :].detach())
    return tiny.far(found[1], found[0])


def test_a_document_cannot_see_its_neighbour():
    first, second = tiny.drawn((6, 8))
    assert leak([Segment(first), Segment(second)], 0) == 0
    assert leak([Segment(first), Segment(second, 0)], 0) > 0.05, "without the boundary it is seen"


def test_a_bidirectional_document_sees_all_of_itself_and_no_neighbour():
    first, second = tiny.drawn((6, 8))
    assert leak([Segment(first), Segment(second)], 0, "bert") == 0
    assert leak([Segment(second), Segment(first)], 0, "bert") == 0
    assert leak([Segment(first + second)], 0, "bert") > 0.05


def test_an_answer_sees_its_question_and_not_its_sibling():
    q, a, b = tiny.drawn((6, 5, 5), seed=3)
    family = [Segment(q), Segment(a, 0), Segment(b, 0)]
    assert leak(family, 0) > 0.05
    assert leak(family, 1) == 0
    assert leak([Segment(q), Segment(a, 0), Segment(b, 1)], 1) > 0.05


def test_plant_by_hand():
    forest = plant([Segment((5, 6)), Segment((7, 1), 0), Segment((8, 9, 1), 0), Segment((4,))])
    assert forest.tokens.tolist() == [5, 6, 7, 1, 8, 9, 1, 4]
    assert forest.positions.tolist() == [0, 1, 2, 3, 2, 3, 4, 0]
    assert forest.starts == (0, 2, 4, 7) and forest.lengths == (2, 2, 3, 1)


def test_nested_positions_by_hand():
    forest = plant([Segment((5, 6)), Segment((7,), 0), Segment((8, 9), 1)])
    assert forest.positions.tolist() == [0, 1, 2, 3, 4]


def test_a_block_by_hand():
    """A question of two tokens and an answer of one: side by side, two queries wide, three keys long."""
    (block,) = plant([Segment((5, 6)), Segment((7,), 0)]).blocks
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
    (block,) = plant([Segment((5, 6)), Segment((7,))], is_causal=False).blocks
    assert block.keys.tolist() == [0, 1, 2, 0]
    assert block.sees[:, 0].tolist() == [[[True, True]], [[True, False]]]


def test_blocks_hold_every_token_once_and_bound_their_waste():
    segments = roots((*range(1, 81), 300))
    forest = plant([*segments, Segment(segments[4].tokens, 80), Segment(segments[5].tokens, 70)])
    held = torch.cat([b.queries[b.real] for b in forest.blocks])
    assert sorted(held.tolist()) == list(range(len(forest.tokens)))
    assert torch.equal(held[forest.order], torch.arange(len(forest.tokens)))
    for block in forest.blocks:
        n, rows, columns = block.shape
        own = torch.bincount(block.real // rows)
        whole = block.sees[torch.arange(n), 0, own - 1].sum(1)
        for longest, lengths in ((rows, own), (columns, whole)):
            assert longest == lengths.max() and (longest <= 32 or longest < 1.5 * lengths.min())


@pytest.mark.parametrize(
    ("segments", "message"),
    [
        ([], "at least one segment"),
        ([Segment((5,)), Segment(())], "segment 1 of a forest is empty"),
        ([Segment((5,), 1), Segment((6,))], "segment 0 of a forest stands before its parent 1"),
        ([Segment((5,)), Segment((6,), 1)], "segment 1 of a forest stands before its parent 1"),
    ],
)
def test_what_is_no_forest(segments, message):
    with pytest.raises(ValueError, match=message):
        plant(segments)


def test_no_segment_of_a_bidirectional_forest_has_a_parent():
    """The shared question would see the answers: not what each whole document gives."""
    with pytest.raises(ValueError, match="segment 1 has a parent"):
        plant([Segment((5,)), Segment((6,), 0)], is_causal=False)


@pytest.mark.parametrize("kind", ["gptj", "bloom"])
def test_models_that_look_elsewhere_are_refused_by_name(kind):
    model = tiny.causal(kind)
    with pytest.raises(ValueError, match=f"{type(model).__name__} cannot be served"):
        enable_forest(model)


def test_a_layer_without_attention_is_refused():
    """LFM2's convolutions see across documents, so that only some of its layers could be served."""
    model = tiny.causal("lfm2", full_attn_idxs=[1])
    enable_forest(model)
    with pytest.raises(ValueError, match="Lfm2ForCausalLM calls the forest attention in 1 of its 2 layers"):
        run_forest(model, plant(roots((4, 5))))


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_a_model_that_was_not_enabled_fails_loudly(attention):
    """The mask that a forest hands on has no columns, which no other attention takes."""
    with pytest.raises((ValueError, RuntimeError)):
        run_forest(tiny.causal(attn_implementation=attention), plant(roots((4,))))


def test_a_sliding_window_is_refused_when_it_would_cut():
    model = tiny.causal("mistral", sliding_window=6)
    enable_forest(model)
    run_forest(model, plant(roots((6, 6))))
    with pytest.raises(ValueError, match="MistralAttention uses a sliding window"):
        run_forest(model, plant(roots((7,))))


def test_several_rows_are_refused():
    layer = tiny.causal().model.layers[0].self_attn
    heads = torch.zeros(2, 2, 4, 8)
    with pytest.raises(ValueError, match="a forest is one row; 2 rows came"):
        forest_attention(layer, heads, heads, heads, None, forest=plant(roots((4,))))


@pytest.mark.parametrize("kind", SERVED)
@pytest.mark.parametrize("side", ["left", "right"])
def test_padded_batches_stay_right_once_the_forest_is_registered(kind, side):
    model, rows = tiny.causal(kind), tiny.drawn((3, 9, 6))
    alone = [model(input_ids=torch.tensor([row])).logits[0] for row in rows]
    enable_forest(model)
    for row, wanted in zip(rows, alone, strict=True):
        gap = 9 - len(row)
        keep = slice(gap, 9) if side == "left" else slice(0, len(row))
        ids, mask = torch.full((2, 9), tiny.PAD), torch.zeros(2, 9, dtype=torch.long)
        ids[0, keep], mask[0, keep] = torch.tensor(row), 1
        ids[1], mask[1] = torch.tensor(rows[1]), 1
        positions = (mask.cumsum(1) - 1).clamp(min=0)
        found = model(input_ids=ids, attention_mask=mask, position_ids=positions).logits[0, keep]
        assert tiny.far(found, wanted) <= CLOSE


def test_dropout_reaches_the_attention():
    """A forest trains as any other model: with attention dropout two forwards differ."""
    model = tiny.causal(attention_dropout=0.5).train()
    enable_forest(model)
    forest = plant(roots((8, 8)))
    assert not torch.equal(run_forest(model, forest).logits, run_forest(model, forest).logits)


def test_gradient_checkpointing_gives_the_same_gradients():
    model = tiny.causal().train()
    enable_forest(model)
    segments = tree()
    forest_loss(model, segments, [(6, 3), (4, 0), (0, 2)]).backward()
    plain = tiny.gradients(model)
    model.gradient_checkpointing_enable()
    forest_loss(model, segments, [(6, 3), (4, 0), (0, 2)]).backward()
    assert tiny.far_gradients(tiny.gradients(model), plain) <= CLOSE

"""The fused kernel's rule is what the blocks see; on CUDA its numbers are theirs."""

from __future__ import annotations

import random
import warnings
from dataclasses import replace

import pytest
import tiny
import torch
from torch.nn import functional
from torch.nn.attention.flex_attention import create_mask, flex_attention

from tasks.lm.attention import flex
from tasks.lm.attention.forest import Segment, enable_forest, plant, run_forest

needs_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")


def grown(seed: int, is_causal: bool = True):
    """A random forest: up to four generations, siblings that do not stand side by side."""
    draw = random.Random(seed)
    segments = []
    for i in range(draw.randint(1, 12)):
        parent = draw.randint(-1, i - 1) if is_causal else -1
        segments.append(Segment(tiny.drawn((draw.choice((1, 2, 5, 40)),), seed=seed + i)[0], parent))
    return plant(segments, is_causal)


def rule_mask(forest) -> torch.Tensor:
    """[T, T] bool: the rule at every pair of places."""
    total = len(forest.tokens)
    rule = flex.rule_of(forest.lengths, forest.parents, forest.is_causal, "cpu")
    return create_mask(rule, None, None, total, total, device="cpu")[0, 0]


def block_mask(forest) -> torch.Tensor:
    """[T, T] bool: what the blocks let each token see."""
    seen = torch.zeros(len(forest.tokens), len(forest.tokens), dtype=torch.bool)
    for block in forest.sight.blocks:
        n, rows, columns = block.shape
        sees = block.sees.expand(n, 1, rows, columns).reshape(n * rows, columns)
        for place in block.real.tolist():
            keys = block.keys.view(n, columns)[place // rows]
            seen[block.queries[place], keys[sees[place]]] = True
    return seen


@pytest.mark.parametrize("is_causal", [True, False])
@pytest.mark.parametrize("seed", range(12))
def test_the_rule_is_what_the_blocks_see(seed, is_causal):
    forest = grown(seed, is_causal)
    assert torch.equal(rule_mask(forest), block_mask(forest))


def test_the_rule_by_hand():
    """A question, its answer, another question, and a second answer to the first."""
    forest = plant([Segment((5, 6)), Segment((7,), 0), Segment((8,)), Segment((9,), 0)])
    wanted = [[1, 0, 0, 0, 0], [1, 1, 0, 0, 0], [1, 1, 1, 0, 0], [0, 0, 0, 1, 0], [1, 1, 0, 0, 1]]
    assert rule_mask(forest).int().tolist() == wanted


@pytest.mark.filterwarnings("ignore:flex_attention called without")
@pytest.mark.parametrize("is_causal", [True, False])
def test_a_tile_mask_gives_the_blocks_attention(monkeypatch, is_causal):
    """Unfused on the CPU; several tiles of 128 tokens, fewer key heads than query heads."""
    monkeypatch.setattr(flex, "_kernel", lambda: flex_attention)
    parents = (-1, 0, 0, 0) if is_causal else (-1,) * 4
    segments = map(Segment, tiny.drawn((100, 150, 9, 61)), parents)
    forest = plant(list(segments), is_causal)
    mask = flex.mask_of(forest.lengths, forest.parents, is_causal, "cpu")
    query, key, value = (torch.randn(1, n, 320, 16) for n in (4, 2, 2))
    found = flex.fused(query, key, value, mask, 0.3)
    wanted = functional.scaled_dot_product_attention(
        query, key, value, block_mask(forest), scale=0.3, enable_gqa=True
    )
    assert tiny.far(found, wanted) <= 1e-5


def dense(query, key, value, block_mask, **keys):
    """A kernel that the CPU can run backwards; as picky about dtypes as the fused one."""
    assert query.dtype == key.dtype == value.dtype
    places = torch.arange(query.shape[2])
    sees = block_mask.mask_mod(0, 0, places[:, None], places)
    return functional.scaled_dot_product_attention(query, key, value, sees, **keys)


@pytest.fixture
def as_if_on_cuda(monkeypatch):
    """Counts the layers that take the fused way; the kernel is dense."""
    calls = []
    monkeypatch.setattr(flex, "_kernel", lambda: lambda *a, **k: (calls.append(1), dense(*a, **k))[1])
    return calls


@pytest.mark.parametrize("kind", ["llama", "gpt2", "bert"])
@pytest.mark.parametrize("in_bf16", [False, True])
def test_a_forest_with_a_mask_takes_the_fused_way(as_if_on_cuda, kind, in_bf16):
    """Hidden states and gradients; under autocast the heads come in two dtypes."""
    wide = {"hidden_size": 32, "n_embd": 32, "head_dim": 16, **tiny.NO_DROPOUT}
    forest = grown(3, is_causal=kind != "bert")
    masked = replace(forest, mask=flex.mask_of(forest.lengths, forest.parents, forest.is_causal, "cpu"))
    found = []
    for planted in (forest, masked):
        model = tiny.scorer(kind, **wide, max_position_embeddings=256, n_positions=256)
        enable_forest(model)
        with torch.autocast("cpu", torch.bfloat16, enabled=in_bf16):
            hidden = run_forest(model.base_model, planted).last_hidden_state
        hidden.float().square().mean().backward()
        found.append((hidden, tiny.gradients(model)))
    assert len(as_if_on_cuda) == 2
    close = 0.1 if in_bf16 else 1e-5
    assert tiny.far(found[1][0], found[0][0]) <= close
    assert tiny.far_gradients(found[1][1], found[0][1]) <= close


def test_a_layer_that_cannot_fuse_takes_the_blocks(as_if_on_cuda):
    forest = grown(3)
    masked = replace(forest, mask=flex.mask_of(forest.lengths, forest.parents, True, "cpu"))
    model = tiny.causal(max_position_embeddings=256)  # heads of 8
    enable_forest(model)
    assert torch.equal(run_forest(model, masked).logits, run_forest(model, forest).logits)
    assert not as_if_on_cuda


@pytest.mark.parametrize(
    ("size", "dropout", "window", "fuses"),
    [(64, 0.0, None, True), (16, 0.0, None, True), (8, 0.0, None, False), (80, 0.0, None, False),
     (64, 0.1, None, False), (64, 0.0, 4096, False)],
)  # fmt: skip
def test_which_layers_fuse(size, dropout, window, fuses):
    assert flex.can_fuse(torch.zeros(1, 1, 1, size), dropout, window) is fuses


def leaky(query, key, value, block_mask, **keys):
    """Sees every earlier token, whosever it is."""
    return dense(query, key, value, flex.mask_of((query.shape[2],), (-1,), True, "cpu"), **keys)


def not_a_number(*heads, **keys):
    return dense(*heads, **keys) * float("nan")


def broken(*_, **__):
    raise RuntimeError("no compiler\nin many lines")


@pytest.mark.parametrize(
    ("kernel", "message"),
    [(dense, None), (leaky, "on cpu: flex_attention errs in torch.float32"),
     (not_a_number, "on cpu: flex_attention errs in torch.float32"), (broken, "on cpu: no compiler")],
)  # fmt: skip
@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
@torch.autocast("cpu", torch.bfloat16)
def test_the_self_test_finds_a_wrong_or_broken_kernel(monkeypatch, kernel, message, mode):
    """In both dtypes, wherever it is first asked: while scoring, under autocast."""
    asked = []
    monkeypatch.setattr(
        flex, "_kernel", lambda: lambda q, *a, **k: (asked.append(q.dtype), kernel(q, *a, **k))[1]
    )
    with warnings.catch_warnings(record=True) as said, mode():
        warnings.simplefilter("always")
        assert flex.works.__wrapped__(torch.device("cpu")) is (message is None)
    assert [str(w.message) for w in said] == ([f"no fused forest attention {message}"] if message else [])
    assert asked == [torch.float32, torch.bfloat16][: 1 if kernel is broken else 2]


@needs_cuda
def test_the_fused_kernel_works_here():
    assert torch.cuda.get_device_capability() < (8, 0) or flex.works(torch.device("cuda", 0))


@needs_cuda
@pytest.mark.parametrize("kind", ["llama", "qwen3", "gpt2", "bert"])
@pytest.mark.parametrize("seed", range(3))
def test_on_cuda_a_forest_gives_the_blocks_numbers(monkeypatch, kind, seed):
    """float32, hidden states and gradients; rows of several lengths through one kernel."""
    found, forest = [], grown(seed, is_causal=kind != "bert").to("cuda")
    for works in (flex.works, lambda device: False):
        monkeypatch.setattr(flex, "works", works)
        wide = {"hidden_size": 32, "n_embd": 32, "head_dim": 16, **tiny.NO_DROPOUT}
        model = tiny.scorer(kind, **wide, max_position_embeddings=256, n_positions=256).to("cuda")
        enable_forest(model)
        hidden = run_forest(model.base_model, forest).last_hidden_state
        hidden.square().mean().backward()
        found.append((hidden.cpu(), {n: g.cpu() for n, g in tiny.gradients(model).items()}))
    assert tiny.far(found[0][0], found[1][0]) <= 1e-4
    assert tiny.far_gradients(found[0][1], found[1][1]) <= 1e-4

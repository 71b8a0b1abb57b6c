"""The exactness ladder's first step: a forest gives the numbers of its documents, one by one."""

from __future__ import annotations

import pytest
import tiny
import torch
from peft import LoraConfig, get_peft_model
from torch.nn import functional

from tasks.lm.attention.forest import (
    Segment,
    enable_forest,
    forest_attention,
    plant,
    run_forest,
    serve_forest,
)

SERVED = ("llama", "mistral", "qwen2", "qwen3", "gemma", "phi3", "gpt2", "gpt_neox", "opt", "gemma2")
WAYS = ("plain", "adapter", "checkpointed", "reentrant", "adapter reentrant")
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
    for i in sorted({i for i, _ in places}):
        row = path_of(segments, i)
        ends = [len(row) - len(segments[i].tokens) + t for j, t in places if j == i]
        logits = model(input_ids=torch.tensor([row]), use_cache=False).logits[0]
        total = total + nll(logits[[e - 1 for e in ends]], [row[e] for e in ends])
    return total


def roots(lengths, seed=1) -> list[Segment]:
    return [Segment(tokens) for tokens in tiny.drawn(lengths, seed)]


def tree() -> list[Segment]:
    """Two questions, the second's answers before it is over; one answer has a follow-up (nested parents)."""
    tokens, parents = tiny.drawn((7, 5, 1, 1, 3, 1, 40), seed=2), (-1, 0, -1, 0, 1, -1, 2)
    return [Segment(t, parent) for t, parent in zip(tokens, parents, strict=True)]


def with_adapter(model):
    """LoRA on every linear layer, its random matrices far from zero."""
    keys = {"target_modules": "all-linear", "r": 4, "lora_alpha": 16, "init_lora_weights": False}
    return get_peft_model(model, LoraConfig(**keys))


def checkpointed(model, reentrant: bool):
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    model.enable_input_require_grads()  # what a reentrant checkpoint needs where the embeddings are frozen
    return model


def every_place(segments) -> list[tuple[int, int]]:
    """All tokens that a forest predicts."""
    return [(i, t) for i, s in enumerate(segments) for t in range(len(s.tokens)) if t or s.parent >= 0]


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("kind", SERVED)
@pytest.mark.parametrize("name", ["packed", "tree", "alone"])
def test_a_forest_gives_each_documents_loss_and_gradients(kind, name, way):
    """Every token of every segment, in every served architecture; lengths on both sides of a block's.

    Twice, because what a checkpoint runs again in the backward must not count for the next forward.
    """
    model = tiny.causal(kind, **tiny.NO_DROPOUT).train()
    if "adapter" in way:
        model = with_adapter(model)
    segments = {"packed": roots((5, 1, 12, 34, 3, 50, 2, 1)), "tree": tree(), "alone": roots((9,))}[name]
    places = every_place(segments)
    wanted = separate_loss(model, segments, places)
    wanted.backward()
    separate = tiny.gradients(model)
    enable_forest(model)
    if way not in ("plain", "adapter"):
        model = checkpointed(model, "reentrant" in way)
    for _ in range(2):
        found = forest_loss(model, segments, places)
        found.backward()
        assert tiny.far(found.item(), wanted.item()) <= CLOSE
        assert tiny.far_gradients(tiny.gradients(model), separate) <= CLOSE


@pytest.mark.parametrize("kind", SERVED)
@pytest.mark.parametrize("name", ["packed", "tree"])
def test_under_autocast_a_forest_errs_as_little_as_each_document(kind, name):
    """In bfloat16 both are rounded; the forest is at most twice as far from float32's loss and gradients."""
    segments = roots((5, 1, 12, 34)) if name == "packed" else tree()
    places, found = every_place(segments), []
    for in_bf16, loss_of in ((False, separate_loss), (True, separate_loss), (True, forest_loss)):
        model = tiny.causal(kind)
        if loss_of is forest_loss:
            enable_forest(model)
        with torch.autocast("cpu", torch.bfloat16, enabled=in_bf16):
            loss = loss_of(model, segments, places)
        loss.backward()
        found.append((loss.item(), tiny.gradients(model)))
    exact, separate, packed = found
    assert tiny.far(packed[0], exact[0]) <= 2 * tiny.far(separate[0], exact[0]) + 1e-3
    assert tiny.far_gradients(packed[1], exact[1]) <= 2 * tiny.far_gradients(separate[1], exact[1])


WINDOWS = {
    "mistral": {"sliding_window": 6},
    "phi3": {"sliding_window": 6},
    "qwen2": {"use_sliding_window": True, "sliding_window": 6, "max_window_layers": 1},
    "qwen3": {"use_sliding_window": True, "sliding_window": 6, "max_window_layers": 1},
}


@pytest.mark.parametrize("kind", WINDOWS)
@pytest.mark.parametrize("name", ["packed", "tree"])
def test_a_sliding_window_slides_over_each_document(kind, name):
    """In all layers or in some; a window reaches from an answer back into its question."""
    model, segments = tiny.causal(kind, **WINDOWS[kind]), roots((6, 7, 50, 1)) if name == "packed" else tree()
    places = every_place(segments)
    wanted = separate_loss(model, segments, places)
    wanted.backward()
    separate = tiny.gradients(model)
    enable_forest(model)
    found = forest_loss(model, segments, places)
    found.backward()
    assert tiny.far(found.item(), wanted.item()) <= CLOSE
    assert tiny.far_gradients(tiny.gradients(model), separate) <= CLOSE
    whole = tiny.causal(kind)
    enable_forest(whole)
    assert tiny.far(found.item(), forest_loss(whole, segments, places).item()) > 1e-3, "it cuts"


def test_a_window_that_the_layers_keep_to_themselves_is_refused():
    """Qwen2-MoE builds it into its mask alone."""
    keys = {"use_sliding_window": True, "sliding_window": 6, "max_window_layers": 1}
    model = tiny.causal("qwen2_moe", **keys)
    enable_forest(model)
    with pytest.raises(ValueError, match="Qwen2MoeForCausalLM names its sliding window in 0 of 1 layers"):
        run_forest(model, plant(roots((4,))))


@pytest.mark.parametrize("lengths", [(1,), (9,), (1, 1), (33, 32), (60, 1, 40, 33, 47, 48, 2)])
def test_hidden_states_of_any_lengths(lengths):
    model, segments = tiny.causal("gpt2"), roots(lengths, seed=sum(lengths))
    alone = [model(input_ids=torch.tensor([s.tokens])).logits[0] for s in segments]
    enable_forest(model)
    assert tiny.far(run_forest(model, plant(segments)).logits[0], torch.cat(alone)) <= CLOSE


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
    assert forest.parents == (-1, 0, 0, -1)


def test_nested_positions_by_hand():
    forest = plant([Segment((5, 6)), Segment((7,), 0), Segment((8, 9), 1)])
    assert forest.positions.tolist() == [0, 1, 2, 3, 4]


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


@pytest.mark.parametrize(
    ("kind", "keys", "message"),
    [
        ("gptj", {}, "GPTJForCausalLM cannot be served by the forest .*: it has an attention of its own"),
        ("bloom", {}, "BloomForCausalLM .* has 0 attentions in 2 layers"),
        ("lfm2", {"full_attn_idxs": [1]}, "Lfm2ForCausalLM .* has conv layers"),
        ("mamba", {}, "MambaForCausalLM .* has linear_attention layers"),
        ("gpt_oss", {"num_local_experts": 2, "head_dim": 8}, "GptOssForCausalLM .* has attention sinks"),
    ],
)
def test_a_model_that_cannot_be_served_is_refused_by_name_and_unchanged(kind, keys, message):
    model = tiny.causal(kind, **keys)
    before = model.config._attn_implementation
    with pytest.raises(ValueError, match=message):
        enable_forest(model)
    assert not serve_forest(model) and model.config._attn_implementation == before


class Recurrence(torch.nn.Module):
    """In the place of an attention: each state sees all before it, whosever they are."""

    def forward(self, hidden_states, *_, **__):
        return hidden_states.cumsum(1), None


@pytest.mark.parametrize("way", WAYS)
def test_a_layer_without_attention_is_found_out(way):
    model = tiny.causal().train()
    enable_forest(model)
    model.model.layers[1].self_attn = Recurrence()
    model = with_adapter(model) if "adapter" in way else model
    model = model if way in ("plain", "adapter") else checkpointed(model, "reentrant" in way)
    for _ in range(2):
        with pytest.raises(ValueError, match="LlamaForCausalLM calls the forest attention 1 times, not 2"):
            run_forest(model, plant(roots((4, 5))))


def test_an_encoders_layer_without_attention_is_found_out():
    model = tiny.scorer("bert")
    enable_forest(model)
    model.bert.encoder.layer[0].attention.self = Recurrence()
    with pytest.raises(ValueError, match="BertForSequenceClassification calls the forest attention 1 times"):
        run_forest(model, plant(roots((4, 5)), is_causal=False))


@pytest.mark.parametrize("argument", ["s_aux", "position_bias"])
def test_what_only_other_attentions_understand_is_refused(argument):
    layer, heads = tiny.causal().model.layers[0].self_attn, torch.zeros(1, 2, 4, 8)
    keys = {"forest": plant(roots((4,))), argument: torch.ones(1)}
    with pytest.raises(ValueError, match=f"LlamaAttention uses {argument}, which a forest does not serve"):
        forest_attention(layer, heads, heads[:, :1], heads[:, :1], None, **keys)


def test_a_window_that_looks_ahead_is_refused():
    layer, heads = tiny.scorer("bert").bert.encoder.layer[0].attention.self, torch.zeros(1, 2, 4, 8)
    keys = {"forest": plant(roots((4,)), is_causal=False), "sliding_window": 2}
    with pytest.raises(ValueError, match="BertSelfAttention uses a window that looks ahead, which a forest"):
        forest_attention(layer, heads, heads, heads, None, **keys)


@pytest.mark.parametrize("is_causal", [None, True, False])
def test_without_a_forest_it_is_plain_attention(is_causal):
    """The layer's way, or the one that the call asks for."""
    layer, heads = tiny.causal().model.layers[0].self_attn, torch.randn(1, 2, 4, 8)
    found, _ = forest_attention(layer, heads, heads[:, :1], heads[:, :1], None, is_causal=is_causal)
    wanted = functional.scaled_dot_product_attention(
        heads, heads[:, :1], heads[:, :1], is_causal=is_causal is not False, enable_gqa=True
    )
    assert tiny.far(found, wanted.transpose(1, 2)) <= CLOSE


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_a_model_that_was_not_enabled_fails_loudly(attention):
    """The mask that a forest hands on has no columns, which no other attention takes."""
    with pytest.raises((ValueError, RuntimeError)):
        run_forest(tiny.causal(attn_implementation=attention), plant(roots((4,))))


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
    forest, rows = plant(roots((8, 8))), torch.tensor(tiny.drawn((8, 8)))
    for run in (lambda: run_forest(model, forest), lambda: model(input_ids=rows)):
        assert not torch.equal(run().logits, run().logits)

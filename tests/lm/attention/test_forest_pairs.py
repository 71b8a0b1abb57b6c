"""Packed sources and targets give the numbers of each pair alone."""

from __future__ import annotations

import pytest
import tiny
import torch
from torch.nn import functional

from tasks.lm.attention import blocks
from tasks.lm.attention.forest import enable_forest, serve_forest
from tasks.lm.attention.seq2seq_forest import plant_pairs, run_pairs

GATED = {"feed_forward_proj": "gated-gelu", "tie_word_embeddings": False}
KINDS = {"t5": {}, "mt5": {}, "gated": GATED}
SOURCES, TARGETS = (5, 1, 30, 12, 7), (4, 9, 1, 34, 2)


def model_of(name):
    """Long documents reach every bucket of the relative bias."""
    return tiny.seq2seq("t5" if name == "gated" else name, **tiny.NO_DROPOUT, **KINDS[name])


def packed_loss(model, sources, targets):
    pairs = plant_pairs(sources, targets, tiny.PAD)
    return functional.cross_entropy(run_pairs(model, pairs).logits[0], pairs.labels, reduction="sum")


def separate_loss(model, sources, targets):
    rows = [(torch.tensor([s]), torch.tensor([t])) for s, t in zip(sources, targets, strict=True)]
    return sum(model(input_ids=s, labels=t).loss * t.numel() for s, t in rows)


@pytest.mark.parametrize("way", ["plain", "checkpointed"])
@pytest.mark.parametrize("name", KINDS)
def test_packed_pairs_give_each_pairs_loss_and_gradients(name, way):
    model, sources, targets = model_of(name).train(), tiny.drawn(SOURCES), tiny.drawn(TARGETS, seed=1)
    wanted = separate_loss(model, sources, targets)
    wanted.backward()
    separate = tiny.gradients(model)
    assert any("relative_attention_bias" in parameter for parameter in separate)
    enable_forest(model)
    if way == "checkpointed":
        model.gradient_checkpointing_enable()
    for _ in range(2):
        found = packed_loss(model, sources, targets)
        found.backward()
        assert tiny.far(found, wanted) <= 1e-5
        assert tiny.far_gradients(tiny.gradients(model), separate) <= 1e-5


@pytest.mark.parametrize("most", [blocks.SMALL_BLOCK, 0])
def test_under_autocast_pairs_err_as_little_as_each_pair(monkeypatch, most):
    """Both are rounded; packed rows are at most twice as far from float32's loss and gradients."""
    monkeypatch.setattr(blocks, "SMALL_BLOCK", most)
    sources, targets, found = tiny.drawn(SOURCES), tiny.drawn(TARGETS, seed=1), []
    for in_bf16, loss_of in ((False, separate_loss), (True, separate_loss), (True, packed_loss)):
        model = model_of("t5")
        if loss_of is packed_loss:
            enable_forest(model)
        with torch.autocast("cpu", torch.bfloat16, enabled=in_bf16):
            loss = loss_of(model, sources, targets)
        loss.backward()
        found.append((loss.item(), tiny.gradients(model)))
    exact, separate, packed = found
    assert tiny.far(packed[0], exact[0]) <= 2 * tiny.far(separate[0], exact[0]) + 1e-3
    assert tiny.far_gradients(packed[1], exact[1]) <= 2 * tiny.far_gradients(separate[1], exact[1])


def test_a_layer_without_attention_is_found_out():
    class Nothing(torch.nn.Module):
        def forward(self, hidden_states, **_):
            return hidden_states, None, None

    model = model_of("t5")
    enable_forest(model)
    model.decoder.block[1].layer[1].EncDecAttention = Nothing()
    with pytest.raises(ValueError, match="T5ForConditionalGeneration calls the forest attention 5 times"):
        packed_loss(model, [(5,)], [(6,)])


@torch.no_grad()
def test_a_pair_sees_no_neighbour_and_all_of_itself():
    model, sources, targets = model_of("t5"), tiny.drawn((5, 6, 7)), tiny.drawn((4, 5, 6), seed=1)
    enable_forest(model)

    def second(sources, targets):
        return run_pairs(model, plant_pairs(sources, targets, tiny.PAD)).logits[0, 4:9]

    found, other = second(sources, targets), tiny.drawn((5, 6, 7), seed=2)
    for i, row in enumerate(other):
        swapped = [row if j == i else s for j, s in enumerate(sources)]
        assert (tiny.far(second(swapped, targets), found) > 0.01) == (i == 1)
        swapped = [row[: len(t)] if j == i else t for j, t in enumerate(targets)]
        assert (tiny.far(second(sources, swapped), found) > 0.01) == (i == 1)


def test_pairs_by_hand():
    pairs = plant_pairs([(5, 6), (7,)], [(8, 1), (9, 3, 1)], 2)
    assert pairs.sources.tokens.tolist() == [5, 6, 7] and pairs.targets.tokens.tolist() == [2, 8, 2, 9, 3]
    assert pairs.labels.tolist() == [8, 1, 9, 3, 1]
    (block,) = pairs.cross.blocks
    assert block.shape == (2, 3, 2) and block.queries.tolist() == [0, 1, 0, 2, 3, 4]
    assert block.keys.tolist() == [0, 1, 2, 0]
    assert block.sees[:, 0].tolist() == [[[True, True]], [[True, False]]]


@torch.no_grad()
def test_padded_rows_stay_right_once_the_forest_is_registered():
    model, sources, targets = model_of("t5"), tiny.drawn((5, 9)), tiny.drawn((4, 4), seed=1)
    wanted = model(input_ids=torch.tensor([sources[0]]), labels=torch.tensor([targets[0]])).logits[0]
    assert serve_forest(model)
    ids = torch.tensor([sources[0] + [tiny.PAD] * 4, sources[1]])
    mask = torch.tensor([[1] * 5 + [0] * 4, [1] * 9])
    found = model(input_ids=ids, attention_mask=mask, labels=torch.tensor(targets)).logits[0]
    assert tiny.far(found, wanted) <= 1e-5


@pytest.mark.parametrize(
    ("sources", "targets", "message"),
    [
        ([(5,)], [(5,), (6,)], "1 sources, but 2 targets"),
        ([(5,), ()], [(5,), (6,)], "segment 1 of a forest is empty"),
        ([(5,), (6,)], [(5,), ()], "target 1 is empty"),
    ],
)
def test_what_are_no_pairs(sources, targets, message):
    with pytest.raises(ValueError, match=message):
        plant_pairs(sources, targets, 0)


def test_other_encoder_decoders_are_refused_by_name():
    keys = {"encoder_layers": 1, "decoder_layers": 1, "encoder_ffn_dim": 8, "decoder_ffn_dim": 8}
    heads = {"d_model": 16, "encoder_attention_heads": 2, "decoder_attention_heads": 2}
    model = tiny.seq2seq("bart", decoder_start_token_id=tiny.PAD, **keys, **heads)
    assert not serve_forest(model)
    with pytest.raises(ValueError, match="BartForConditionalGeneration is none of mt5, t5"):
        run_pairs(model, plant_pairs([(5,)], [(6,)], tiny.PAD))


@pytest.mark.parametrize("name", ["t5", "mt5"])
def test_no_bias_is_larger_than_the_longest_document_needs(name):
    """The model itself would make heads · T² numbers, and as many zeros across."""
    model, sources, targets = model_of(name), tiny.drawn([7] * 60), tiny.drawn([6] * 60, seed=1)
    enable_forest(model)
    with tiny.Largest() as largest:
        packed_loss(model, sources, targets).backward()
    assert largest.elements <= 60 * 7 * 32  # tokens by vocabulary
    packed_loss(model, sources, targets)
    attentions = [module for module in model.modules() if hasattr(module, "compute_bias")]
    assert {len(module._forward_pre_hooks) for module in attentions} == {1}


def test_targets_that_share_a_source():
    """By hand: the first and the third ask the first source, which stands in the row once."""
    pairs = plant_pairs([(5, 6), (7,)], [(8, 1), (9,), (3, 4)], 2, of=[0, 1, 0])
    assert pairs.sources.tokens.tolist() == [5, 6, 7] and pairs.targets.tokens.tolist() == [2, 8, 2, 2, 3]
    (block,) = pairs.cross.blocks
    assert block.keys.tolist() == [0, 1, 2, 0, 0, 1]  # padding repeats a place, and is not seen
    assert block.sees[:, 0, 0].tolist() == [[True, True], [True, False], [True, True]]
    with pytest.raises(ValueError, match="1 sources, but 2 targets"):
        plant_pairs([(5,), (6,)], [(8,), (9,)], 2, of=[0])

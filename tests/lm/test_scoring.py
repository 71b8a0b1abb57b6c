"""Scores are plain transformers' scores, read at a document's last token."""

from __future__ import annotations

import pytest
import tiny
import torch

from tasks.lm.forest import Segment, enable_forest, plant
from tasks.lm.scoring import ends_of, forest_scores, score_documents


def plain_scores(model, documents) -> torch.Tensor:
    """Right-padded rows through the model's own forward; pad differs from eos."""
    width = max(map(len, documents)) + 2
    ids = torch.tensor([d + [tiny.PAD] * (width - len(d)) for d in documents])
    return model(input_ids=ids, attention_mask=(ids != tiny.PAD).long()).logits[:, 0]


@pytest.mark.parametrize("kind", ["llama", "gpt2", "opt", "qwen2"])
@pytest.mark.parametrize("rows", [1, 3, 100])
@torch.no_grad()
def test_scores_are_those_of_plain_transformers(kind, rows):
    """Some documents end with eos, some are cut off; whole batches and parts of them."""
    model = tiny.scorer(kind)
    documents = tiny.drawn((5, 12, 1, 33, 7)) + [[*d, tiny.EOS] for d in tiny.drawn((4, 9), 1)]
    wanted = plain_scores(model, documents)
    found = score_documents(model, documents, rows)
    assert found.shape == (7,) and found.dtype == torch.float32
    assert tiny.far(found, wanted) <= 1e-5


def test_ends_by_hand():
    forest = plant([Segment((5, 6)), Segment((7, 1), 0), Segment((8, 9, 1), 0)])
    assert ends_of(forest, [1, 2]).tolist() == [3, 6]
    assert ends_of(forest, [0]).tolist() == [1]


def test_a_model_without_a_score_head_is_refused():
    model = tiny.causal()
    enable_forest(model)
    forest = plant([Segment((5,))])
    with pytest.raises(ValueError, match="LlamaForCausalLM has no score head"):
        forest_scores(model, forest, torch.tensor([0]))


def test_dropout_is_off_while_scoring():
    model = tiny.scorer("gpt2", attn_pdrop=0.5, resid_pdrop=0.5, embd_pdrop=0.5).train()
    documents = tiny.drawn((4, 6))
    assert torch.equal(score_documents(model, documents, 8), score_documents(model, documents, 8))

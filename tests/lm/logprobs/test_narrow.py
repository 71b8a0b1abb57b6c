"""The last MLP at some places alone: the same predictions and gradients, from fewer rows."""

from __future__ import annotations

import pytest
import tiny
import torch

from tasks.lm.adapters.lora import add_adapter
from tasks.lm.attention.forest import serve_forest
from tasks.lm.attention.padding import lay_out
from tasks.lm.logprobs.last_mlp import last_mlp_at
from tasks.lm.logprobs.responses import read_responses

KINDS = ["llama", "qwen2", "gemma", "gpt2", "gpt_neox", "phi3", "opt", "bloom", "gptj", "gemma2"]


def gradients(model, narrow, monkeypatch):
    """Of all that is read of a padded or packed batch in which two rows share a prompt."""
    with monkeypatch.context() as patch:
        if not narrow:
            patch.setattr("tasks.lm.logprobs.last_mlp.WORTH", 0.0)
        prompts = tiny.drawn([5, 2, 5])
        prompts[2] = prompts[0]
        sequences = lay_out(prompts, tiny.drawn([3, 1, 2], 1), tiny.PAD, "cpu")
        logprobs, entropy, _ = read_responses(model, sequences, 0.8)
        (logprobs.sum() + entropy.square().sum()).backward()
    return (logprobs, entropy), tiny.gradients(model)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("adapted", [False, True])
def test_predictions_and_gradients_are_the_same(kind, adapted, monkeypatch):
    model = tiny.causal(kind)
    serve_forest(model)
    if adapted:
        model = add_adapter(model, 2)
    found, wanted = (gradients(model, narrow, monkeypatch) for narrow in (True, False))
    for a, b in zip(found[0], wanted[0], strict=True):
        assert tiny.far(a, b) <= 1e-5
    assert tiny.far_gradients(found[1], wanted[1]) <= 1e-5


def rows_of_mlp(model, places, tokens=20):
    """Rows that reach the last linear layer of the last block, and the model's logits."""
    rows = []
    inner = model.model.layers[-1].mlp.down_proj
    hook = inner.register_forward_pre_hook(lambda _, inputs: rows.append(inputs[0].shape))
    with last_mlp_at(model, places), torch.no_grad():
        logits = model(torch.arange(2, 2 + tokens)[None] % 30 + 2).logits
    hook.remove()
    return rows, logits


def test_only_the_rows_that_are_read_are_computed():
    model, places = tiny.causal(), torch.tensor([3, 17, 3])
    rows, logits = rows_of_mlp(model, places)
    plain, whole = rows_of_mlp(model, torch.arange(20))
    assert rows == [(1, 2, 24)] and plain == [(1, 20, 24)]
    assert tiny.far(logits[0, places], whole[0, places]) <= 1e-5
    assert tiny.far(logits[0, 5], whole[0, 5]) > 1e-3, "what nobody reads is not there"


def test_the_model_is_left_as_it_was():
    model = tiny.causal()
    mlp = model.model.layers[-1].mlp
    with pytest.raises(RuntimeError, match="within"), last_mlp_at(model, torch.tensor([1])):
        raise RuntimeError("within")
    assert not mlp._forward_pre_hooks and not mlp._forward_hooks
    with last_mlp_at(model, torch.tensor([], dtype=torch.long)):
        assert not mlp._forward_hooks

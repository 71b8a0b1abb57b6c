"""Bases and adapters on disk that the tests of adapters share."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import tiny
import torch
from peft import LoraConfig
from torch import nn
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

from tasks.lm.adapters.lora import add_adapter


def lora(**keys) -> LoraConfig:
    return LoraConfig(**{"r": 2, "target_modules": "all-linear", **keys})


def moved(model, seed: int = 3):
    """Every weight that learns moved, so that an adapter says something."""
    draw = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for weight in model.parameters():
            if weight.requires_grad:
                weight.add_(0.1 * torch.randn(weight.shape, generator=draw))
    return model


def saved_base(folder: Path, kind: str = "llama", **keys) -> Path:
    """A causal model's folder."""
    tiny.causal(kind, **keys).save_pretrained(folder)
    return folder


def saved_policy(folder: Path, base: Path):
    """An adapter's folder, as SFT leaves it, and the model it was saved from."""
    model = moved(add_adapter(AutoModelForCausalLM.from_pretrained(base), config=lora())).eval()
    model.save_pretrained(folder)
    return model


def saved_scorer(folder: Path, base: Path, adapter=None, **keys):
    """A reward adapter's folder, with its score head, and the model it was saved from."""
    plain = AutoModelForSequenceClassification.from_pretrained(base, **{"num_labels": 1, **keys})
    model = moved(add_adapter(plain, config=adapter or lora()), 4).eval()
    model.save_pretrained(folder)
    return model


def same_state(model, before: dict) -> bool:
    """Whether a model has the weights it had, by the names they had."""
    state = model.state_dict()
    return state.keys() == before.keys() and all(torch.equal(state[n], v) for n, v in before.items())


def copied(model) -> dict:
    return {n: v.clone() for n, v in model.state_dict().items()}


class Rounded(nn.Linear):
    """A layer whose weights were rounded, as a quantised one's are."""

    def __init__(self, layer: nn.Linear) -> None:
        super().__init__(layer.in_features, layer.out_features, layer.bias is not None)
        self.weight = nn.Parameter((layer.weight * 4).round() / 4, requires_grad=False)


def rounded(model):
    """As bitsandbytes leaves a model: layers replaced, heads and embeddings as they were."""
    for name, module in list(model.named_modules()):
        if type(module) is nn.Linear and name not in ("lm_head", "score"):
            model.set_submodule(name, Rounded(module))
    model.hf_quantizer = SimpleNamespace(is_trainable=True)
    return model

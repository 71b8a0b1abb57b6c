"""LoRA adapters through peft: put on a model, saved with its score head, merged away under a check.

An adapter changes the layers in place, so that the model runs in the forest as any other.
"""

from __future__ import annotations

from collections.abc import Sequence
from copy import deepcopy

import torch
from torch import Tensor, nn

TOLERANCE = 1e-4  # of merged against adapter outputs, relative to the largest of them; float32 rounds to 1e-6
HEADS = ("score", "classifier")


def add_adapter(model: nn.Module, rank: int = 8, alpha: float = 16.0, config=None):
    """A peft model whose adapter is trainable, and with it the score head of a classification model, in full.

    Args:
        model: a language model, causal or with an encoder, or one of sequence classification; it is changed
            in place.
        rank: of LoRA (arXiv 2106.09685) on all linear layers but the head.
        alpha: LoRA's outputs are multiplied by alpha / rank.
        config: a peft configuration instead of rank and alpha; its task type becomes the model's, for of
            another one peft would freeze the fresh score head.

    Raises:
        ValueError: the base is quantised (a merge would not be exact), the model has an adapter already, or
            the configuration is of a prompt-learning method, whose virtual tokens no forest knows.
    """
    from peft import TaskType, get_peft_model

    if getattr(model, "hf_quantizer", None) is not None:
        raise ValueError(f"{type(model).__name__} is quantised; an adapter merges into plain weights only")
    if has_adapter(model):
        raise ValueError("the model has an adapter already; merge it first")
    config = config or lora(rank, alpha)
    if config.is_prompt_learning:
        raise ValueError(f"peft_config: {type(config).__name__} adds virtual tokens, which no forest serves")
    config = deepcopy(config)  # peft writes into it
    has_head = any(isinstance(getattr(model, name, None), nn.Module) for name in HEADS)
    speaks = TaskType.SEQ_2_SEQ_LM if model.config.is_encoder_decoder else TaskType.CAUSAL_LM
    config.task_type = TaskType.SEQ_CLS if has_head else speaks
    return get_peft_model(model, config)


def lora(rank: int, alpha: float):
    """The configuration of a LoRA adapter on all linear layers but the head."""
    from peft import LoraConfig

    return LoraConfig(r=rank, lora_alpha=alpha, target_modules="all-linear")


def has_adapter(model: nn.Module) -> bool:
    """Whether the model is one of peft's."""
    return hasattr(model, "peft_config")


def merge_checked(model, documents: Sequence[Sequence[int]], tolerance: float = TOLERANCE):
    """The plain transformers model, adapter and score head merged into its weights, in evaluation mode.

    Args:
        model: of :func:`add_adapter`; used up.
        documents: token ids; on each of them the merged model must say what the adapter said.
        tolerance: largest difference of the logits, relative to the largest logit.

    Raises:
        ValueError: no document, or the merged model says something else; the message gives the figure.
    """
    if not documents:
        raise ValueError("a merge is checked on at least one document")
    wanted = _outputs(model, documents)
    merged = model.merge_and_unload(safe_merge=True)
    found = _outputs(merged, documents)
    far = float((found - wanted).abs().max() / wanted.abs().max().clamp(min=1e-12))
    if not far <= tolerance:
        raise ValueError(
            f"the merged {type(merged).__name__} differs from its adapter by {far:.2e} of the largest output "
            f"on {len(documents)} documents; at most {tolerance:.0e} is rounding"
        )
    return merged


@torch.no_grad()
def _outputs(model: nn.Module, documents: Sequence[Sequence[int]]) -> Tensor:
    """Logits of the documents one by one, without padding, flattened to [N]."""
    model.eval()
    device = next(model.parameters()).device
    rows = [torch.tensor([list(ids)], device=device) for ids in documents]
    if model.config.is_encoder_decoder:
        logits = [model(input_ids=ids, decoder_input_ids=ids).logits for ids in rows]
    else:
        logits = [model(input_ids=ids).logits for ids in rows]
    return torch.cat([each.flatten().double() for each in logits])

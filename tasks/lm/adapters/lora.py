"""LoRA adapters through peft: put on a model, saved with its score head, merged away under a check.

An adapter changes the layers in place, so that the model runs in the forest as any other.
"""

from __future__ import annotations

from collections.abc import Sequence
from copy import deepcopy

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from tasks.lm.adapters.active import POLICY, REFERENCE, add_named, at_work_on, weights_of
from tasks.lm.adapters.kinds import check_kind, rewrites
from tasks.lm.model.kinds import unwrapped
from tasks.lm.model.quantized import is_quantized

TOLERANCE = 1e-4  # of merged against adapter outputs, relative to the largest of them; float32 rounds to 1e-6
HEADS = ("score", "classifier")


def add_adapter(model: nn.Module, rank: int = 8, alpha: float = 16.0, config=None):
    """A peft model whose adapter is trainable, and with it the score head of a classification model, in full.

    Args:
        model: a language model, causal or with an encoder, or one of sequence classification, quantised or
            not; it is changed in place.
        rank: of LoRA (arXiv 2106.09685) on all linear layers but the head.
        alpha: LoRA's outputs are multiplied by alpha / rank.
        config: a peft configuration, or a dict of one (LoRA's where it names no `peft_type`), instead of rank
            and alpha; its task type becomes the model's, for of another one peft would freeze the fresh score
            head.

    Raises:
        ValueError: the model has an adapter already, or the configuration is of one that is not served
            (:func:`tasks.lm.adapters.kinds.check_kind`), or not on this base.
    """
    from peft import TaskType, get_peft_config, get_peft_model, prepare_model_for_kbit_training

    if has_adapter(model):
        raise ValueError("the model has an adapter already; merge it first")
    if isinstance(config, dict):
        config = get_peft_config({"peft_type": "LORA", **config})
    config = deepcopy(_checked(config or lora(rank, alpha)))  # peft writes into it
    _check_cut(model, config)
    if is_quantized(model):
        prepare_model_for_kbit_training(model, use_gradient_checkpointing=False)
    has_head = any(isinstance(getattr(model, name, None), nn.Module) for name in HEADS)
    speaks = TaskType.SEQ_2_SEQ_LM if model.config.is_encoder_decoder else TaskType.CAUSAL_LM
    config.task_type = TaskType.SEQ_CLS if has_head else speaks
    return get_peft_model(model, config)


def stack_adapter(model, config) -> None:
    """A fresh adapter on top of the one that a peft model has, which is frozen and stays at work.

    The lower one is what a reference is then (:func:`tasks.lm.adapters.active.reference_adapters`).

    Args:
        model: a peft model with one adapter, called `reference`; it is changed in place.
        config: a peft configuration.

    Raises:
        ValueError: as :func:`add_adapter`, or an initialisation that would move the base from under the
            lower adapter.
    """
    if init := rewrites(config):
        raise ValueError(
            f"peft_config: init_lora_weights={init!r} would move the base from under the adapter that is "
            "there; merge that one first, or take 'eva' or 'orthogonal'"
        )
    add_named(model, POLICY, _checked(config), draws=True)
    model.base_model.set_adapter([REFERENCE, POLICY])
    for parameter in weights_of(model, REFERENCE).values():
        parameter.requires_grad_(False)


def _checked(config):
    check_kind(config)
    return config


def _check_cut(model: nn.Module, config) -> None:
    """Refuse an initialisation that cannot cut a part out of this base, or would cut another one out."""
    init, name = rewrites(config), type(unwrapped(model)).__name__
    if init and is_quantized(model):
        raise ValueError(
            f"peft_config: init_lora_weights={init!r} would round {name}, which is quantised, again"
        )
    if init == "olora" and any(isinstance(module, Conv1D) for module in model.modules()):
        raise ValueError(f"peft_config: init_lora_weights='olora' does not fit {name}'s layers; take 'pissa'")


def lora(rank: int, alpha: float):
    """The configuration of a LoRA adapter on all linear layers but the head."""
    from peft import LoraConfig

    return LoraConfig(r=rank, lora_alpha=alpha, target_modules="all-linear")


def has_adapter(model: nn.Module) -> bool:
    """Whether the model is one of peft's."""
    return hasattr(model, "peft_config")


def merge_checked(model, documents: Sequence[Sequence[int]], tolerance: float = TOLERANCE):
    """The plain model, adapter and score head merged into its weights, in evaluation mode.

    What is at work merges; adapters beside it (a reward adapter, a reference) go.

    Args:
        model: of :func:`add_adapter`, or a value-head model over one, which then stands over the merged
            model; used up.
        documents: token ids; on each of them the merged model must say what the adapter said.
        tolerance: largest difference of the logits (and of the values), relative to the largest of them.

    Returns:
        The transformers model; the value-head model where one came.

    Raises:
        ValueError: no document, a quantised base, or the merged model says something else; the message gives
            the figure.
    """
    if not documents:
        raise ValueError("a merge is checked on at least one document")
    causal = getattr(model, "pretrained_model", model)
    if is_quantized(causal):
        raise ValueError(
            f"{type(causal.get_base_model()).__name__} is quantised, and a merge would be rounded to its few "
            "bits; load the base in float32 or bfloat16 and merge there (tasks.lm.adapters.merge_onto)"
        )
    wanted = _outputs(model, documents)
    try:
        merged = causal.merge_and_unload(safe_merge=True)
    except (NotImplementedError, RuntimeError) as error:  # a bias that the layer has not, and the like
        what = " ".join(str(error).split())
        raise ValueError(
            f"the adapter of {type(causal.get_base_model()).__name__} cannot merge: {what}"
        ) from error
    if causal is not model:
        model.take_merged(merged)
    for name, before, after in zip(
        ("output", "value"), wanted, _outputs(merged if causal is model else model, documents), strict=False
    ):
        far = float((after - before).abs().max() / before.abs().max().clamp(min=1e-12))
        if not far <= tolerance:
            raise ValueError(
                f"the merged {type(merged).__name__} differs from its adapter by {far:.2e} of the largest "
                f"{name} on {len(documents)} documents; at most {tolerance:.0e} is rounding"
            )
    return merged if causal is model else model


def merge_onto(base: nn.Module, model, documents: Sequence[Sequence[int]], tolerance: float = TOLERANCE):
    """The adapter of a model over a quantised base, merged into that base in full precision.

    The check compares the adapter on `base` with the merged model: the quantised one says something else, by
    as much as its weights are rounded.

    Args:
        base: the same base, not quantised; it becomes the merged model. It takes embeddings, which are not
            quantised, and heads from `model`: a vocabulary that grew is one.
        model: of :func:`add_adapter`, or a value-head model over one, which then stands over the merged one.
        documents: as for :func:`merge_checked`.
        tolerance: likewise.

    Raises:
        ValueError: `base` is quantised as well; and as :func:`merge_checked`.
    """
    from peft import get_peft_model_state_dict, set_peft_model_state_dict

    if is_quantized(base):
        raise ValueError("base is quantised as well; load it in float32 or bfloat16")
    causal = getattr(model, "pretrained_model", model)
    (name,) = at_work_on(causal)
    with torch.no_grad():
        for tables in ("get_input_embeddings", "get_output_embeddings"):
            if (table := getattr(causal.get_base_model(), tables)()) is not None:
                getattr(base, tables)().weight.copy_(table.weight)
    with torch.random.fork_rng(devices=[]):
        plain = add_adapter(base, config=causal.peft_config[name])
    set_peft_model_state_dict(plain, get_peft_model_state_dict(causal, adapter_name=name))
    if causal is model:
        return merge_checked(plain.to(base.device), documents, tolerance)
    model.take_merged(plain)
    return merge_checked(model, documents, tolerance)


@torch.no_grad()
def _outputs(model: nn.Module, documents: Sequence[Sequence[int]]) -> list[Tensor]:
    """Logits, and values where there are some, of the documents one by one, flattened to [N] each."""
    model.eval()
    device, found = next(model.parameters()).device, []
    for ids in documents:
        row = torch.tensor([list(ids)], device=device)
        more = {"decoder_input_ids": row} if model.config.is_encoder_decoder else {}
        out = model(input_ids=row, **more)
        found.append((out[0], out[2]) if isinstance(out, tuple) else (out.logits,))
    return [torch.cat([each.flatten().double() for each in part]) for part in zip(*found, strict=True)]

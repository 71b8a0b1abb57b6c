"""What PPOTrainer is made of, checked before anything is done: models, tokenizer, optimizer."""

from __future__ import annotations

import torch
from torch import nn

from tasks.lm.adapters.kinds import check_adapters
from tasks.lm.heads.value_head import ModelWithValueHead
from tasks.lm.model.freezing import blocks_of
from tasks.lm.model.kinds import is_seq2seq, unwrapped


def causal_of(model: nn.Module) -> nn.Module:
    """The language model of one with a value head; another one as it is."""
    return getattr(model, "pretrained_model", model)


def vocabulary_of(model: nn.Module) -> int:
    """Tokens that a language model, with or without a value head, can say."""
    return unwrapped(causal_of(model)).get_output_embeddings().weight.shape[0]


def check_models(model, ref_model, tokenizer) -> None:
    """Refuse what PPO cannot train, compare with or end a response by.

    Raises:
        ValueError: as :class:`tasks.ppo.trainer.PPOTrainer`; the message names the argument.
    """
    if not isinstance(model, ModelWithValueHead):
        raise ValueError(
            "model must be an AutoModelForCausalLMWithValueHead or AutoModelForSeq2SeqLMWithValueHead, not "
            f"{type(model).__name__}"
        )
    for name in ("eos_token_id", "pad_token_id"):
        if getattr(tokenizer, name, None) is None:
            raise ValueError(f"tokenizer: it has no {name}")
    if ref_model is None:
        return
    other = unwrapped(causal_of(ref_model)) if isinstance(ref_model, nn.Module) else None
    if getattr(other, "get_output_embeddings", lambda: None)() is None:
        raise ValueError(f"ref_model must be a language model, not {type(ref_model).__name__}")
    check_adapters(causal_of(ref_model), "ref_model")
    if causal_of(ref_model) is causal_of(model):
        raise ValueError("ref_model is the model itself, which would move with it; leave it out for a copy")
    names = [type(unwrapped(causal_of(each))).__name__ for each in (model, ref_model)]
    if is_seq2seq(causal_of(model)) != is_seq2seq(causal_of(ref_model)):
        raise ValueError(f"ref_model is a {names[1]}, the model a {names[0]}; one of both has an encoder")
    own, other = vocabulary_of(model), vocabulary_of(ref_model)
    if own != other:
        raise ValueError(f"ref_model has a vocabulary of {other} tokens, the model one of {own}")


def check_own_optimizer(optimizer, model: nn.Module) -> None:
    """One that moves another model would let this one stand still, and say nothing.

    Raises:
        ValueError: it holds none of the model's parameters.
    """
    if optimizer is None:
        return
    held = [p for group in getattr(optimizer, "param_groups", []) for p in group["params"]]
    own = set(map(id, model.parameters()))
    if not any(id(p) in own for p in held):
        raise ValueError("optimizer holds none of the model's parameters; nothing would be learnt")


def check_lr_scheduler(scheduler) -> None:
    """Refuse what no step could move.

    Raises:
        ValueError: it is no learning rate scheduler of torch.
    """
    if scheduler is not None and not isinstance(scheduler, torch.optim.lr_scheduler.LRScheduler):
        name = type(scheduler).__name__
        raise ValueError(f"lr_scheduler must be one of torch.optim.lr_scheduler, not {name}")


def check_value_layers(asked: int | None, model: ModelWithValueHead) -> None:
    """Refuse another number of value blocks than the head was made with. 0 asks for nothing, None for all.

    Raises:
        ValueError: the two numbers.
    """
    branch = model.v_head.branch
    there = 0 if branch is None else len(branch.blocks)
    wanted = len(blocks_of(model.pretrained_model)) if asked is None else asked
    if wanted not in (0, there):
        raise ValueError(
            f"ppo.num_value_layers_unfrozen is {asked}, but the model's value head has {there} blocks of its "
            f"own; load it with num_value_layers_unfrozen={wanted}"
        )

"""What a reward training is fitted to before it begins: tokens, pairs' weights, a rule on length."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from tasks.lm.model.ends import ends_of, give_pad, ids_of
from tasks.lm.model.kinds import is_encoder, unwrapped
from tasks.lm.model.loading import fit_embeddings
from tasks.reward.losses import gap_weights, length_rule
from tasks.reward.records import GroupedAnswers, ends_with


def fit_special_tokens(model, tokenizer) -> None:
    """Give a tokenizer a pad token apart from eos, and the model its tokens and its ids.

    Raises:
        ValueError: there is no eos token to read a score at, or no pad id apart from it.
    """
    bare = unwrapped(model)
    if tokenizer is not None:
        if tokenizer.eos_token_id is None and not is_encoder(model):
            raise ValueError(f"processing_class: no eos token, which {type(bare).__name__} is read at")
        give_pad(tokenizer, ends_of(bare))
        fit_embeddings(bare, tokenizer)
    pad, eos = bare.config.pad_token_id, bare.config.eos_token_id
    if pad is None or pad in ids_of(eos):
        raise ValueError(
            f"{type(bare).__name__}: pad_token_id is {pad}, eos_token_id {eos}; transformers reads the score "
            "at the last token that is not pad, so give processing_class, or set another pad_token_id"
        )


def ends_to_leave_out(
    model, tokenizer, groups: Sequence[GroupedAnswers] | None, share: float
) -> tuple[int, ...]:
    """The eos tokens without which answers are read as well, where there is a share of that.

    Raises:
        ValueError: an encoder, whose documents have no end of their own; no answer ends with one.
    """
    if not share:
        return ()
    if is_encoder(model):
        name = type(unwrapped(model)).__name__
        raise ValueError(f"without_eos_share is {share}, but {name} is an encoder, which reads no eos; set 0")
    ends = ends_of(unwrapped(model), tokenizer)
    if groups and not any(ends_with(response, ends) for group in groups for response in group.responses):
        raise ValueError(f"without_eos_share is {share}, but no answer of train_dataset ends with eos {ends}")
    return ends


def weighted_by_gap(groups: Sequence[GroupedAnswers], power: float) -> list[GroupedAnswers]:
    """Pairs that weigh by :func:`tasks.reward.losses.gap_weights`."""
    factors = iter(gap_weights([gap for group in groups for gap in group.gaps], power))
    return [
        replace(group, weights=tuple(group.weight(i) * next(factors) for i in range(len(group.pairs))))
        for group in groups
    ]


def length_rule_of(groups: Sequence[GroupedAnswers]) -> float:
    """:func:`tasks.reward.losses.length_rule` of the pairs of groups."""
    pairs = [(group, i) for group in groups for i in range(len(group.pairs))]
    return length_rule([g.longer(i) for g, i in pairs], [g.weight(i) for g, i in pairs])

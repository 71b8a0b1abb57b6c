"""Special tokens are facts of the base model: every token that ends a text of it, and the pad it came with.

A chat model ends a turn by one token and a text by another, so its generation configuration lists several.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from typing import Any
from weakref import WeakKeyDictionary

PAD = "<|pad|>"
_PAD_OF_BASE: WeakKeyDictionary[Any, str] = WeakKeyDictionary()  # where another one pads in its stead


def ids_of(eos: int | Collection[int] | None) -> tuple[int, ...]:
    """One id, several or none, as configurations hold them."""
    if eos is None:
        return ()
    return (eos,) if isinstance(eos, int) else tuple(dict.fromkeys(eos))


def ends_of(model, tokenizer=None) -> tuple[int, ...]:
    """The tokens each of which ends a text of a model: the tokenizer's eos, then those of its configurations.

    What its generation configuration says goes before its configuration, unless that one is a list.
    """
    bare = getattr(model, "module", model)
    bare = bare.get_base_model() if hasattr(bare, "get_base_model") else bare
    said = ids_of(getattr(getattr(bare, "generation_config", None), "eos_token_id", None))
    of_config = getattr(bare.config, "eos_token_id", None)
    if not said or not isinstance(of_config, int | None):
        said += ids_of(of_config)
    return tuple(dict.fromkeys((*ids_of(getattr(tokenizer, "eos_token_id", None)), *said)))


def closed(responses: Sequence[Sequence[int]], ends: Collection[int], eos: int) -> list[list[int]]:
    """Responses as a reward model reads them: one that ended, by whichever of `ends`, ends with its eos.

    With that one the documents ended that taught it.
    """
    return [[*r[:-1], eos] if len(r) and r[-1] in ends else list(r) for r in responses]


def fit_special_tokens(model, tokenizer) -> None:
    """Tell a model the tokenizer's eos, beside those it has, and the tokenizer's pad where it has none.

    What the tokenizer has not, the model keeps; a list of eos ids stays one. A model of sequence
    classification takes the tokenizer's pad in any case: transformers reads its score at the last token that
    is not that one.
    """
    generation, config = getattr(model, "generation_config", None), model.config
    eos, pad, ends = tokenizer.eos_token_id, tokenizer.pad_token_id, ends_of(model)
    if generation is not None and eos is not None:
        generation.eos_token_id = _joined(ends, eos, is_list=isinstance(generation.eos_token_id, list))
    is_list = isinstance(config.eos_token_id, list)
    if eos is not None:
        config.eos_token_id = _joined(ids_of(config.eos_token_id), eos, is_list) if is_list else eos
    for each in (config, generation):
        if each is not None and pad is not None and (each.pad_token_id is None or generation is None):
            each.pad_token_id = pad


def _joined(ids: Sequence[int], eos: int, is_list: bool) -> int | list[int]:
    found = list(dict.fromkeys([*ids, eos]))
    return found if is_list or len(found) > 1 else eos


def give_pad(tokenizer, ends: Collection[int] = ()) -> None:
    """A pad token that ends no text, where it has none.

    It becomes unk or bos where one of these ends no text; otherwise `<|pad|>` is added (the model's
    embeddings must then grow: see :func:`tasks.lm.model.loading.fit_embeddings`).

    Args:
        tokenizer: its own eos ends a text.
        ends: further ids that do.
    """
    taken = {tokenizer.eos_token_id, *ends}
    if tokenizer.pad_token_id is None or tokenizer.pad_token_id in taken:
        before = tokenizer.pad_token
        spare = (getattr(tokenizer, f"{name}_token") for name in ("unk", "bos"))
        pad = next((t for t in spare if t and tokenizer.convert_tokens_to_ids(t) not in taken), None)
        tokenizer.add_special_tokens({"pad_token": pad or PAD})
        if before is not None:
            _PAD_OF_BASE.setdefault(tokenizer, before)


def save_tokenizer(tokenizer, folder) -> None:
    """Beside a language model: with the pad that it came with, should training have needed another."""
    with _pad_of_base(tokenizer):
        tokenizer.save_pretrained(folder)


@contextmanager
def _pad_of_base(tokenizer) -> Iterator[None]:
    own, now = _PAD_OF_BASE.get(tokenizer), getattr(tokenizer, "pad_token", None)
    if own is not None:
        tokenizer.pad_token = own
    try:
        yield
    finally:
        if own is not None:
            tokenizer.pad_token = now


def same_words(tokenizer, other) -> bool:
    """Whether two tokenizers give the same ids and the same eos; a pad that was added for training aside."""
    words, others = ({w: i for w, i in t.get_vocab().items() if w != PAD} for t in (tokenizer, other))
    return words == others and tokenizer.eos_token_id == other.eos_token_id

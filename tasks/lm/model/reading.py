"""One text has one tokenisation, on every road to a model: the kind of the row says which, nothing else.

A *text* is a stranger's: what it writes are letters, also where they spell `</s>` or `<|im_end|>`. *Messages*
are rendered by the model's own chat template and read as the model reads them: markers are their tokens.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal
from weakref import WeakKeyDictionary, WeakSet

Kind = Literal["text", "messages"]
TRIES = 3  # a text without a special token's letters is found in one, but for strange normalisers
PLAIN = {"return_attention_mask": False, "return_token_type_ids": False}


def encode(tokenizer, rows: Sequence, kind: Kind, **template: Any) -> list[list[int]]:
    """Token ids of each row, with what the tokenizer, or the template, puts around one.

    Args:
        tokenizer: of the model that will read them.
        rows: texts, or conversations (`[{"role": "user", "content": "…"}, …]`).
        kind: which of the two.
        template: for messages, what :func:`render` takes.

    Raises:
        ValueError: a text in which the tokenizer reads a special token whatever is done; no chat template.
    """
    if kind == "messages":
        return [list(render(tokenizer, turns, **template)["input_ids"]) for turns in rows]
    if template:
        raise ValueError(f"{', '.join(template)}: for messages; a text has no template")
    return _encode_texts(tokenizer, list(rows)) if rows else []


def render(tokenizer, turns: Sequence[Mapping], **template: Any) -> Mapping[str, Any]:
    """A conversation under the tokenizer's chat template, markers read as tokens and no bos but its own.

    Args:
        tokenizer: its template is applied.
        turns: the messages.
        template: as for `apply_chat_template`: `tools`, `add_generation_prompt`, …

    Returns:
        `input_ids`, and `assistant_masks` where `return_assistant_tokens_mask` is given.

    Raises:
        ValueError: the tokenizer has no chat template.
    """
    if not getattr(tokenizer, "chat_template", None):
        raise ValueError("a conversation, and the tokenizer has no chat template")
    if getattr(tokenizer, "split_special_tokens", False):  # a setting of the tokenizer's that is for texts
        template["tokenizer_kwargs"] = {"split_special_tokens": False}
    return tokenizer.apply_chat_template(list(turns), tokenize=True, return_dict=True, **template)


def harmless(tokenizer, texts: Sequence[str]) -> list[str]:
    """The texts, with a space inside of what would be read as a special token in spite of everything.

    With `split_special_tokens` most tokenizers read such letters as letters. For some the token is a word of
    the vocabulary like any other (SentencePiece's Unigram, WordLevel).

    Raises:
        ValueError: nothing helps.
    """
    special = _special_of(tokenizer)
    return [_defused(tokenizer, text, special) if special.ids else text for text in texts]


def marker_in(tokenizer, text: str) -> str | None:
    """The first special token that a text spells; None: it spells none."""
    found = _special_of(tokenizer).spelled.search(text)
    return found and found[0]


def warn_of_marker(tokenizer, text: str) -> None:
    """Say, once for a tokenizer, that a row of text spells a special token; most likely it was rendered."""
    if tokenizer not in _WARNED and (marker := marker_in(tokenizer, text)):
        _WARNED.add(tokenizer)
        _log.warning(
            "a row of text spells %s, which is read as letters; where the token is meant, give messages or "
            "input_ids", marker,
        )  # fmt: skip


@dataclass(frozen=True, slots=True)
class _Special:
    """Special tokens of a tokenizer as it was when there were `size` tokens."""

    size: int
    ids: frozenset[int]  # unk is none of them: what it stands for was no token
    around: int  # of them around every text
    spelled: re.Pattern[str]


_KNOWN: WeakKeyDictionary[Any, _Special] = WeakKeyDictionary()
_WARNED: WeakSet[Any] = WeakSet()
_log = logging.getLogger(__name__)


def _special_of(tokenizer) -> _Special:
    size = len(tokenizer) if hasattr(tokenizer, "__len__") else 0
    known = _KNOWN.get(tokenizer)
    if known is None or known.size != size:
        words = {t.content: i for i, t in _added(tokenizer).items() if t.special}
        words |= dict(zip(getattr(tokenizer, "all_special_tokens", ()),
                          getattr(tokenizer, "all_special_ids", ()), strict=True))  # fmt: skip
        named = {getattr(tokenizer, f"{name}_token_id", None) for name in ("bos", "eos", "cls", "sep")}
        ids = frozenset(words.values()) - ({getattr(tokenizer, "unk_token_id", None)} - named)
        around = sum(map(ids.__contains__, tokenizer([""], **PLAIN)["input_ids"][0])) if ids else 0
        longest_first = sorted(filter(None, words), key=len, reverse=True)
        spelled = re.compile("|".join(map(re.escape, longest_first)) or "(?!)")
        known = _KNOWN[tokenizer] = _Special(size, ids, around, spelled)
    return known


def _added(tokenizer) -> Mapping[int, Any]:
    return getattr(tokenizer, "added_tokens_decoder", None) or {}


def _encode_texts(tokenizer, texts: list[str]) -> list[list[int]]:
    found = tokenizer(texts, split_special_tokens=True, **PLAIN)["input_ids"]
    special = _special_of(tokenizer)
    for i, ids in enumerate(found):
        if sum(map(special.ids.__contains__, ids)) > special.around:
            text = _defused(tokenizer, texts[i], special)
            found[i] = tokenizer([text], split_special_tokens=True, **PLAIN)["input_ids"][0]
    return found


def _defused(tokenizer, given: str, special: _Special) -> str:
    text = given
    for _ in range(TRIES):
        ids = tokenizer([text], split_special_tokens=True, **PLAIN)["input_ids"][0]
        if sum(map(special.ids.__contains__, ids)) <= special.around:
            return text
        for first, stop in reversed(_spans(tokenizer, text, special)):
            text = f"{text[: first + 1]} {text[first + 1 : stop]}{text[stop:]}"
    raise ValueError(f"{type(tokenizer).__name__} reads a special token in the text {given!r:.60}")


def _spans(tokenizer, text: str, special: _Special) -> list[tuple[int, int]]:
    """Where the letters stand that were read as special tokens."""
    if not getattr(tokenizer, "is_fast", False):
        return [found.span() for found in special.spelled.finditer(text)]
    read = tokenizer(text, split_special_tokens=True, return_offsets_mapping=True)
    pairs = zip(read["input_ids"], read["offset_mapping"], strict=True)
    return [(first, stop) for token, (first, stop) in pairs if token in special.ids and stop > first]

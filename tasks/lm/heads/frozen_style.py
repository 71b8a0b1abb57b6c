"""The score of an answer by two experts: how it is written, and what a frozen encoder makes of it.

    score = style · features(question, answer) + states · mean of the encoder's states over the answer

Both are linear, and the second was fitted with what the first says given (product of experts, arXiv
2310.05199). The encoder reads `[CLS] question [SEP] answer [SEP]`, the first tokens of each; the features see
all of both.

This file imports nothing of this package: it travels inside a registered model too, so that a score is one
number wherever it is asked for.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Sequence
from math import log1p
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

HEAD = "head.json"  # beside the encoder's plain transformers folder
FORMAT = 1
COUNTED = ("characters", "code blocks", "links", "paragraphs", "words of the question")  # each ln(1 + count)
WRITTEN = (
    "lower-case sentences", "sloppy words", "spaces before punctuation", "letters a word",  # shares
    "digits", "bold", "list items", "headings", "quotes", "dollars", "ellipses", "question marks",
    "sentences", "longest paragraph", "reasons",  # each ln(1 + count)
    "other answers", "comments", "same problem", "sources", "edits", "open end", "lower-case start",
    "at sign", "image",  # 0 or 1
)  # fmt: skip
_FENCE, _LINK = re.compile(r"^ {0,3}```", re.MULTILINE), re.compile(r"https?://")
_GAP, _WORD = re.compile(r"\n\s*\n"), re.compile(r"\w+")
_SENTENCE = re.compile(r"(?<=[.!?])\s+|\n+")
_SLOPPY = re.compile(r"\bi\b|\bi'm\b|\bim\b|\bdont\b|\bcant\b|\bu\b|\bplz\b")
_SPACED = re.compile(r" ,|,[A-Za-z]|\s\.")
_MARKS = [re.compile(pattern, re.MULTILINE) for pattern in (
    r"\d", r"\*\*", r"^\s*([-*+]|\d+\.) ", r"^#+ |^=+$|^-+$", r"^>", r"\$", r"!!|\?\?|\.\.\.",
    r"\?")]  # fmt: skip
_ASIDES = [re.compile(pattern) for pattern in (
    r"other answer|above|already (been )?(said|mention)|\+1|agree with|as .{1,30} (said|mention|point)",
    r"comment|reputation|low rep", r"\b(i have|i had|i am having|same (problem|issue|question))\b",
    r"\b(source|reference|paper|according to|wikipedia|study|book)\b", r"\b(edit|update)\b *:")]  # fmt: skip
_REASONS = ("however", "because", "therefore")


def text_features(question: str, answer: str) -> list[float]:
    """The logarithms, after adding one, of what `COUNTED` counts in an answer in markdown, [5]."""
    asked, said = (set(_WORD.findall(text.lower())) for text in (question, answer))
    blocks, links = len(_FENCE.findall(answer)) // 2, len(_LINK.findall(answer))
    paragraphs = len(_GAP.findall(answer.strip())) + 1
    return [log1p(count) for count in (len(answer), blocks, links, paragraphs, len(asked & said))]


def style_features(text: str) -> list[float]:
    """How an answer in markdown is written: the shares, counts and yes or no of `WRITTEN`, [24]."""
    words, lower = len(_WORD.findall(text)) + 5, text.lower()
    sentences = [part for part in _SENTENCE.split(text) if part.strip()]
    shares = [
        sum(part.lstrip()[0].islower() for part in sentences) / (len(sentences) + 1),
        len(_SLOPPY.findall(text)) / words,
        len(_SPACED.findall(text)) / words,
        sum(map(len, _WORD.findall(text))) / words,
    ]
    counts = [len(pattern.findall(text)) for pattern in _MARKS]
    counts += [len(sentences), max(map(len, text.split("\n\n"))), sum(lower.count(w) for w in _REASONS)]
    asides = [bool(pattern.search(lower)) for pattern in _ASIDES]
    ends = [text.rstrip()[-1:].isalnum(), text[:1].islower(), "@" in text, "![" in text]
    return [*shares, *map(log1p, counts), *map(float, asides + ends)]


def features_of(questions: Sequence[str], answers: Sequence[str]) -> Tensor:
    """Both of the above. B, B texts -> [B, 29] float64."""
    rows = [[*text_features(q, a), *style_features(a)] for q, a in zip(questions, answers, strict=True)]
    return torch.tensor(rows, dtype=torch.float64).reshape(-1, len(COUNTED) + len(WRITTEN))


class Head(NamedTuple):
    """What is learnt, and what is read: `Head(36, 89, (0.4, …), (0.01, …))`."""

    question_tokens: int  # first tokens of the question
    answer_tokens: int  # first tokens of the answer
    style: tuple[float, ...]  # [29] log-odds per unit of each feature
    states: tuple[float, ...]  # [H] log-odds per unit of each mean state

    def text(self) -> str:
        """As JSON, the features by name; numbers in full."""
        style = dict(zip((*COUNTED, *WRITTEN), self.style, strict=True))
        return json.dumps({"format": FORMAT, **self._asdict(), "style": style}, indent=1) + "\n"

    @classmethod
    def read(cls, folder: Path) -> Head:
        """From a model's folder.

        Raises:
            ValueError: its head.json is of another format, or lacks a feature.
        """
        path = Path(folder) / HEAD
        found = json.loads(path.read_text(encoding="utf-8"))
        missing = [name for name in (*COUNTED, *WRITTEN) if name not in found.get("style", {})]
        if found.get("format") != FORMAT or missing:
            lacks = f"; it lacks {missing[0]!r}" if missing else ""
            raise ValueError(f"{path}: format {found.get('format')!r}, {FORMAT} is read{lacks}")
        style = tuple(found["style"][name] for name in (*COUNTED, *WRITTEN))
        return cls(found["question_tokens"], found["answer_tokens"], style, tuple(found["states"]))


class FrozenStyle:
    """Both experts over texts: `FrozenStyle(encoder, tokenizer, head, read).scores(["How?"], ["So."])`."""

    def __init__(
        self, encoder: Any, tokenizer: Any, head: Head, read: Callable[[list[str]], list[list[int]]]
    ) -> None:
        """Put the parts together.

        Args:
            encoder: of transformers, without a head; dropout is off from now on.
            tokenizer: its own, which puts its cls token before a text and its sep token behind.
            head: for mean states of as many dimensions; none yet: only `means` is asked for.
            read: texts -> the tokenizer's ids of each, letters that spell a special token read as letters.

        Raises:
            ValueError: the tokenizer puts other tokens around a text, or the head is another encoder's.
        """
        self.encoder, self.tokenizer, self.head, self._read = encoder.eval(), tokenizer, head, read
        self._around = [tokenizer.cls_token_id, tokenizer.sep_token_id]
        if None in self._around or read([""])[0] != self._around:
            raise ValueError("its tokenizer does not put a cls token before a text and a sep token behind it")
        if head.states and len(head.states) != encoder.config.hidden_size:
            size = encoder.config.hidden_size
            raise ValueError(f"its head is for {len(head.states)} states, the encoder has {size}")

    def scores(self, questions: Sequence[str], answers: Sequence[str], rows: int = 64) -> Tensor:
        """Log-odds of each answer, at most `rows` in one forward. B, B texts -> [B] float64 on the CPU."""
        style, states = (torch.tensor(part, dtype=torch.float64) for part in self.head[2:])
        seen = self.means(questions, answers, rows).double()
        # row by row, so that a score does not hang on its neighbours by a rounding
        return (features_of(questions, answers) * style).sum(1) + (seen * states).sum(1)

    @torch.no_grad()
    def means(self, questions: Sequence[str], answers: Sequence[str], rows: int = 64) -> Tensor:
        """Mean state over each answer and its closing token. B, B texts -> [B, H] float32 on the CPU."""
        cls, sep = self._around
        asked = [[cls, *ids, sep] for ids in self._ids(questions, self.head.question_tokens)]
        said = [[*ids, sep] for ids in self._ids(answers, self.head.answer_tokens)]
        order = sorted(range(len(said)), key=lambda i: len(asked[i]) + len(said[i]))
        found = torch.empty(len(said), self.encoder.config.hidden_size)
        for first in range(0, len(order), rows):
            some = order[first : first + rows]
            found[some] = self._means([asked[i] for i in some], [said[i] for i in some]).cpu()
        return found

    def _ids(self, texts: Sequence[str], most: int) -> list[list[int]]:
        different = list(dict.fromkeys(texts))
        known = dict(zip(different, self._read(different), strict=True)) if different else {}
        return [known[text][1:-1][:most] for text in texts]

    def _means(self, asked: list[list[int]], said: list[list[int]]) -> Tensor:
        """[B, H] float32, of rows padded to the longest."""
        config, device = self.encoder.config, self.encoder.device
        rows = [torch.tensor(q + a, device=device) for q, a in zip(asked, said, strict=True)]
        places = torch.arange(max(map(len, rows)), device=device)
        starts, ends = (torch.tensor(list(map(len, each)), device=device)[:, None] for each in (asked, rows))
        is_real, is_said = places < ends, (places >= starts) & (places < ends)  # [B, T]
        pad = config.pad_token_id or 0
        ids = pad_sequence(rows, batch_first=True, padding_value=pad)
        keys = {"input_ids": ids, "attention_mask": is_real.long()}
        if (getattr(config, "type_vocab_size", None) or 0) > 1:
            keys["token_type_ids"] = is_said.long()
        states = self.encoder(**keys).last_hidden_state.float()
        return (states * is_said[..., None]).sum(1) / is_said.sum(1, keepdim=True)

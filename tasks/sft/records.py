"""Packed rows, and the forest a batch of them makes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby

import torch

from tasks.lm.attention.forest import Forest, Segment, plant


@dataclass(frozen=True, slots=True)
class Document:
    """Tokens of one document.

    Miniature: `Document((5, 6, 7, 1), prompt=2)` learns 7 and 1 where the loss is on responses;
    `Document((5, 6, 7, 1), 0, ignored=(0, 2))` learns 6 and 1, wherever the loss is.
    """

    tokens: tuple[int, ...]
    prompt: int  # tokens of its prompt; 0: there is none
    ignored: tuple[int, ...] = ()  # places that are read and never learnt
    is_dialogue: bool = False  # its prompt is the turns before the last

    def teaches(self, loss_on: str) -> bool:
        """Whether a token is left to learn; nothing predicts the first."""
        first = max(1, self.prompt) if loss_on == "response" else 1
        return not set(range(first, len(self.tokens))) <= set(self.ignored)


@dataclass(frozen=True, slots=True)
class PackedRow:
    """Documents one after another.

    Miniature: `PackedRow((5, 6, 1, 7, 1), (3, 2), (2, 1))` holds two documents, of 3 and 2 tokens, whose
    prompts take the first 2 and the first 1.
    """

    tokens: tuple[int, ...]
    lengths: tuple[int, ...]  # tokens of each document
    prompts: tuple[int, ...]  # tokens of each document's prompt; 0: there is none
    ignored: tuple[int, ...] = ()  # places in the row that are read and never learnt

    def documents(self) -> list[tuple[int, ...]]:
        """The documents of the row."""
        ends = [sum(self.lengths[: i + 1]) for i in range(len(self.lengths))]
        return [self.tokens[e - n : e] for e, n in zip(ends, self.lengths, strict=True)]

    def ignored_of_documents(self) -> list[set[int]]:
        """What is ignored in each document, counted from its first token."""
        starts = [sum(self.lengths[:i]) for i in range(len(self.lengths))]
        return [
            {i - s for i in self.ignored if s <= i < s + n} for s, n in zip(starts, self.lengths, strict=True)
        ]


def collate(rows: Sequence[PackedRow], loss_on: str = "all") -> dict[str, Forest | torch.Tensor]:
    """Rows -> one forest, the places that predict a wanted token of their own document, and those tokens.

    Neighbours with the same prompt share it: the prompt is a root, and what follows it in each document a
    child. The loss is that of the documents one by one; a shared token is computed once.

    Returns:
        forest; `predicts` [N] places in the row; `labels` [N] the tokens predicted there. The first token of
        a document is predicted by nothing; with `loss_on="response"` nor are those of a prompt; nor, ever,
        those a row ignores.
    """
    segments: list[Segment] = []
    chains: list[list[int]] = []  # the segments of each document
    learnt: list[list[int]] = []  # places in each document
    for row in rows:
        of_row = zip(row.documents(), row.prompts, row.ignored_of_documents(), strict=True)
        for prompt, alike in groupby(of_row, lambda found: found[0][: found[1]]):
            some, root = list(alike), []
            if len(some) > 1 and 0 < len(prompt) < min(len(text) for text, _, _ in some):
                root = [len(segments)]
                segments.append(Segment(prompt))
            first = max(1, len(prompt)) if loss_on == "response" else 1
            for text, _, ignored in some:
                chains.append([*root, len(segments)])
                segments.append(Segment(text[len(prompt) :], root[0]) if root else Segment(text))
                learnt.append([i for i in range(first, len(text)) if i not in ignored])
    forest = plant(segments)
    predicts, targets = [], []
    for chain, wanted in zip(chains, learnt, strict=True):
        places = torch.cat(
            [torch.arange(forest.starts[i], forest.starts[i] + forest.lengths[i]) for i in chain]
        )
        index = torch.tensor(wanted, dtype=torch.long)
        predicts.append(places[index - 1])
        targets.append(places[index])
    return {"forest": forest, "predicts": torch.cat(predicts), "labels": forest.tokens[torch.cat(targets)]}

"""Packed rows, and the forest a batch of them makes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby

import torch

from tasks.lm.forest import Forest, Segment, plant


@dataclass(frozen=True, slots=True)
class PackedRow:
    """Documents one after another.

    Miniature: `PackedRow((5, 6, 1, 7, 1), (3, 2), (2, 1))` holds two documents, of 3 and 2 tokens, whose
    prompts take the first 2 and the first 1.
    """

    tokens: tuple[int, ...]
    lengths: tuple[int, ...]  # tokens of each document
    prompts: tuple[int, ...]  # tokens of each document's prompt; 0: there is none

    def documents(self) -> list[tuple[int, ...]]:
        """The documents of the row."""
        ends = [sum(self.lengths[: i + 1]) for i in range(len(self.lengths))]
        return [self.tokens[e - n : e] for e, n in zip(ends, self.lengths, strict=True)]


def collate(rows: Sequence[PackedRow], loss_on: str = "all") -> dict[str, Forest | torch.Tensor]:
    """Rows -> one forest, the places that predict a wanted token of their own document, and those tokens.

    Neighbours with the same prompt share it: the prompt is a root, and what follows it in each document a
    child. The loss is that of the documents one by one; a shared token is computed once.

    Returns:
        forest; `predicts` [N] places in the row; `labels` [N] the tokens predicted there. The first token of
        a document is predicted by nothing; with `loss_on="response"` nor are those of a prompt.
    """
    segments: list[Segment] = []
    documents: list[
        tuple[list[int], int]
    ] = []  # the segments of a document, and how many tokens are not learnt
    for row in rows:
        for prompt, alike in groupby(zip(row.documents(), row.prompts, strict=True), lambda d: d[0][: d[1]]):
            texts = [text for text, _ in alike]
            root = []
            if len(texts) > 1 and 0 < len(prompt) < min(map(len, texts)):
                root = [len(segments)]
                segments.append(Segment(prompt))
            for text in texts:
                documents.append(
                    ([*root, len(segments)], max(1, len(prompt)) if loss_on == "response" else 1)
                )
                segments.append(Segment(text[len(prompt) :], root[0]) if root else Segment(text))
    forest = plant(segments)
    predicts, targets = [], []
    for chain, skipped in documents:
        places = torch.cat(
            [torch.arange(forest.starts[i], forest.starts[i] + forest.lengths[i]) for i in chain]
        )
        predicts.append(places[skipped - 1 : -1])
        targets.append(places[skipped:])
    return {"forest": forest, "predicts": torch.cat(predicts), "labels": forest.tokens[torch.cat(targets)]}

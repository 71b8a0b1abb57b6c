"""Scores of a reward model: one per document, read at its last token."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from tasks.lm.forest import Forest, Segment, enable_forest, plant, run_forest


def forest_scores(model, forest: Forest, ends: Tensor) -> Tensor:
    """Scores at the places `ends` of a forest. ends [A] -> [A], float32.

    Raises:
        ValueError: the model has no `score` head over a backbone.
    """
    if not hasattr(model, "score"):
        raise ValueError(f"{type(model).__name__} has no score head")
    hidden = run_forest(model.base_model, forest).last_hidden_state[0, ends]
    return model.score(hidden).squeeze(-1).float()


def ends_of(forest: Forest, segments: Sequence[int]) -> Tensor:
    """Places of the last tokens of the named segments, [A]."""
    ends = [forest.starts[i] + forest.lengths[i] - 1 for i in segments]
    return torch.tensor(ends, device=forest.tokens.device)


@torch.no_grad()
def score_documents(model, documents: Sequence[Sequence[int]], rows: int) -> Tensor:
    """Scores of whole documents (prompt + response), at most `rows` in one forward.

    B lists -> [B] on the CPU.
    """
    enable_forest(model)
    model.eval()
    scores = []
    for first in range(0, len(documents), rows):
        forest = plant([Segment(d) for d in documents[first : first + rows]]).to(model.device)
        scores.append(forest_scores(model, forest, ends_of(forest, range(len(forest.starts)))))
    return torch.cat(scores).cpu()

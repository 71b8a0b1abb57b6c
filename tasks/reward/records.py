"""A question with its answers, what may be wrong with it, and the forest a batch of them makes."""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace

import torch

from tasks.lm.attention.forest import Segment, plant

NOTHING = -1  # in a pair: not an answer but the score 0


@dataclass(frozen=True, slots=True)
class GroupedAnswers:
    """A prompt, its responses, and pairs (better, worse).

    Miniature: in `GroupedAnswers((5, 6), ((7, 1), (8, 1)), ((1, 0),), (0.5,), (3.0,))` the second response is
    better; the pair counts half, and its scores were three apart. A response that is good in itself is better
    than `NOTHING`: `GroupedAnswers((5, 6), ((7, 1),), ((0, NOTHING),))`; a bad one is worse.
    """

    prompt: tuple[int, ...]  # may be empty
    responses: tuple[tuple[int, ...], ...]
    pairs: tuple[tuple[int, int], ...]
    weights: tuple[float, ...] = ()  # of each pair; empty: 1 for all
    gaps: tuple[float, ...] = ()  # difference of the published scores of each pair; empty: not known
    name: str = ""  # for messages: site/question, or the number of a row
    odds: tuple[float, ...] = ()  # log-odds that another expert gives each pair; empty: it has no opinion

    def tokens(self, is_causal: bool = True) -> int:
        """Tokens that a model reads: a causal one the prompt once, an encoder with each response."""
        prompts = 1 if is_causal else len(self.responses)
        return prompts * len(self.prompt) + sum(map(len, self.responses))

    def weight(self, pair: int) -> float:
        """Weight of a pair."""
        return self.weights[pair] if self.weights else 1.0

    def longer(self, pair: int) -> float:
        """log(tokens of the better response / tokens of the worse); 0 where one of them is `NOTHING`."""
        better, worse = self.pairs[pair]
        if NOTHING in (better, worse):
            return 0.0
        return math.log(len(self.responses[better]) / len(self.responses[worse]))


def collate(
    groups: Sequence[GroupedAnswers],
    weigh: str = "pair",
    is_causal: bool = True,
    ends: Collection[int] = (),
) -> dict:
    """Groups -> one forest, its answers, and the pairs among them.

    Args:
        groups: of one part of a batch.
        weigh: `pair`: every pair the same; `question`: every question the same, its pairs equal parts of it.
        is_causal: False for an encoder, which reads each answer together with its question.
        ends: eos tokens, without which an answer will be read as well.

    Returns:
        forest; `answers` [A] the segments that are answers; `ended` [C] those of the answers that are more
        than an eos and end with it; `pairs` [P, 2] (better, worse) into the answers, −1 for `NOTHING`;
        `weights` [P]; `gaps` [P]; `longer` [P]; `odds` [P]; `names` [P] of the groups; `labels` zeros,
        one for each item the loss averages over: pairs [P] or questions [Q].
    """
    segments, answers, ended, pairs, weights, gaps, longer, odds = [], [], [], [], [], [], [], []
    names = []
    for group in groups:
        root, before = -1, group.prompt
        if is_causal and group.prompt:
            root, before = len(segments), ()
            segments.append(Segment(group.prompt))
        first = len(answers)
        for response in group.responses:
            if ends_with(response, ends):
                ended.append(len(answers))
            answers.append(len(segments))
            segments.append(Segment((*before, *response), root))
        share = 1 / len(group.pairs) if weigh == "question" else 1.0
        for i, pair in enumerate(group.pairs):
            pairs.append([NOTHING if one == NOTHING else first + one for one in pair])
            weights.append(share * group.weight(i))
            longer.append(group.longer(i))
        gaps += group.gaps or [0.0] * len(group.pairs)
        odds += group.odds or [0.0] * len(group.pairs)
        names += [group.name] * len(group.pairs)
    return {
        "forest": plant(segments, is_causal),
        "answers": answers,
        "ended": ended,
        "pairs": torch.tensor(pairs),
        "weights": torch.tensor(weights),
        "gaps": torch.tensor(gaps),
        "longer": torch.tensor(longer),
        "odds": torch.tensor(odds),
        "names": names,
        "labels": torch.zeros(len(groups) if weigh == "question" else len(pairs)),
    }


def ends_with(response: Sequence[int], ends: Collection[int]) -> bool:
    """Whether a response is more than an eos and ends with one, so that it can be read without it."""
    return len(response) > 1 and response[-1] in ends


def share_prompt(
    documents: Sequence[Sequence[int]],
) -> tuple[tuple[int, ...], tuple[tuple[int, ...], ...]]:
    """What documents have in common at their begin, short of the whole of any, and what follows it in each.

    Example: [5, 6, 7], [5, 6] -> (5,), ((6, 7), (6,)).
    """
    most = max(0, min(map(len, documents)) - 1)
    shared = next((i for i in range(most) if len({d[i] for d in documents}) > 1), most)
    return tuple(documents[0][:shared]), tuple(tuple(d[shared:]) for d in documents)


def cut(group: GroupedAnswers, most: int, keep_last: bool) -> GroupedAnswers:
    """Responses cut so that no document has more than `most` tokens.

    Args:
        group: whose prompt is shorter than that.
        most: tokens of prompt and response.
        keep_last: the last token stays (an encoder's closing token); a cut causal document has no eos.

    Raises:
        ValueError: the prompt leaves no room for a response.
    """
    room = most - len(group.prompt)
    if room < 1 + keep_last:
        raise ValueError(f"the prompt's {len(group.prompt)} tokens leave no room within {most}")
    last = slice(-1, None) if keep_last else slice(0)
    return replace(
        group,
        responses=tuple(r if len(r) <= room else r[: room - len(r[last])] + r[last] for r in group.responses),
    )


def check(group: GroupedAnswers, vocabulary: int, positions: int | None) -> None:
    """Refuse what cannot teach: it would train on log 2 in silence, on NaN, or die inside the model.

    Args:
        group: as it will be trained on.
        vocabulary: tokens that the model knows.
        positions: most tokens of a document that the model has room for; None: no bound.

    Raises:
        ValueError: saying what is wrong.
    """
    if not group.pairs:
        raise ValueError("no pair: it has one answer, or only ties")
    for i, response in enumerate(group.responses):
        if not response:
            raise ValueError(f"response {i} is empty")
        if positions is not None and len(group.prompt) + len(response) > positions:
            length = len(group.prompt) + len(response)
            raise ValueError(
                f"response {i} ends at token {length}, the model has room for {positions}; set max_length"
            )
    tokens = (token for part in (group.prompt, *group.responses) for token in part)
    if wrong := next((token for token in tokens if not 0 <= token < vocabulary), None):
        raise ValueError(f"token {wrong} is none of the model's {vocabulary}")
    for better, worse in group.pairs:
        if better == worse or not all(NOTHING <= i < len(group.responses) for i in (better, worse)):
            raise ValueError(f"({better}, {worse}) is no pair of its {len(group.responses)} responses")
        if NOTHING not in (better, worse) and group.responses[better] == group.responses[worse]:
            raise ValueError(f"responses {better} and {worse} of a pair are the same tokens")
    for what, values in (("weights", group.weights), ("gaps", group.gaps)):
        if values and len(values) != len(group.pairs):
            raise ValueError(f"{len(values)} {what} for {len(group.pairs)} pairs")
        if not all(math.isfinite(value) and value >= 0 for value in values):
            raise ValueError(f"{what} {list(values)}: finite numbers of at least 0 are wanted")
    if group.odds and (len(group.odds) != len(group.pairs) or not all(map(math.isfinite, group.odds))):
        raise ValueError(
            f"odds {list(group.odds)}: a finite number for each of {len(group.pairs)} pairs is wanted"
        )

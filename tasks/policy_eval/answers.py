"""Responses of one model sampled in one way, and what is read of each: scores, and how far it is from SFT."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from tasks.lm.attention.padding import lay_out
from tasks.lm.heads.reward_model import RewardModel
from tasks.lm.logprobs.responses import response_logprobs
from tasks.lm.logprobs.roads import take_road
from tasks.lm.model.ends import ends_of
from tasks.lm.sampling.generation import draw_uniforms, generate, row_seeds
from tasks.run.stated import invents, stated, states

Pair = tuple[tuple[int, ...], tuple[int, ...]]  # prompt and response
MODEL, JUDGE, SFT = "model", "judge", "sft"  # the reward stage's outs; SFT's log-probability
ARRAYS = ("scores", "judged", "kl_nats")
UNKNOWN = np.nan  # of a measure that a prompt cannot have


@dataclass(frozen=True, slots=True, eq=False)
class Answers:
    """One model's responses to N prompts, K each.

    Miniature: tokens [[[8, 1], [9, 1]]], texts [["`4`", "`5`"]], scores [[0.7, −1.2]] for one prompt, two
    samples.
    """

    tokens: list[list[list[int]]]  # [N][K] response tokens, eos included
    texts: list[list[str]]  # [N][K]
    scores: np.ndarray  # [N, K] reward-model units
    judged: np.ndarray | None = None  # [N, K] units of the judge
    kl_nats: np.ndarray | None = None  # [N, K] log-ratio to SFT, nats: their mean is the KL (k1)

    def first(self, samples: int) -> Answers:
        """The first so many of each prompt."""
        tokens, texts = ([row[:samples] for row in each] for each in (self.tokens, self.texts))
        cut = (getattr(self, name)[:, :samples] for name in ARRAYS)
        return Answers(tokens, texts, *cut)

    def right(self, expected: Sequence[str | None]) -> np.ndarray:
        """Checked correctness, [N, K] bool; False where nothing is expected."""
        return np.array(
            [
                [e is not None and states(t, e) for t in row]
                for row, e in zip(self.texts, expected, strict=True)
            ]
        )

    def measures(self, rows: Sequence[dict]) -> dict[str, np.ndarray]:
        """Name -> [N, K]: score, judge; correct, invented and silent, nan where nothing is known."""
        correct, invented, silent = (np.full(self.scores.shape, UNKNOWN) for _ in range(3))
        for i, (row, texts) in enumerate(zip(rows, self.texts, strict=True)):
            if row["expected"] is None:
                continue
            correct[i] = [states(text, row["expected"]) for text in texts]
            silent[i] = [not stated(text) for text in texts]
            if row["wrong"] is not None:
                invented[i] = [invents(text, row["expected"], row["wrong"]) for text in texts]
        found = {"score": self.scores, "judge": self.judged}
        return found | {"correct": correct, "invented": invented, "silent": silent}


@dataclass(frozen=True, slots=True, eq=False)
class Reader:
    """What reads responses: each distinct one once, whichever model gave it and however often."""

    sft: Any
    tokenizer: Any
    scorers: dict[str, RewardModel]  # MODEL and JUDGE
    temperature: float  # of SFT, from which KL is measured
    length: int  # most tokens of a response
    rows: int  # most sequences in one forward
    decode_rows: int  # most sequences that are sampled side by side
    known: dict[Pair, dict[str, float]] = field(default_factory=dict)

    def answer(
        self, model, rows: Sequence[dict], samples: int, temperature: float | None, seed: int
    ) -> Answers:
        """`samples` responses to each prompt at a temperature, read; None: greedy.

        Raises:
            ValueError: a score that is not finite; names the out and the question.
        """
        pairs = self.respond(model, rows, samples, temperature, seed)
        self._read(pairs)
        shape = len(rows), samples
        found = {
            name: np.array([self.known[pair][name] for pair in pairs]).reshape(shape)
            for name in (*self.scorers, SFT)
        }
        for name in self.scorers:
            check_scores(found[name], rows, name)
        own = self._own_logprobs(model, temperature, pairs).reshape(shape)
        flat = [list(response) for _, response in pairs]
        said = self.tokenizer.batch_decode(flat, skip_special_tokens=True)
        starts = range(0, len(pairs), samples)
        tokens, texts = ([each[i : i + samples] for i in starts] for each in (flat, said))
        return Answers(tokens, texts, found[MODEL], found[JUDGE], own - found[SFT])

    def respond(
        self, model, rows: Sequence[dict], samples: int, temperature: float | None, seed: int
    ) -> list[Pair]:
        """`samples` responses to each prompt, those to one prompt side by side, with their prompts."""
        prompts = [row["prompt"] for row in rows for _ in range(samples)]
        drawn = None if temperature is None else draw_uniforms(row_seeds(seed, len(prompts)), self.length)
        tokens = generate(
            model,
            prompts,
            max_tokens=self.length,
            eos_id=ends_of(self.sft, self.tokenizer),
            pad_id=self.tokenizer.pad_token_id,
            uniforms=drawn,
            temperature=temperature or 1.0,
            rows=self.decode_rows,
        ).lists()
        return [(tuple(p), tuple(t)) for p, t in zip(prompts, tokens, strict=True)]

    def scores(self, name: str, rows: Sequence[dict], pairs: list[Pair]) -> np.ndarray:
        """One scorer's scores of one response to each prompt, [N].

        Raises:
            ValueError: a score that is not finite.
        """
        distinct = list(dict.fromkeys(pairs))
        known = dict(zip(distinct, self._scored(name, distinct), strict=True))
        scores = np.array([known[pair] for pair in pairs])
        check_scores(scores[:, None], rows, name)
        return scores

    def _own_logprobs(self, model, temperature: float | None, pairs: list[Pair]) -> np.ndarray:
        """Log-probability of each response where it was drawn, nats; 0 of a greedy one. -> [n]."""
        if temperature is None:
            return np.zeros(len(pairs))
        if model is self.sft and temperature == self.temperature:
            return np.array([self.known[pair][SFT] for pair in pairs])
        distinct = list(dict.fromkeys(pairs))
        said = dict(zip(distinct, self._logprobs(model, distinct, temperature), strict=True))
        return np.array([said[pair] for pair in pairs])

    def _read(self, pairs: list[Pair]) -> None:
        new = [pair for pair in dict.fromkeys(pairs) if pair not in self.known]
        if not new:
            return
        columns = {name: self._scored(name, new) for name in self.scorers}
        columns[SFT] = self._logprobs(self.sft, new, self.temperature)
        for i, pair in enumerate(new):
            self.known[pair] = {name: column[i] for name, column in columns.items()}

    def _scored(self, name: str, pairs: list[Pair]) -> list[float]:
        scores = self.scorers[name].score(*zip(*pairs, strict=True), self.rows, reads_prompts_once=True)
        return scores.double().tolist()

    @torch.no_grad()
    def _logprobs(self, model, pairs: list[Pair], temperature: float) -> list[float]:
        """Of whole responses, nats."""
        take_road(model)
        found = []
        for first in range(0, len(pairs), self.rows):
            prompts, responses = zip(*pairs[first : first + self.rows], strict=True)
            sequences = lay_out(prompts, responses, self.tokenizer.pad_token_id, model.device)
            said = response_logprobs(model, sequences, temperature)
            found += (said * sequences.is_response).sum(1).double().tolist()
        return found


def check_scores(scores: np.ndarray, rows: Sequence[dict], name: str) -> None:
    """Refuse scores [N, K] of K responses to each of N prompts that are not finite.

    Raises:
        ValueError: names the reward model's out and the question.
    """
    for place in np.flatnonzero(~np.isfinite(scores).all(1))[:1]:
        row = rows[place]
        raise ValueError(
            f"policy_eval: artifacts/reward/{name} gives scores that are not finite, first to a response to "
            f"{row['site']}/{row['question_id']}"
        )


def joined(some: Answers, more: Answers) -> Answers:
    """The samples of both, prompt by prompt."""
    both = some, more
    lists = [
        [a + b for a, b in zip(*(getattr(each, name) for each in both), strict=True)]
        for name in ("tokens", "texts")
    ]
    arrays = [np.concatenate([getattr(each, name) for each in both], 1) for name in ARRAYS]
    return Answers(*lists, *arrays)

"""One look at a policy: its responses to the same prompts, with the same random numbers, measured."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, fields

import numpy as np

from tasks.run.monitor.text import distinct, has_code_fence, has_ended, repetition

Array = np.ndarray


def correlation(a: Sequence[float], b: Sequence[float]) -> float:
    """Pearson's r of two rows of numbers; 0 where one of them does not vary."""
    a, b = (np.asarray(x, dtype=np.float64) - np.mean(x) for x in (a, b))
    size = np.linalg.norm(a) * np.linalg.norm(b)
    return float(a @ b / size) if size else 0.0


@dataclass(frozen=True, slots=True)
class Look:
    """What was measured on K responses to each of P prompts: means over the K, so that prompts are the units.

    ``Look(proxy=np.array([0.2, 0.9]), …, distinct_2=0.4).means()["proxy"]`` is 0.55.
    """

    proxy: Array  # [P] score that PPO raises, in standard deviations of the reward model's validation scores
    kl_nats: Array  # [P] KL to SFT, per response
    tokens: Array  # [P] length of a response
    eos_rate: Array  # [P] share that ends with eos
    repetition_3: Array  # [P] share of trigrams that stood in the response before
    code_fence_rate: Array  # [P] share with a fence of three backticks
    entropy_nats: Array  # [P] of the policy, per token
    distinct_2: float  # distinct bigrams over all bigrams of all responses
    judge: Array | None = None  # [P] score of the independent judge, in its own standard deviations
    agreement: float | None = None  # correlation of the two scores over single responses

    @classmethod
    def of(
        cls,
        tokens: Sequence[Sequence[int]],
        texts: Sequence[str],
        eos_id: int | Collection[int],
        each: int,
        *,
        proxy: Sequence[float],
        kl_nats: Sequence[float],
        entropy_nats: Sequence[float],
        judge: Sequence[float] | None = None,
    ) -> Look:
        """Measure P·K responses, those to one prompt side by side.

        Args:
            tokens: eos included where there is one.
            texts: of the responses.
            eos_id: the end; of several each is one.
            each: K.
            proxy: [P·K].
            kl_nats: [P·K], per response.
            entropy_nats: [P·K], mean over the tokens of a response.
            judge: [P·K]; None: there is none.
        """

        def by_prompt(values) -> Array:
            return np.asarray(values, dtype=np.float64).reshape(-1, each).mean(1)

        return cls(
            proxy=by_prompt(proxy),
            kl_nats=by_prompt(kl_nats),
            tokens=by_prompt([len(r) for r in tokens]),
            eos_rate=by_prompt([has_ended(r, eos_id) for r in tokens]),
            repetition_3=by_prompt([repetition(r) for r in tokens]),
            code_fence_rate=by_prompt([has_code_fence(text) for text in texts]),
            entropy_nats=by_prompt(entropy_nats),
            distinct_2=distinct(tokens, 2),
            judge=None if judge is None else by_prompt(judge),
            agreement=None if judge is None else correlation(proxy, judge),
        )

    def means(self) -> dict[str, float]:
        """Every measure as one number; `judge` and `agreement` only where there is one."""
        found = {f.name: getattr(self, f.name) for f in fields(self)}
        return {name: float(np.mean(value)) for name, value in found.items() if value is not None}

    def state_dict(self) -> dict[str, list[float] | float]:
        """As a checkpoint keeps it."""
        found = {f.name: getattr(self, f.name) for f in fields(self)}
        return {k: v.tolist() if isinstance(v, Array) else v for k, v in found.items() if v is not None}

    @classmethod
    def from_state(cls, state: Mapping[str, list[float] | float]) -> Look:
        """The inverse of :meth:`state_dict`."""
        return cls(**{k: np.array(v) if isinstance(v, list) else v for k, v in state.items()})

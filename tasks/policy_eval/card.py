"""From responses and scores to the card: paired differences with intervals, and a table of samples."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass

import numpy as np

from tasks.run.intervals import bootstrap
from tasks.run.monitor.text import distinct, has_ended, repetition
from tasks.run.stated import states


@dataclass(frozen=True, slots=True)
class Answers:
    """One model's responses to N prompts, K each.

    Miniature: tokens [[[8, 1], [9, 1]]], texts [["`4`", "`5`"]], scores [[0.7, −1.2]] for one prompt, two
    samples.
    """

    tokens: list[list[list[int]]]  # [N][K] response tokens, eos included
    texts: list[list[str]]  # [N][K]
    scores: np.ndarray  # [N, K] reward-model units

    def right(self, expected: Sequence[str | None]) -> np.ndarray:
        """Checked correctness, [N, K] bool; False where nothing is expected."""
        return np.array(
            [
                [e is not None and states(t, e) for t in row]
                for row, e in zip(self.texts, expected, strict=True)
            ]
        )


def check_scores(scores: np.ndarray, rows: Sequence[dict], name: str) -> None:
    """Refuse scores [N·K] of K responses to each of N prompts that are not finite.

    Raises:
        ValueError: names the reward model's out and the question.
    """
    for place in np.flatnonzero(~np.isfinite(scores))[:1]:
        row = rows[place * len(rows) // len(scores)]
        raise ValueError(
            f"policy_eval: artifacts/reward/{name} gives scores that are not finite, first to a response to "
            f"{row['site']}/{row['question_id']}"
        )


def describe(answers: Answers, eos_id: int | Collection[int]) -> dict[str, float]:
    """Score, length, eos rate, distinct-n and repetition of one model's responses."""
    flat = [r for row in answers.tokens for r in row]
    return {
        "score": float(answers.scores.mean()),
        "response_tokens": float(np.mean([len(r) for r in flat])),
        "eos_rate": float(np.mean([has_ended(r, eos_id) for r in flat])),
        "distinct_1": distinct(flat, 1),
        "distinct_2": distinct(flat, 2),
        "repetition_3": float(np.mean([repetition(r) for r in flat])),
    }


def paired(before: np.ndarray, after: np.ndarray, samples: int, seed: int) -> dict[str, object]:
    """Means of both, their difference and its 95 % interval; prompts are resampled. [N, K], [N, K]."""
    gain = after.astype(float).mean(1) - before.astype(float).mean(1)
    interval = bootstrap(range(len(gain)), lambda w: float(w @ gain / w.sum()), samples, seed)
    return {
        "sft": float(before.mean()),
        "ppo": float(after.mean()),
        "gain": float(gain.mean()),
        "interval": interval,
    }


def win_rate(before: np.ndarray, after: np.ndarray, samples: int, seed: int) -> dict[str, object]:
    """Share of samples whose score PPO raised, ties half, with a 95 % interval. Scores [N, K], [N, K]."""
    won = ((after > before) + 0.5 * (after == before)).mean(1)
    return {
        "win_rate": float(won.mean()),
        "interval": bootstrap(range(len(won)), lambda w: float(w @ won / w.sum()), samples, seed),
    }


def correctness(
    before: Answers, after: Answers, rows: Sequence[dict], samples: int, seed: int
) -> dict[str, object] | None:
    """Checked correctness of all prompts and by kind; None where no prompt has an expected answer."""
    known = [i for i, row in enumerate(rows) if row["expected"] is not None]
    if not known:
        return None
    expected = [row["expected"] for row in rows]
    right = before.right(expected)[known], after.right(expected)[known]
    kinds = np.array([rows[i]["kind"] or "" for i in known])
    found = {"all": paired(*right, samples, seed) | {"prompts": len(known)}}
    for kind in sorted(set(kinds)):
        chosen = kinds == kind
        found[kind] = paired(*(r[chosen] for r in right), samples, seed) | {"prompts": int(chosen.sum())}
    return found


def render_table(samples: Sequence[dict]) -> str:
    """Samples side by side as a markdown table."""
    lines = ["| question | SFT | score | PPO | score | expected |", "|---|---|---|---|---|---|"]
    for s in samples:
        cells = (
            s["question"],
            s["sft"],
            f"{s['sft_score']:.2f}",
            s["ppo"],
            f"{s['ppo_score']:.2f}",
            s["expected"] or "",
        )
        lines.append("| " + " | ".join(_cell(c) for c in cells) + " |")
    return "\n".join(lines)


def render_correctness(name: str, found: dict[str, dict]) -> str:
    """Correctness by kind as a markdown table."""
    lines = [f"| correct, {name} | prompts | SFT | PPO | gain | 95 % interval |", "|---|---|---|---|---|---|"]
    for kind, f in found.items():
        low, high = f["interval"]
        means = f"{f['sft']:.3f} | {f['ppo']:.3f} | {f['gain']:+.3f}"
        lines.append(f"| {kind} | {f['prompts']} | {means} | {low:+.3f} – {high:+.3f} |")
    return "\n".join(lines)


def _cell(text: str) -> str:
    return text.strip().replace("|", "\\|").replace("\n", "<br>")[:400]

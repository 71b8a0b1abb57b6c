"""The reward stage's other way, frozen_style: two convex fits over texts and no training loop.

First a rule on style learns from the pairs; then a linear head on a frozen encoder's mean states, with the
rule's log-odds given (product of experts, arXiv 2310.05199). Their sum is the score. Only the encoder's
forward takes time; what it made of the answers is kept until the stage is done.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from pyarrow import parquet
from safetensors.torch import load_file, save_file
from torch import Tensor

from params.schema import Params, RewardParams
from tasks.lm.heads.frozen_style import HEAD, FrozenStyle, Head, features_of
from tasks.lm.heads.reward_model import frozen_style, load_frozen_style, write_scale
from tasks.lm.model.context import room_of
from tasks.lm.model.loading import load_encoder, load_tokenizer, save_model
from tasks.reward.convex import newton, one_thread, scaled
from tasks.reward.losses import gap_weights, pair_loss
from tasks.run.curve import Curve
from tasks.run.files import staged
from tasks.run.layout import Layout
from tasks.run.progress import Progress
from tasks.run.ranks import is_first
from tasks.run.tracking import log_metrics

COLUMNS = ["site", "question_id", "question", "answers", "pairs", "weights", "is_validation"]
ANSWERS_AT_A_TIME = 1024  # whose states are kept together
PROBES = 8  # answers on which what was written is read back


@dataclass(frozen=True, slots=True)
class Answers:
    """Texts and pairs of one part. A answers, P pairs.

    Miniature: `Answers(["How?", "How?"], ["So.", "No."], [[1, 0]], [1.0], [3.0], [0])`: the second is better.
    """

    questions: list[str]  # [A] of each answer
    texts: list[str]  # [A]
    pairs: Tensor  # [P, 2] better and worse, places in [A]
    weights: Tensor  # [P] float64
    gaps: Tensor  # [P] float64, of the published scores
    owner: Tensor  # [P] which question a pair belongs to


def read_answers(path: Path) -> tuple[Answers, Answers]:
    """Of a file of pack/groups what is trained on and what is validated on, the same where there is nothing.

    Raises:
        ValueError: no training question.
    """
    rows = parquet.read_table(path, columns=COLUMNS).to_pylist()
    parts = [[row for row in rows if row["pairs"] and row["is_validation"] is flag] for flag in (False, True)]
    if not parts[0]:
        raise ValueError(f"reward: artifacts/pack/groups/{path.name} holds no training question")
    train, held = (_laid_out(part) for part in parts)
    return train, held if held.texts else train


def _laid_out(rows: Sequence[dict]) -> Answers:
    questions, texts, pairs, weights, gaps, owner = [], [], [], [], [], []
    for number, row in enumerate(rows):
        first, score = len(texts), [answer["score"] for answer in row["answers"]]
        questions += [row["question"]] * len(score)
        texts += [answer["text"] for answer in row["answers"]]
        pairs += [(first + better, first + worse) for better, worse in row["pairs"]]
        gaps += [float(score[better] - score[worse]) for better, worse in row["pairs"]]
        weights += row["weights"]
        owner += [number] * len(row["pairs"])
    numbers = (torch.tensor(each, dtype=torch.float64) for each in (weights, gaps))
    return Answers(questions, texts, torch.tensor(pairs).reshape(-1, 2), *numbers, torch.tensor(owner))


def pair_weights(train: Answers, reward: RewardParams) -> Tensor:
    """What each pair counts in both fits, mean 1. [P]."""
    weights = train.weights
    if reward.gap_weight:
        factors = gap_weights(train.gaps.tolist(), reward.gap_weight)
        weights = weights * torch.tensor(factors, dtype=torch.float64)
    if reward.weigh == "question":
        weights = weights / torch.bincount(train.owner)[train.owner]
    return weights / weights.mean()


def fit(
    train: Answers, features: Tensor, states: Tensor, reward: RewardParams
) -> Iterator[tuple[Tensor, Tensor]]:
    """Coefficients of features and states, after each step of the head. [A, 29], [A, H] -> [29], [H]."""
    section, weights = reward.frozen_style, pair_weights(train, reward)
    x, scale = scaled(features, train.pairs)
    *_, style = newton(x, weights, section.style_ridge)
    style = style / scale
    said = features @ style
    ahead = said[train.pairs[:, 0]] - said[train.pairs[:, 1]] - reward.margin * train.gaps
    x, scale = scaled(states, train.pairs)
    for head in newton(x, weights, section.head_ridge, ahead, reward.label_smoothing):
        yield style, head / scale


def learn_frozen(
    out: str, groups: str, run: str, params: Params, layout: Layout, device: torch.device
) -> tuple[dict[str, float], Curve]:
    """Fit one model and put it into its place; returns its metrics and its curve, a row for each step.

    Args:
        out: folder under artifacts/reward, and under scratch.
        groups: file under pack/groups.
        run: prefix of what is logged.
        params: of the run.
        layout: where it is.
        device: the encoder's; the fits run on the CPU.

    Raises:
        ValueError: no training question, no such encoder, or a state that is not finite.
    """
    reward = params.reward
    train, held = read_answers(layout.artifact("pack", "groups", f"{groups}.parquet"))
    model = load_base(reward, device)
    kept, rows = layout.scratch("reward") / out, params.machine.microbatch_rows
    states = [means(model, part, kept / name, rows, run) for part, name in ((train, "train"), (held, "held"))]
    features = [features_of(part.questions, part.texts) for part in (train, held)]
    curve, metrics = Curve(("loss", "accuracy")), {}
    with one_thread():
        for step, (style, head) in enumerate(fit(train, features[0], states[0], reward), 1):
            metrics = measured((features[1] * style).sum(1) + (states[1] * head).sum(1), held.pairs)
            found = {name: metrics[name] for name in curve.columns}
            curve.add(step, **found)
            log_metrics({f"{run}/validation_{name}": value for name, value in found.items()}, step=step)
    learnt = model.head._replace(style=tuple(style.tolist()), states=tuple(head.tolist()))
    with staged(layout.artifact("reward", out)) as folder:
        save(model, learnt, metrics, folder, train)
    return {"steps": step, **metrics}, curve


def load_base(reward: RewardParams, device: torch.device) -> FrozenStyle:
    """The encoder and its tokenizer, without a head.

    Raises:
        ValueError: there is none in `reward.base`, or it cannot read what `reward.frozen_style` says.
    """
    key, section = "reward.base", reward.frozen_style
    tokenizer = load_tokenizer(reward.base, reward.revision, key, needs_eos=False)
    encoder = load_encoder(reward.base, reward.revision, key, section.layers).to(device)
    room, longest = room_of(encoder), section.question_tokens + section.answer_tokens + 3
    if room is not None and longest > room:
        raise ValueError(
            f"reward.frozen_style: question_tokens + answer_tokens + 3 are {longest}; {reward.base} has room "
            f"for {room}"
        )
    try:
        return frozen_style(encoder, tokenizer, Head(section.question_tokens, section.answer_tokens, (), ()))
    except ValueError as error:
        raise ValueError(f"{key}: {reward.base}: {error}") from None


def means(model: FrozenStyle, part: Answers, kept: Path, rows: int, run: str) -> Tensor:
    """Mean state over each answer, [A, H] float64; after a kill from where it was, by files under `kept`.

    Raises:
        ValueError: a state that is not finite (quotes the answer).
    """
    found, progress = [], Progress(f"{run}: {kept.name} answers read", len(part.texts))
    for first in range(0, len(part.texts), ANSWERS_AT_A_TIME):
        some = slice(first, first + ANSWERS_AT_A_TIME)
        path = kept / f"{first:09d}.safetensors"
        if not path.is_file():
            states = model.means(part.questions[some], part.texts[some], rows)
            with staged(path) as new:
                new.parent.mkdir(parents=True, exist_ok=True)
                save_file({"states": states}, new)
        else:
            states = load_file(path)["states"]
        found.append(states)
        progress.update(min(first + ANSWERS_AT_A_TIME, len(part.texts)))
    states = torch.cat(found).double()
    for place in (~states.isfinite().all(1)).nonzero()[:1, 0].tolist():
        raise ValueError(f"reward.base: a state that is not finite, of the answer {part.texts[place]!r:.60}")
    return states


def measured(scores: Tensor, pairs: Tensor) -> dict[str, float]:
    """As RewardTrainer measures: plain loss in nats and accuracy over pairs, a tie wrong; of scores [A]."""
    better, worse = scores[pairs[:, 0]], scores[pairs[:, 1]]
    return {
        "loss": pair_loss(better, worse).mean().item(),
        "accuracy": (better > worse).double().mean().item(),
        "score_mean": scores.mean().item(),
        "score_std": scores.std(correction=0).item(),
    }


def save(model: FrozenStyle, head: Head, metrics: dict[str, float], folder: Path, train: Answers) -> None:
    """The encoder's plain transformers folder, head.json and scores.json; read back on a few answers.

    Raises:
        ValueError: what was written says something else.
    """
    save_model(model.encoder, model.tokenizer, folder)
    (folder / HEAD).write_text(head.text(), encoding="utf-8")
    write_scale(folder, metrics)
    if not is_first():
        return
    some = train.questions[:PROBES], train.texts[:PROBES]
    wanted = frozen_style(model.encoder, model.tokenizer, head).scores(*some)
    tokenizer = load_tokenizer(folder, needs_eos=False)
    found = load_frozen_style(folder, tokenizer, model.encoder.device).scores(*some)
    if not torch.allclose(found, wanted, rtol=1e-5, atol=1e-5):
        raise ValueError(f"reward.base: {type(model.encoder).__name__} scores otherwise once it was saved")

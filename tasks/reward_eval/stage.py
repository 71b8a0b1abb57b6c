"""The reward_eval stage: reward model and held-out groups on disk -> card.json, card.md and the gate."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from pyarrow import parquet

from params.schema import Params
from tasks.lm.loading import load_tokenizer
from tasks.lm.reward_model import RewardModel
from tasks.reward_eval.calibration import draw_reliability
from tasks.reward_eval.card import report, summary
from tasks.reward_eval.judge import beside
from tasks.reward_eval.page import PICTURE, render
from tasks.reward_eval.pairs import lay_out, name_of
from tasks.reward_eval.rules import fit_rule, training_differences
from tasks.run.devices import derive_seed, use_device
from tasks.run.files import staged, write_json
from tasks.run.layout import Layout, StageResult
from tasks.run.tracking import log_artifact


def held_out_groups(path: Path) -> list[dict]:
    """The rows of pack/groups that have a pair, by site and id, whatever their order on disk.

    Raises:
        ValueError: there is none.
    """
    groups = [group for group in parquet.read_table(path).to_pylist() if group["pairs"]]
    if not groups:
        raise ValueError(f"reward_eval: {path} holds no pair of answers with different scores")
    return sorted(groups, key=name_of)


def score_answers(model: RewardModel, groups: Sequence[dict], rows: int, name: str = "model") -> np.ndarray:
    """A model's scores of all answers of all groups, [A] float64; `rows` documents in one forward.

    Raises:
        ValueError: a score that is not finite (names the question).
    """
    owners = [group for group in groups for _ in group["answers"]]
    answers = [answer for group in groups for answer in group["answers"]]
    if model.texts is not None:  # whole texts, as it learned from
        scores = model.score_texts([g["question"] for g in owners], [a["text"] for a in answers], rows)
    else:
        scores = model.score([g["prompt"] for g in owners], [a["tokens"] for a in answers], rows)
    scores = scores.double().numpy()
    for place in np.flatnonzero(~np.isfinite(scores))[:1]:
        raise ValueError(
            f"reward_eval: artifacts/reward/{name} gives a score that is not finite to an answer to "
            f"{name_of(owners[place])}"
        )
    return scores


def run(params: Params, layout: Layout) -> StageResult:
    """The stage; it ends well once it has measured, whatever the verdict.

    Raises:
        ValueError: no training pair, no held-out pair, or a score that is not finite.
    """
    device = use_device(params.machine.device, params.machine.threads)
    groups = held_out_groups(layout.artifact("pack", "groups", "eval.parquet"))
    rule = fit_rule(*training_differences(layout.artifact("pack", "groups", "reward.parquet")))
    tokenizer = load_tokenizer(layout.artifact("pack", "tokenizer"))
    model = RewardModel.load(layout.artifact("reward", "model"), tokenizer, device)
    held = lay_out(groups, score_answers(model, groups, params.machine.microbatch_rows))
    seed = derive_seed(params.seed, "reward_eval", "bootstrap")
    card = report(held, groups, rule, params.reward_eval, seed)
    judge = RewardModel.load(layout.artifact("reward", "judge"), tokenizer, device)
    card["judge"] = beside(held, score_answers(judge, groups, params.machine.microbatch_rows, "judge"))
    write_json(layout.artifact("reward_eval", "card.json"), card)
    with staged(layout.artifact("reward_eval", "card.md")) as path:
        path.write_text(render(card), encoding="utf-8")
    found = card["calibration"]
    title = f"Reliability on held-out pairs: Brier {found['brier']:.3f}, ECE {found['ece']:.3f}"
    picture = draw_reliability(layout.kept(*PICTURE.split("/")), found["bins"], title)
    for path in (
        layout.artifact("reward_eval", "card.md"),
        layout.artifact("reward_eval", "card.json"),
        picture,
    ):
        log_artifact(path)
    passed = card["verdict"] == "passed" or not params.reward_eval.enforce
    write_json(layout.artifact("reward_eval", "gate.json"), {"passed": passed})
    return StageResult(summary(card))

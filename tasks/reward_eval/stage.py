"""The reward_eval stage: reward model and held-out groups on disk -> card.json, card.md and the gate."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from pyarrow import parquet

from params.schema import Params
from tasks.lm.heads.reward_model import RewardModel
from tasks.lm.model.loading import load_tokenizer
from tasks.reward_eval.calibration import draw_reliability
from tasks.reward_eval.card import report, summary
from tasks.reward_eval.judge import beside
from tasks.reward_eval.page import PICTURE, render
from tasks.reward_eval.pairs import lay_out, name_of
from tasks.reward_eval.rules import training_differences
from tasks.reward_eval.truth import right_beats_wrong
from tasks.reward_eval.words import word_rule
from tasks.run.devices import derive_seed, use_device
from tasks.run.files import staged, write_json
from tasks.run.layout import Layout, StageResult
from tasks.run.text_rule import fit_rule
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


def score_answers(
    model: RewardModel, groups: Sequence[dict], rows: int, name: str = "model", without: int | None = None
) -> np.ndarray:
    """A model's scores of all answers of all groups, [A] float64; `rows` documents in one forward.

    Args:
        model: the reward model or the judge.
        groups: rows of pack/groups.
        rows: documents in one forward.
        name: of its folder, for messages.
        without: an eos; an answer that is more than that and ends with it is cut of it.

    Raises:
        ValueError: a score that is not finite (names the question).
    """
    owners = [group for group in groups for _ in group["answers"]]
    if model.texts is not None:  # whole texts, as it learned from; they have no eos
        answers = [answer["text"] for group in groups for answer in group["answers"]]
        scores = model.score_texts([group["question"] for group in owners], answers, rows)
    else:
        responses = [answer["tokens"] for group in groups for answer in group["answers"]]
        responses = [r[:-1] if len(r) > 1 and r[-1] == without else r for r in responses]
        scores = model.score([group["prompt"] for group in owners], responses, rows)
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
    learnt_from = layout.artifact("pack", "groups", "reward.parquet")
    rule, words = fit_rule(*training_differences(learnt_from)), word_rule(learnt_from)
    tokenizer = load_tokenizer(layout.artifact("pack", "tokenizer"))

    def read(name: str) -> list[np.ndarray]:  # with eos and without
        model, rows = RewardModel.load(layout.artifact("reward", name), tokenizer, device), params.machine
        ways = (None, tokenizer.eos_token_id)
        return [score_answers(model, groups, rows.microbatch_rows, name, without) for without in ways]

    held = lay_out(groups, *read("model"))
    judged = read("judge")
    samples, seed = params.reward_eval.bootstrap_samples, derive_seed(params.seed, "reward_eval", "bootstrap")
    card = report(held, groups, rule, params.reward_eval, seed, words)
    scores = {"reward_model": held.scores, "judge": judged[0], "answer_only": words.scores(held.texts)}
    card["truth"] = right_beats_wrong(held, scores, samples, seed)
    card["judge"] = beside(held, *judged, card["truth"], samples, seed)
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

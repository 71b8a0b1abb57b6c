"""The policy_eval stage: four models and held-out prompts on disk -> card.json, card.md and samples.md."""

from __future__ import annotations

import json
from collections.abc import Sequence
from hashlib import sha256
from pathlib import Path

import numpy as np
from pyarrow import parquet

from params.schema import Params
from tasks.lm.heads.reward_model import RewardModel
from tasks.lm.model.ends import ends_of
from tasks.lm.model.loading import load_causal, load_tokenizer
from tasks.policy_eval import page
from tasks.policy_eval.answers import JUDGE, MODEL, Answers, Reader, joined
from tasks.policy_eval.card import correctness, describe, paired, summary, win_rate
from tasks.policy_eval.champion import verdict
from tasks.policy_eval.frontier import GREEDY, best_of_points, frontier, sampled, way_of
from tasks.policy_eval.headline import By, chosen_ways, headline
from tasks.policy_eval.monitor import monitored, scales_of
from tasks.policy_eval.parts import Part, headline_part, parts_of
from tasks.policy_eval.picture import draw
from tasks.run.devices import derive_seed, use_device
from tasks.run.files import staged, write_json
from tasks.run.layout import Layout, StageResult
from tasks.run.progress import Progress
from tasks.run.tracking import log_artifact, log_tag

COLUMNS = ("site", "question_id", "question", "prompt", "kind", "expected")
CHECKED = ("cluster", "wording", "misleads", "wrong")


def prompts_of(path: Path, most: int) -> list[dict]:
    """At most `most` prompts, the same ones whatever their order on disk.

    Raises:
        ValueError: there is none.
    """
    rows = parquet.read_table(path, columns=[*COLUMNS, *CHECKED]).to_pylist()
    if not rows:
        raise ValueError(f"policy_eval: {'/'.join(path.parts[-4:])} holds no prompt")
    return sorted(rows, key=lambda r: sha256(f"{r['site']}/{r['question_id']}".encode()).digest())[:most]


def may_judge(layout: Layout) -> bool:
    """Whether reward_eval's card lets the judge be called one; a card that does not say so does.

    Raises:
        ValueError: it cannot be read.
    """
    path = layout.artifact("reward_eval", "card.json")
    try:
        card = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"policy_eval: {path}: {error}; `dvc repro reward_eval` writes it anew") from None
    return bool((card.get("judge") or {}).get("is_judge", True))


def temperatures_of(params: Params) -> list[float | None]:
    """All ways to answer: the temperatures, ppo's among them, the highest first; None, greedy, is last."""
    return [*sorted({*params.policy_eval.temperatures, params.ppo.temperature}, reverse=True), None]


class Evaluation:
    """Both models, what reads their responses, and the numbers of the run."""

    def __init__(self, params: Params, layout: Layout) -> None:
        self.params, self.scales = params, scales_of(layout)
        device, folder = use_device(params.machine.device, params.machine.threads), layout.artifact
        self.tokenizer = load_tokenizer(folder("sft", "model"))
        models = (load_causal(folder(stage, "model")).to(device).eval() for stage in ("sft", "ppo"))
        self.models = dict(zip(("sft", "policy"), models, strict=True))
        self.ends = ends_of(self.models["sft"], self.tokenizer)
        scorers = {
            name: RewardModel.load(
                folder("reward", name), self.tokenizer, device, key=f"artifacts/reward/{name}",
                policy_ends=self.ends,
            )
            for name in (MODEL, JUDGE)
        }  # fmt: skip
        self.reader = Reader(
            self.models["sft"], self.tokenizer, scorers, params.ppo.temperature, params.ppo.response_tokens,
            params.machine.microbatch_rows, params.machine.decode_rows,
        )  # fmt: skip
        self.ways, self.asked = temperatures_of(params), params.policy_eval
        self.progress = Progress("policy_eval", 4 * len(self.ways) + 1, "responses")

    def seed(self, purpose: str) -> int:
        """Of the draws."""
        return derive_seed(self.params.seed, "policy_eval", purpose)

    def answers(self, rows: Sequence[dict]) -> dict[str, dict[str, Answers]]:
        """Model -> way -> responses to held-out prompts, all with the same random numbers."""
        found: dict[str, dict[str, Answers]] = {}
        for name, model in self.models.items():
            found[name] = {}
            for temperature in self.ways:
                each = 1 if temperature is None else self.asked.samples_per_prompt
                answers = self.reader.answer(model, rows, each, temperature, self.seed("samples"))
                found[name][way_of(temperature)] = answers
                self.progress.update(self.progress.done + 1, len(rows) * each)
        return found

    def more(self, rows: Sequence[dict], some: Answers) -> Answers:
        """SFT's responses at ppo.temperature, as many as best-of-n is estimated from."""
        lacking = max(self.asked.best_of_samples - self.asked.samples_per_prompt, 0)
        if lacking:
            own = self.models["sft"], rows, lacking, self.params.ppo.temperature, self.seed("best_of")
            some = joined(some, self.reader.answer(*own))
        self.progress.update(self.progress.done + 1, len(rows) * lacking)
        return some

    def chosen(self, rows: Sequence[dict], by: By) -> dict:
        """Each model's best way on training prompts, one response to each."""
        tried: dict[str, dict[str, np.ndarray]] = {}
        for name, model in self.models.items():
            tried[name] = {}
            for temperature in self.ways:
                pairs = self.reader.respond(model, rows, 1, temperature, self.seed("choice"))
                scorer = JUDGE if by == "judge" else MODEL
                tried[name][way_of(temperature)] = self.reader.scores(scorer, rows, pairs)
                self.progress.update(self.progress.done + 1, len(rows))
        return chosen_ways(tried, by, len(rows))


def run(params: Params, layout: Layout) -> StageResult:
    """The stage.

    Raises:
        ValueError: no prompt, or a score that is not finite.
    """
    rows, training = (
        prompts_of(layout.artifact("pack", "prompts", f"{name}.parquet"), params.policy_eval.prompts)
        for name in ("eval", "rl")
    )
    is_judge = may_judge(layout)
    work = Evaluation(params, layout)
    parts = parts_of(rows, params.policy_eval.bootstrap_samples, work.seed("bootstrap"))
    answers = work.answers(rows)
    base = way_of(params.ppo.temperature)
    ways = {"greedy": GREEDY, "sampled": base}
    pairs = {name: [answers[model][way] for model in ("sft", "policy")] for name, way in ways.items()}
    many = work.more(rows, answers["sft"][base])
    answers["sft"][base] = many
    points = [
        sampled(model, t, answers[model][way_of(t)], rows) for model in answers for t in work.ways
    ] + best_of_points(many, params.policy_eval.best_of, rows)
    card: dict = {"prompts": len(rows), "clusters": parts["all"].clusters_count}
    for name, both in pairs.items():
        card[name] = compare(both, rows, parts["all"], work.ends)
    kl = pairs["sampled"][1].kl_nats
    card["kl_nats"] = float(kl.mean())
    models = tuple(work.models.values())
    both = models, work.tokenizer, rows, pairs["sampled"]
    card["monitor"] = monitored(params, work.scales, *both, kl.ravel())
    part = headline_part(parts)
    chosen = work.chosen(training, "judge" if is_judge else "score")
    card["headline"] = headline(points, chosen, parts, part)
    card["frontier"] = frontier(points, parts)
    findings = card["monitor"]["findings"]
    card["champion"] = verdict(findings, card["headline"]["gain"], is_judge).told()
    log_tag("stackrl.monitor", "; ".join(findings.values()) or "nothing found")
    write(layout, card, page.side_by_side(rows, *pairs["sampled"]))
    return StageResult(summary(card))


def compare(both: Sequence[Answers], rows: Sequence[dict], part: Part, ends: Sequence[int]) -> dict:
    """What card.json says of SFT's and the policy's responses in one way, with the same random numbers."""
    scores = [each.scores for each in both]
    return {
        "sft": describe(both[0], ends),
        "ppo": describe(both[1], ends),
        "score": paired(*scores, part),
        **win_rate(*scores, part),
        "correct": correctness(*both, rows, part),
    }


def write(layout: Layout, card: dict, samples: list[dict]) -> None:
    """The outs, and the picture beside them; all of them go to MLflow."""
    write_json(layout.artifact("policy_eval", "card.json"), card)
    texts = {"card.md": page.render(card), "samples.md": page.render_samples(card, samples)}
    for name, text in texts.items():
        with staged(layout.artifact("policy_eval", name)) as path:
            path.write_text(text, encoding="utf-8")
    picture = draw(layout.kept(*page.PICTURE.split("/")), card)
    for path in (*(layout.artifact("policy_eval", name) for name in ("card.json", *texts)), picture):
        log_artifact(path)

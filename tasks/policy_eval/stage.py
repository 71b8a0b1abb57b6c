"""The policy_eval stage: four models and held-out prompts on disk -> card.json and samples.md."""

from __future__ import annotations

from collections.abc import Sequence
from hashlib import sha256

import numpy as np
import torch
from pyarrow import parquet

from params.schema import Params
from tasks.lm.ends import ends_of
from tasks.lm.generation import draw_uniforms, generate, row_seeds
from tasks.lm.loading import load_causal, load_tokenizer
from tasks.lm.reward_model import RewardModel
from tasks.lm.roads import take_road
from tasks.lm.sequences import lay_out, response_logprobs
from tasks.policy_eval.card import (
    Answers,
    check_scores,
    correctness,
    describe,
    paired,
    render_correctness,
    render_table,
    win_rate,
)
from tasks.policy_eval.monitor import monitored, render_monitor
from tasks.run.devices import derive_seed, use_device
from tasks.run.files import staged, write_json
from tasks.run.layout import Layout, StageResult
from tasks.run.progress import Progress
from tasks.run.tracking import log_artifact, log_tag

SHOWN = 24  # samples in the table


def held_out_prompts(layout: Layout, most: int) -> list[dict]:
    """At most `most` prompts, the same ones whatever their order on disk."""
    columns = ["site", "question_id", "question", "prompt", "kind", "expected"]
    rows = parquet.read_table(layout.artifact("pack", "prompts", "eval.parquet"), columns=columns).to_pylist()
    return sorted(rows, key=lambda r: sha256(f"{r['site']}/{r['question_id']}".encode()).digest())[:most]


def answer(
    model, reward_model, tokenizer, rows: Sequence[dict], params: Params, samples: int, seed: int | None
) -> Answers:
    """`samples` responses to each prompt, scored; seed None: greedy."""
    length, machine = params.ppo.response_tokens, params.machine
    prompts = [row["prompt"] for row in rows for _ in range(samples)]
    uniforms = None if seed is None else draw_uniforms(row_seeds(seed, len(prompts)), length)
    tokens = generate(
        model,
        prompts,
        max_tokens=length,
        eos_id=ends_of(model, tokenizer),
        pad_id=tokenizer.pad_token_id,
        uniforms=uniforms,
        temperature=params.ppo.temperature,
        rows=machine.decode_rows,
    ).lists()
    scores = reward_model.score(prompts, tokens, machine.microbatch_rows).double().numpy()
    check_scores(scores, rows, "model")
    texts = tokenizer.batch_decode(tokens, skip_special_tokens=True)
    starts = range(0, len(prompts), samples)
    tokens, texts = ([flat[i : i + samples] for i in starts] for flat in (tokens, texts))
    return Answers(tokens, texts, scores.reshape(len(rows), samples))


@torch.no_grad()
def kl_to_sft(
    policy, sft, rows: Sequence[dict], answers: Answers, pad_id: int, temperature: float, microbatch: int
) -> np.ndarray:
    """KL of the policy to SFT, nats per response, on the policy's own samples (k1 estimate). -> [N·K]."""
    for model in (policy, sft):
        take_road(model)
    flat = [(row["prompt"], r) for row, own in zip(rows, answers.tokens, strict=True) for r in own]
    found = []
    for first in range(0, len(flat), microbatch):
        prompts, responses = zip(*flat[first : first + microbatch], strict=True)
        sequences = lay_out(prompts, responses, pad_id, policy.device)
        gap = response_logprobs(policy, sequences, temperature) - response_logprobs(
            sft, sequences, temperature
        )
        found.append((gap * sequences.is_response).sum(1).cpu())
    return torch.cat(found).double().numpy()


def side_by_side(rows: Sequence[dict], before: Answers, after: Answers) -> list[dict]:
    """One sample of each of the first prompts."""
    return [
        {
            "question": row["question"],
            "expected": row["expected"],
            "sft": before.texts[i][0],
            "ppo": after.texts[i][0],
            "sft_score": float(before.scores[i, 0]),
            "ppo_score": float(after.scores[i, 0]),
        }
        for i, row in enumerate(rows[:SHOWN])
    ]


def run(params: Params, layout: Layout) -> StageResult:
    """The stage.

    Raises:
        ValueError: no held-out prompt, or a score that is not finite.
    """
    device = use_device(params.machine.device, params.machine.threads)
    tokenizer = load_tokenizer(layout.artifact("sft", "model"))
    sft, ppo = (load_causal(layout.artifact(s, "model")).to(device).eval() for s in ("sft", "ppo"))
    ends = ends_of(sft, tokenizer)
    reward_model = RewardModel.load(layout.artifact("reward", "model"), tokenizer, device, policy_ends=ends)
    rows = held_out_prompts(layout, params.policy_eval.prompts)
    if not rows:
        raise ValueError("policy_eval: artifacts/pack/prompts/eval.parquet holds no prompt")
    resamples, seed = (
        params.policy_eval.bootstrap_samples,
        derive_seed(params.seed, "policy_eval", "bootstrap"),
    )
    card: dict[str, object] = {"prompts": len(rows)}
    answers, progress = {}, Progress("policy_eval", 4, "responses")
    for way, samples, draw in (
        ("greedy", 1, None),
        (
            "sampled",
            params.policy_eval.samples_per_prompt,
            derive_seed(params.seed, "policy_eval", "samples"),
        ),
    ):
        both = []
        for model in (sft, ppo):
            both.append(answer(model, reward_model, tokenizer, rows, params, samples, draw))
            progress.update(progress.done + 1, len(rows) * samples)
        answers[way] = both
        scores = [a.scores for a in both]
        card[way] = {
            "sft": describe(both[0], ends),
            "ppo": describe(both[1], ends),
            "score": paired(*scores, resamples, seed),
            **win_rate(*scores, resamples, seed),
            "correct": correctness(*both, rows, resamples, seed),
        }
    kl = kl_to_sft(
        ppo,
        sft,
        rows,
        answers["sampled"][1],
        tokenizer.pad_token_id,
        params.ppo.temperature,
        params.machine.microbatch_rows,
    )
    card["kl_nats"] = float(kl.mean())
    card["monitor"] = monitored(params, layout, (sft, ppo), tokenizer, rows, answers["sampled"], kl)
    log_tag("stackrl.monitor", "; ".join(card["monitor"]["findings"].values()) or "nothing found")
    write_json(layout.artifact("policy_eval", "card.json"), card)
    with staged(layout.artifact("policy_eval", "samples.md")) as path:
        path.write_text(render(card, side_by_side(rows, *answers["sampled"])), encoding="utf-8")
    log_artifact(layout.artifact("policy_eval", "samples.md"))
    return StageResult(summary(card))


def render(card: dict, samples: list[dict]) -> str:
    """The card and the samples as one markdown page."""
    lines = [
        "# Policy against SFT",
        "",
        f"{card['prompts']} held-out prompts, the same random numbers for both. "
        f"KL of the policy to SFT: {card['kl_nats']:.3f} nats per response.",
        "",
    ]
    for way in ("greedy", "sampled"):
        found = card[way]
        low, high = found["score"]["interval"]
        lines += [
            f"## {way}",
            "",
            f"Score {found['score']['sft']:.3f} → {found['score']['ppo']:.3f}, "
            f"gain [{low:+.3f}, {high:+.3f}]; "
            f"win rate {found['win_rate']:.3f} [{found['interval'][0]:.3f}, {found['interval'][1]:.3f}].",
            "",
            "| | SFT | PPO |",
            "|---|---|---|",
        ]
        lines += [
            f"| {k.replace('_', ' ')} | {v:.3f} | {found['ppo'][k]:.3f} |" for k, v in found["sft"].items()
        ]
        lines += ["", render_correctness(way, found["correct"]), ""] if found["correct"] else [""]
    return "\n".join(
        [*lines, render_monitor(card["monitor"]), "", "## samples", "", render_table(samples), ""]
    )


def summary(card: dict) -> dict[str, float]:
    """The numbers for metrics.json."""
    found = {"prompts": card["prompts"], "kl_nats": card["kl_nats"]}
    sampled, greedy = card["sampled"], card["greedy"]
    found |= {
        "win_rate": sampled["win_rate"],
        "win_rate_low": sampled["interval"][0],
        "win_rate_high": sampled["interval"][1],
    }
    for way, part in (("greedy", greedy), ("sampled", sampled)):
        for name in ("score", "correct"):
            pair = part["score"] if name == "score" else (part["correct"] or {}).get("all")
            if pair:
                low, high = pair["interval"]
                found |= {
                    f"{way}_{name}_sft": pair["sft"],
                    f"{way}_{name}_ppo": pair["ppo"],
                    f"{way}_{name}_gain_low": low,
                    f"{way}_{name}_gain_high": high,
                }
    for model in ("sft", "ppo"):
        found |= {
            f"{model}_{k}": sampled[model][k]
            for k in ("response_tokens", "eos_rate", "distinct_2", "repetition_3")
        }
    for name, each in card["monitor"]["gains"].items():
        found[f"monitor_{name}_gain"] = each["gain"]
    found["monitor_findings"] = len(card["monitor"]["findings"])
    return found

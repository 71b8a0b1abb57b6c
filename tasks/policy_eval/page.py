"""The card as a markdown page, and the samples side by side as another."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from tasks.policy_eval.answers import Answers
from tasks.policy_eval.monitor import render_monitor
from tasks.policy_eval.parts import NAMES

PICTURE = "reports/policy_eval/frontier.png"
SHOWN = 24  # samples in the table
MODELS = {"sft": "SFT", "policy": "policy"}
LABELS = ("score", "judge", "correct", "invented")


def render(card: dict) -> str:
    """card.md: headline, verdict, part by part, frontier."""
    sections = (_head(card), _verdict(card), _parts(card), _frontier(card))
    return "\n".join(line for section in sections for line in (*section, ""))


def _head(card: dict) -> Iterator[str]:
    found = card["headline"]
    chosen, by = found["chosen"], found["chosen"]["by"]
    why = "" if by == "judge" else " (there is no judge that may be called one)"
    yield from ("# Policy against SFT: report card", "", f"## {NAMES[found['part']].capitalize()}", "")
    yield f"{found['prompts']} of {card['prompts']} held-out prompts, {found['clusters']} clusters."
    yield f"Policy and SFT each answer in their best way, chosen by the {by} on {chosen['prompts']} training"
    yield f"prompts{why}; beside them {found['best_of']['way']} of SFT by the reward model."
    yield ""
    yield from headline_table(found)
    yield from ("", "Intervals: 95 %, clusters resampled, gains paired.")
    if found["sft"]["invented"]:
        yield "An answer is *invented* that states a value nobody gave to its question, or no value at all."


def headline_table(found: dict) -> Iterator[str]:
    """Policy, SFT and best-of-n side by side, with the policy's gains: the table for a README."""
    sft, policy, beside = each = tuple(found[name] for name in ("sft", "policy", "best_of"))
    header = (f"SFT, {sft['way']}", f"policy, {policy['way']}", f"SFT, {beside['way']}")
    yield _row(f"{found['prompts']} prompts", *header, "policy − SFT", f"policy − {beside['way']}")
    yield _row(*["---"] * 6)
    yield _row("KL to SFT, nats", f"{sft['kl']:.2f}", f"{policy['kl']:.2f}", f"≤ {beside['kl']:.2f}", "", "")
    for name in LABELS:
        if sft[name]:
            gains = (_gain(found[which][name]) for which in ("gain", "gain_over_best_of"))
            yield _row(name, *(f"{one[name]['mean']:.3f}" for one in each), *gains)


def _verdict(card: dict) -> Iterator[str]:
    found = card["champion"]
    yield from (f"## Champion: {'yes' if found['is_champion'] else 'no'}", "")
    yield from (f"- {reason}" for reason in found["reasons"])


def _parts(card: dict) -> Iterator[str]:
    yield from ("## Part by part", "", "Gains of the policy over SFT, each in its best way.", "")
    names = [name for name in LABELS if card["headline"]["gain"][name]]
    yield _row("prompts", "number", "clusters", *names)
    yield _row(*["---"] * (3 + len(names)))
    for part, found in card["headline"]["parts"].items():
        gains = (_gain(found["gain"][name]) for name in names)
        yield _row(NAMES[part], str(found["prompts"]), str(found["clusters"]), *gains)


def _frontier(card: dict) -> Iterator[str]:
    yield from ("## Every way to answer", "", f"![Frontier](../../{PICTURE})", "")
    yield "KL to SFT at ppo.temperature, nats per response: of samples the mean log-ratio, of a greedy"
    yield "response −log of SFT's probability, of best-of-n an upper bound. Best-of-n by the reward model is"
    yield "estimated without bias from at least n samples to each prompt."
    for part in dict.fromkeys(row["part"] for row in card["frontier"]):
        rows = [row for row in card["frontier"] if row["part"] == part]
        names = [name for name in (*LABELS, "silent") if rows[0][name]]
        yield from ("", f"### {NAMES[part].capitalize()} ({rows[0]['prompts']})", "")
        yield _row("model", "way", "KL", *names)
        yield _row(*["---"] * (3 + len(names)))
        for row in rows:
            yield _row(MODELS[row["model"]], row["way"], _kl(row), *(_mean(row[name]) for name in names))


def _kl(row: dict) -> str:
    if row["kl_is_bound"]:
        return f"≤ {row['kl']:.2f}"
    return f"{row['kl']:.2f} {_bounds(row['kl_interval'], '.2f')}"


def render_samples(card: dict, samples: Sequence[dict]) -> str:
    """samples.md: greedy and sampled, the monitor, and samples side by side."""
    sections = (_compared(card), [render_monitor(card["monitor"])], ["## samples", "", render_table(samples)])
    return "\n".join(line for section in sections for line in (*section, ""))


def _compared(card: dict) -> Iterator[str]:
    yield from ("# Policy against SFT", "")
    yield f"{card['prompts']} held-out prompts, the same random numbers for both. KL of the policy to SFT: "
    yield f"{card['kl_nats']:.3f} nats per response."
    for way in ("greedy", "sampled"):
        found, score = card[way], card[way]["score"]
        yield from ("", f"## {way}", "")
        yield (
            f"Score {score['sft']:.3f} → {score['ppo']:.3f}, gain {_bounds(score['interval'], '+.3f')}; "
            f"win rate {found['win_rate']:.3f} {_bounds(found['interval'], '.3f')}."
        )
        yield from ("", "| | SFT | PPO |", "|---|---|---|")
        for name, mean in found["sft"].items():
            yield f"| {name.replace('_', ' ')} | {mean:.3f} | {found['ppo'][name]:.3f} |"
        if found["correct"]:
            yield from ("", render_correctness(way, found["correct"]))


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
        means = f"{f['sft']:.3f} | {f['ppo']:.3f} | {f['gain']:+.3f}"
        lines.append(f"| {kind} | {f['prompts']} | {means} | {_bounds(f['interval'], '+.3f')} |")
    return "\n".join(lines)


def _cell(text: str) -> str:
    return text.strip().replace("|", "\\|").replace("\n", "<br>")[:400]


def _row(*cells: str) -> str:
    return f"| {' | '.join(cells)} |"


def _mean(found: dict | None) -> str:
    return "—" if found is None else f"{found['mean']:.3f} {_bounds(found['interval'], '.3f')}"


def _gain(found: dict | None) -> str:
    return "—" if found is None else f"{found['gain']:+.3f} {_bounds(found['interval'], '+.3f')}"


def _bounds(interval: Sequence[float] | None, shape: str) -> str:
    """A dash where there were too few clusters."""
    return "—" if interval is None else f"[{interval[0]:{shape}}, {interval[1]:{shape}}]"

"""The card as one markdown page. What a post says is shown as text, whatever it looks like."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Sequence
from textwrap import wrap

from tasks.reward_eval.calibration import BINS
from tasks.reward_eval.truth import LEAST_OF_JUDGE

PICTURE = "reports/reward_eval/reliability.png"
SITES_SHOWN = 15
LINE = 100  # characters of a quoted line
RULES = {
    "reward_model": "**reward model**",
    "longer": "longer answer wins",
    "has_code": "answer with code wins",
    "logistic": "logistic rule on text",
    "answer_only": "answer-only rule: its words, blind to the question",
    "style": "better style wins",
    "earlier": "earlier answer wins (not text)",
}
PARTITIONS = {
    "kind": "kind of question",
    "wording": "wording, known in training or new",
    "gap": "score gap",
    "length": "the better answer is …",
    "position": "the better answer was posted …",
    "site_kind": "sites",
    "site": "site",
}


SCORERS = {"reward_model": "reward model", "judge": "judge", "answer_only": "answer-only rule"}
TRUTH = {"all": "", "style": "style stands …", "kind": "kind of question", "wording": "wording"}


def render(card: dict) -> str:
    """The page."""
    parts = (_head, _rules, _parts, _truth, _judge, _length, _calibration, _mistakes)
    return "\n".join(line for section in parts if (lines := list(section(card))) for line in (*lines, ""))


def _head(card: dict) -> Iterator[str]:
    bars, own, cut = card["bars"], card["rules"]["reward_model"], card["without_eos"]
    lead = f"lead over the best rule that sees only the text ('{card['best_text_rule']}')"
    accuracy = ("accuracy", f"{own['accuracy']:.3f}", _interval(own["interval"]), f"{bars['min_accuracy']:g}")
    margin = (lead, f"{card['margin']:+.3f}", _interval(card["margin_interval"], "+"))
    yield from ("# Reward model: report card", "", f"**Gate: {card['verdict']}.**", "")
    unread = ("accuracy, answers cut of their eos", f"{cut['accuracy']:.3f}", _interval(cut["interval"]), "")
    rows = (accuracy, (*margin, f"{bars['min_margin']:+g}"), unread)
    yield from _table(("", "reached", "95 % interval", "bar for its lower end"), rows)
    yield ""
    yield f"{card['pairs']} pairs of {card['questions']} held-out questions; every pair counts once."
    yield f"Intervals: 95 %, {card['clusters']} clusters of questions resampled whole, leads paired; a dash"
    yield "where there are too few."
    lost = f"{cut['loss']:+.3f} {_interval(cut['loss_interval'], '+')}"
    yield f"What accuracy loses where answers are cut of their eos: {lost}."


def _rules(card: dict) -> Iterator[str]:
    yield from ("## Beside the trivial rules", "")
    rows = []
    for rule, found in card["rules"].items():
        is_own = rule == "reward_model"
        known = (f"{found['accuracy']:.3f}", f"{found['ties']:.3f}")
        half = "—" if is_own else f"{found['accuracy_half_ties']:.3f}"
        lead = "" if is_own else _lead(found)
        rows.append((RULES[rule], *known, half, _interval(found["interval"]), lead))
    header = ("rule", "accuracy", "ties", "ties counted half", "95 % interval", "reward model's lead")
    yield from _table(header, rows)
    logistic, answer_only = card["logistic_rule"], card.get("answer_only_rule")
    coefficients = ", ".join(f"{name} {value:+.2f}" for name, value in logistic["coefficients"].items())
    yield ""
    yield "A tie is never right; a rule that cannot tell gets half of it, the reward model nothing."
    yield f"The logistic rule is fitted to {logistic['pairs']} training pairs of {logistic['questions']}"
    yield f"questions; log-odds per standard difference: {coefficients}."
    if answer_only:
        leading = ", ".join(f"{_plain(gram)} {value:+.2f}" for gram, value in answer_only["leading"])
        yield f"The answer-only rule is fitted to {answer_only['pairs']} training pairs of"
        yield f"{answer_only['questions']} questions; its n-grams of most weight: {leading or 'none'}."


def _parts(card: dict) -> Iterator[str]:
    yield "## Where it is right"
    header = ("pairs", "questions", "accuracy", "95 % interval", "longer wins", "lead over longer")
    for partition, parts in card["parts"].items():
        if len(parts) == 1:
            continue  # the whole again
        shown = _shown(partition, parts)
        yield ""
        yield from _table((PARTITIONS[partition], *header), [_part(name, parts[name]) for name in shown])
        if len(shown) < len(parts):
            yield from ("", f"… and {len(parts) - len(shown)} smaller sites in card.json.")
    yield ""
    yield "Similar: within 6 : 5 in characters; much: from 2 : 1 on. Votes gather with time: a better answer"
    yield "that was posted *later* overtook the other with less exposure."


def _truth(card: dict) -> Iterator[str]:
    if not (truth := card.get("truth")):
        return
    yield from ("## Does the right answer beat the wrong one?", "")
    known = [name for name in SCORERS if name in truth["all"]["all"]]
    header = ("pairs", "clusters", *(cell for name in known for cell in (SCORERS[name], "95 % interval")))
    for partition, parts in truth.items():
        rows = [_truth_row(name, part, known) for name, part in parts.items()]
        yield from (*_table((TRUTH[partition], *header), rows), "")
    yield "Every answer that states the expected value beside every one that does not, whatever their votes;"
    yield "a tie is wrong. *Against truth*: the wrong answer has the better style."


def _truth_row(name: str, part: dict, scorers: Sequence[str]) -> tuple[str, ...]:
    said = ((f"{part[s]['right']:.3f}", _interval(part[s]["interval"])) for s in scorers)
    return _plain(name), str(part["pairs"]), str(part["clusters"]), *(cell for each in said for cell in each)


def _judge(card: dict) -> Iterator[str]:
    if not (judge := card.get("judge")):
        return
    yield from ("## The judge", "")
    of_mistakes = judge["of_mistakes"]
    mends = "" if of_mistakes is None else f", {of_mistakes:.3f} of those the reward model gets wrong"
    bounds = _interval(judge["interval"])
    yield f"The judge, of other questions, is right for {judge['accuracy']:.3f} {bounds} of the pairs{mends}."
    yield f"Of answers cut of their eos: {judge['accuracy_without_eos']:.3f}."
    if (against := judge["style_against_truth"]) is None:
        yield "Nobody can tell here whether it judges truth or style: neither is known of these answers."
        return
    yield f"Where style stands against truth it prefers the right answer in {against:.3f} of the pairs;"
    yield f"{LEAST_OF_JUDGE} is asked of a judge."
    if not judge["is_judge"]:
        yield "**It prefers style to truth and is no judge: what it says of the policy proves nothing.**"


def _part(name: str, part: dict) -> tuple[str, ...]:
    counts, accuracy = (str(part["pairs"]), str(part["questions"])), f"{part['accuracy']:.3f}"
    return _plain(name), *counts, accuracy, _interval(part["interval"]), f"{part['longer']:.3f}", _lead(part)


def _shown(partition: str, parts: dict[str, dict]) -> list[str]:
    if partition != "site":
        return list(parts)
    return sorted(parts, key=lambda site: (-parts[site]["pairs"], site))[:SITES_SHOWN]


def _length(card: dict) -> Iterator[str]:
    yield from ("## Does it score length?", "")
    found = {name: "—" if r is None else f"{r:+.3f}" for name, r in card["length_correlation"].items()}
    everywhere = ("all answers", found["pearson"], found["spearman"])
    within = ("answers to one question", found["pearson_within"], found["spearman_within"])
    yield from _table(("correlation of score and log length", "Pearson", "Spearman"), [everywhere, within])


def _calibration(card: dict) -> Iterator[str]:
    found = card["calibration"]
    yield from ("## Are its margins log-odds?", "", f"![Reliability diagram](../../{PICTURE})", "")
    yield "P(a is better than b) = σ(score of a − score of b); every pair counts in both orientations,"
    yield "confidence is the greater of the two P."
    yield f"Brier score {found['brier']:.3f} (knowing nothing: 0.250), log loss {found['log_loss']:.3f} nats"
    yield f"(0.693), expected calibration error {found['ece']:.3f} in {BINS} equal bins."
    if cooled := found["temperature"]:
        yield f"For information: divided by {cooled['value']:.3g}, fitted to these same pairs, margins have"
        yield f"log loss {cooled['log_loss']:.3f} nats and calibration error {cooled['ece']:.3f}."
    yield ""
    rows = []
    for b in found["bins"]:
        bounds, known = f"{b['low']:.2f} – {b['high']:.2f}", (f"{b['confidence']:.3f}", f"{b['right']:.3f}")
        rows.append((bounds, str(b["pairs"]), *known, _interval(b["interval"])))
    yield from _table(("confidence", "pairs", "mean confidence", "right", "95 % interval"), rows)


def _mistakes(card: dict) -> Iterator[str]:
    yield from ("## Its worst mistakes", "")
    if not card["mistakes"]:
        yield "It prefers no worse answer."
        return
    yield "The wrong pairs with the largest margins, at most one per question; texts are shortened."
    for number, found in enumerate(card["mistakes"], 1):
        yield from ("", f"### {number}. {_plain(found['question'])}", "")
        yield f"Margin {found['margin']:+.2f}; the published scores differ by {found['gap']}."
        yield ""
        yield from _quoted(found["text"])
        for name in ("better", "worse"):
            answer = found[name]
            yield ""
            yield f"**{name}**, published score {answer['published']}, reward model {answer['score']:+.2f};"
            yield f"{answer['characters']} characters, answer {answer['id']}:"
            yield ""
            yield from _quoted(answer["text"])


def _table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> Iterator[str]:
    for row in (header, ["---"] * len(header), *rows):
        yield f"| {' | '.join(row)} |"


def _lead(found: dict) -> str:
    return f"{found['lead']:+.3f} {_interval(found['lead_interval'], '+')}"


def _interval(bounds: Sequence[float] | None, sign: str = "-") -> str:
    return "—" if bounds is None else f"[{bounds[0]:{sign}.3f}, {bounds[1]:{sign}.3f}]"


def _plain(text: str) -> str:
    """Text for a heading or a cell: no character of it is markdown or HTML."""
    return re.sub(r"([\\`*_{}\[\]<>()#|~!&$])", r"\\\1", " ".join(text.split()))


def _quoted(text: str) -> Iterator[str]:
    """Text in a fence longer than any in it, so that none of it is markdown or HTML; long lines wrapped."""
    fence = "`" * max(3, 1 + max((len(run) for run in re.findall("`+", text)), default=0))
    yield f"{fence}text"
    for line in text.split("\n"):
        yield from wrap(line, LINE, replace_whitespace=False, break_on_hyphens=False) or [""]
    yield fence

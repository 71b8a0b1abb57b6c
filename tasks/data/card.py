"""What the data is, in numbers and in words: metrics and the data card."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence

import pyarrow as pa
import pyarrow.compute as pc

from params.schema import DataParams
from tasks.data.damage import LONGEST_ROW, total
from tasks.data.shelf import Shelf

DROPS = {
    "malformed_row": "row that is no well-formed XML, no JSON object, or cannot be decoded",
    "too_long_row": f"row of more than {LONGEST_ROW:,} bytes",
    "row_without_id": "row without a readable Id",
    "duplicate_id": "row with the Id of an earlier one",
    "other_post_type": "neither question nor answer (wiki, tag excerpt, nomination, …)",
    "unreadable_row": "row without a readable Score, CreationDate or ParentId; prompt, chosen, …",
    "not_the_assistant": "dialogue that does not end with an answer of the assistant to a user",
    "different_prompts": "chosen and rejected that answer different prompts",
    "contradictory_scores": "chosen with a lower score than rejected, or pairs that contradict one another",
    "orphan_answer": "answer to no question of the file",
    "empty_answer": "answer without words (an image, or nothing)",
    "identical_answer": "answer with the text of an earlier one to the same question",
    "unreadable_html": "text that could not be converted",
    "empty_question": "question without words",
    "question_with_few_answers": "question with fewer usable answers than data.min_answers",
    "like_held_out": "question that resembles one of a held-out site (data.eval_sites)",
    "answer_of_dropped_question": "answer that went with its question",
}
LOSSES = {
    "dropped_characters": "characters that XML forbids, dropped",
    "replaced_characters": "runs of bytes that are no UTF-8, replaced by U+FFFD",
    "dropped_links": "rows of PostLinks that cannot be read",
}


class Tally:
    """Counts questions, answers, pairs and licences as they are written.

    Attributes:
        counts: (site, split) -> questions, answers, pairs.
        licences: name -> posts.
    """

    def __init__(self) -> None:
        self.counts: dict[tuple[str, str], Counter[str]] = {}
        self.licences: Counter[str] = Counter()

    def add(self, split: str, questions: pa.Table) -> None:
        """Count questions of `tasks.data.schema.UNSPLIT`."""
        answers = pc.list_flatten(questions["answers"])
        for licences in (questions["licence"], pc.struct_field(answers, "licence")):
            for found in pc.value_counts(licences).to_pylist():
                self.licences[found["values"]] += found["counts"]
        lengths = pc.list_value_length(questions["answers"])
        table = pa.table({"site": questions["site"], "answers": lengths, "pairs": questions["pairs"]})
        sums = table.group_by("site").aggregate([("answers", "sum"), ("pairs", "sum"), ("site", "count")])
        for row in sums.to_pylist():
            found = self.counts.setdefault((row["site"], split), Counter())
            found["questions"] += row["site_count"]
            found["answers"] += row["answers_sum"]
            found["pairs"] += row["pairs_sum"]

    def sum(self, site: str | None = None, split: str | None = None) -> dict[str, int]:
        """Questions, answers and pairs of a site, a split, both or all."""
        found = [c for (s, name), c in self.counts.items() if site in (None, s) and split in (None, name)]
        return {what: sum(counts[what] for counts in found) for what in ("questions", "answers", "pairs")}


def metrics_of(
    tally: Tally, splits: Sequence[str], shelf: Shelf, drops: Counter[str], overlap: Mapping[str, int]
) -> dict[str, float]:
    """Counts for metrics.json: rows, questions, answers, pairs, per split too, drops by reason, overlaps."""
    lost, links = total(shelf.damage.values()), total(shelf.link_damage.values())
    metrics = {"rows": shelf.rows, **tally.sum()}
    for name in splits:
        metrics |= {f"{name}/{key}": value for key, value in tally.sum(split=name).items()}
    metrics |= {f"drops/{reason}": drops[reason] for reason in DROPS}
    metrics |= {
        "dropped_characters": lost.dropped_characters + links.dropped_characters,
        "replaced_characters": lost.replaced_characters + links.replaced_characters,
        "dropped_links": links.drops.total(),
    }
    metrics |= {f"overlap/{kind}": count for kind, count in overlap.items()}
    return {key: float(value) for key, value in metrics.items()}


def card_of(
    tally: Tally, splits: Sequence[str], metrics: Mapping[str, float], data: DataParams, first: Sequence[str]
) -> str:
    """The card as Markdown; the same data gives the same text. `first`: see `first_losses`."""
    how, proof = _how_split(data, metrics)
    sites = sorted({site for site, _ in tally.counts})
    lines = [
        "# Data card",
        "",
        f"Questions with {data.min_answers} or more usable answers from {len(sites)} StackExchange site(s), "
        f"split by {data.split_by}. {how}An answer's score is `round(log2(1 + votes))`, + 1 if accepted, "
        "−1 if votes are negative; a pair is two answers of one question with different scores.",
        "",
        "| site | split | questions | answers | pairs |",
        "|---|---|---:|---:|---:|",
        *(_line(site, name, tally.sum(site, name)) for site in sites for name in splits),
        *(_line("**all**", name, tally.sum(split=name)) for name in splits),
        _line("**all**", "**all**", tally.sum()),
        "",
        f"Of {metrics['rows']:,.0f} rows read, dropped:",
        "",
        "| reason | rows |",
        "|---|---:|",
        *(f"| {words} | {metrics[f'drops/{reason}']:,.0f} |" for reason, words in DROPS.items()),
        "",
        *(f"- {words}: {metrics[name]:,.0f}" for name, words in LOSSES.items()),
        *(["", "Where this was first met:", "", *(f"- {line}" for line in first)] if first else []),
        "",
        f"No id, normalised title or normalised body stands in two splits: {proof}",
        "",
        "## Licence and attribution",
        "",
        "Posts are their authors' work, under the CC BY-SA licence that the column `licence` states per post "
        f"({_licences(tally.licences)}). Attribution: `https://<site>/q/<id>` and `https://<site>/a/<id>` "
        "lead to a post, `https://<site>/users/<owner_id>` to its author; keep these columns with every copy "
        "and every derived text.",
        "",
    ]
    return "\n".join(lines)


def _how_split(data: DataParams, metrics: Mapping[str, float]) -> tuple[str, str]:
    """What is held out, and what became of look-alikes."""
    together = "questions that share one go together"
    if data.split_by == "question":
        return "", f"{together}."
    count = metrics["drops/like_held_out"]
    return (
        f"**Held out:** eval is all of {', '.join(data.eval_sites)} and nothing else; the other sites' "
        "questions go to sft, reward and rl by their shares (data.split.eval is not used). ",
        f"{together}, and those that share one with a question of a held-out site are left out of training "
        f"({count:,.0f}).",
    )


def first_losses(shelf: Shelf) -> list[str]:
    """Of each file and reason the first row left out: "unix.example.7z: row 51: not well-formed …"."""
    lines: list[str] = []
    for damages in (shelf.damage, shelf.link_damage):
        for path, damage in damages.items():
            lines += [f"{path.name}: row {row}: {words}" for row, words in sorted(damage.first.values())]
    return lines


def _line(site: str, split: str, counts: Mapping[str, int]) -> str:
    return f"| {site} | {split} | {' | '.join(f'{value:,}' for value in counts.values())} |"


def _licences(counts: Counter[str]) -> str:
    return ", ".join(f"{name}: {count:,} posts" for name, count in sorted(counts.items()))

"""Questions -> tokens: the tokenizer, the template and every length.

Writes `tokenizer/`, `rows/` (packed documents for sft), `groups/` (a question with its scored answers, for
reward and reward_eval; the judge's are of sft's split, so that it shares no question with the reward model)
and `prompts/` (for ppo and policy_eval). The four are separate outs, so that a new prompt length leaves sft
and reward unchanged.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pyarrow as pa
import pyarrow.compute as pc
from pyarrow import parquet

from params.schema import Params
from tasks.lm.model.ends import save_tokenizer
from tasks.lm.model.loading import load_tokenizer, train_tokenizer
from tasks.lm.model.template import document_text
from tasks.pack.encode import Documents, Groups, Prompts
from tasks.pack.exposure import weighted
from tasks.pack.mapped import Mapped, mapped
from tasks.pack.records import GROUPS, PROMPTS, ROWS
from tasks.pack.rows import packed
from tasks.run.files import remove, staged
from tasks.run.layout import Layout, StageResult
from tasks.run.parquet import TableWriter

TOUCHED = {"cut": "answers_cut", "drop": "answers_dropped", "split": "answers_split"}
QUESTIONS_AT_A_TIME = 50_000  # whose documents are laid into rows together; the rest waits on disk
PARTS = {
    "rows": (ROWS, ("sft",)),
    "groups": (GROUPS, ("reward", "judge", "eval")),
    "prompts": (PROMPTS, ("rl", "eval")),
}
LEARNT = ("reward", "judge")  # groups a model learns from; what is held out keeps every pair


def run(params: Params, layout: Layout) -> StageResult:
    """The stage.

    Raises:
        ValueError: no tokenizer, a seam that does not hold (names site and question), a split that comes out
        empty.
    """
    splits = {name: layout.artifact("data", f"{name}.parquet") for name in ("sft", "reward", "rl", "eval")}
    splits["judge"] = splits["sft"]
    for path in splits.values():
        if not path.is_file():
            raise ValueError(f"pack: {path} is missing; run the data stage first")
    tokenizer = _tokenizer(params, splits["sft"])
    work = layout.scratch("pack") / "work"
    remove(work)  # what a killed run left
    try:
        return _run(params, layout, splits, tokenizer, work)
    finally:
        remove(work)


def _run(params: Params, layout: Layout, splits: dict[str, Path], tokenizer, work: Path) -> StageResult:
    pack, count, found = params.pack, Counter(), {}
    for part, (_, names) in PARTS.items():
        for name in names:
            exposure = pack.exposure if name in LEARNT else "any"
            is_held_out = name == "eval"
            function = {
                "rows": Documents(tokenizer, pack),
                "groups": Groups(tokenizer, pack, exposure == "later_wins", is_held_out),
                "prompts": Prompts(tokenizer, pack, is_held_out),
            }[part]
            found[part, name] = mapped(splits[name], function, params.machine.threads, work / part)
            count.update(_counted(part, name, found[part, name], pack.long_documents))
    _refuse_empty(found, count, pack.exposure)
    with ExitStack() as outs:  # all are staged before the first takes its place
        save_tokenizer(tokenizer, outs.enter_context(staged(layout.artifact("pack", "tokenizer"))))
        rows, tokens = {}, 0
        for part, (schema, names) in PARTS.items():
            folder = outs.enter_context(staged(layout.artifact("pack", part)))
            folder.mkdir()
            for name in names:
                with TableWriter(folder / f"{name}.parquet", schema) as writer:
                    is_weighted = pack.exposure == "weighted" and name in LEARNT
                    for table in _tables(part, found[part, name], pack.row_tokens, is_weighted):
                        writer.write(table)
                        tokens += len(table["tokens"].combine_chunks().flatten()) if part == "rows" else 0
                rows[part, name] = writer.rows
    return StageResult(
        {
            "vocabulary": len(tokenizer),
            "rows": rows["rows", "sft"],
            "row_fill": tokens / (rows["rows", "sft"] * pack.row_tokens),
            "sft_tokens": tokens,
            "reward_groups": rows["groups", "reward"],
            "judge_groups": rows["groups", "judge"],
            "eval_groups": rows["groups", "eval"],
            "rl_prompts": rows["prompts", "rl"],
            "eval_prompts": rows["prompts", "eval"],
            **count,
        }
    )


def _refuse_empty(found: dict[tuple[str, str], Mapped], count: Counter[str], exposure: str) -> None:
    for (part, name), of_one in found.items():
        if not (
            pc.sum(pc.list_value_length(of_one.table["tokens"])).as_py() if part == "rows" else of_one.kept
        ):
            key = "pack.prompt_tokens" if part == "prompts" else "pack.document_tokens"
            where = part if part == "rows" else f"{part}/{name}"
            hint = f"is {key} too short?"
            if part == "groups" and name in LEARNT and exposure == "later_wins":
                hint += " Or does pack.exposure: later_wins leave no pair?"
            raise ValueError(f"pack: nothing is left for pack/{where}; {hint} {dict(count)}")


def _tables(part: str, found: Mapped, row_tokens: int, is_weighted: bool) -> Iterator[pa.Table]:
    if is_weighted:
        yield from weighted(lambda: found.batches(QUESTIONS_AT_A_TIME))
        return
    for questions in found.batches(QUESTIONS_AT_A_TIME):
        if part == "rows":
            yield from packed(questions, row_tokens)
        else:
            yield questions


def _counted(part: str, split: str, found: Mapped, long_documents: str) -> Counter[str]:
    """The counts of one file as metrics."""
    count = Counter({f"{split}_{reason}": n for reason, n in found.count.items() if reason != "touched"})
    touched = found.count["touched"]
    if part == "prompts":
        return count + Counter({f"{split}_prompts_truncated": touched})
    what = "cut" if part == "groups" and long_documents == "split" else long_documents
    count[f"{split}_{TOUCHED[what]}"] = touched
    return count


def _tokenizer(params: Params, sft: Path):
    if params.model.base:
        return load_tokenizer(params.model.base, params.model.revision)
    return train_tokenizer(_documents(sft), params.model.config.vocab_size)


def _documents(path: Path) -> Iterator[str]:
    for batch in parquet.ParquetFile(path).iter_batches(512, columns=["text", "answers"]):
        for question in batch.to_pylist():
            yield from (document_text(question["text"], answer["text"]) for answer in question["answers"])

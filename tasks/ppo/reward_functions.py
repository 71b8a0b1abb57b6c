"""Where scores come from: a classifier's pipeline, a reward model, a file of human scores, a mix of these.

A reward function takes B prompts and B responses, all of them texts or all of them token ids, and gives B
numbers, or B rows of a reward for each token of the response. Any Python function will do; these make some.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tasks.lm.heads.reward_model import RewardModel, scale_of
from tasks.lm.heads.scores import check_scorer
from tasks.lm.model.context import room_of
from tasks.lm.model.ends import closed
from tasks.lm.model.modes import evaluating
from tasks.lm.model.reading import encode, harmless
from tasks.lm.model.template import decode_responses, parted, without_eos
from tasks.ppo.batch import read_scores
from tasks.ppo.human_scores import read_human_scores

RewardFunction = Callable[[Sequence, Sequence], Tensor | Sequence]
QUOTED = 60  # characters of a text in a message


def from_pipeline(
    pipe: Any, label: str | None = None, *, reads: str = "both", tokenizer: Any = None, batch_size: int = 16
) -> RewardFunction:
    """The raw logit of a label, of a transformers pipeline (text-classification, alias sentiment-analysis).

    Args:
        pipe: texts too long for its model are cut at their end.
        label: as the model's configuration names it; None: the only one it has.
        reads: `both`: prompt and response as one text; `response`: the response alone.
        tokenizer: the policy's; needed where token ids come.
        batch_size: texts in one forward.

    Raises:
        ValueError: a pipeline of another kind, a label it does not have, none of several. When called: token
            ids and no tokenizer.
    """
    if getattr(pipe, "task", None) not in ("text-classification", "sentiment-analysis"):
        raise ValueError(
            f"pipe must be a text-classification pipeline, not {_quote(getattr(pipe, 'task', pipe))}"
        )
    if reads not in ("both", "response"):
        raise ValueError(f"reads is both or response, not {reads!r}")
    known = list(pipe.model.config.id2label.values())
    if label is None and len(known) > 1:
        raise ValueError(f"label: the pipeline has several; name one of {', '.join(known)}")
    label = known[0] if label is None else label
    if label not in known:
        raise ValueError(f"label: the pipeline has no {label!r}; it has {', '.join(known)}")
    keys = {"top_k": None, "function_to_apply": "none", "truncation": True, "batch_size": batch_size}
    keys["split_special_tokens"] = True  # a text's letters, as everywhere
    most = room_of(pipe.model)
    if most is not None and most < pipe.tokenizer.model_max_length:
        keys["max_length"] = most

    def pipeline_score(prompts: Sequence, responses: Sequence) -> Tensor:
        prompts, responses = _as_texts("from_pipeline", tokenizer, prompts, responses)
        whole = reads == "both"
        texts = [p + r if whole else r for p, r in zip(prompts, responses, strict=True)]
        texts = harmless(pipe.tokenizer, texts)
        with evaluating(pipe.model):
            said = [{each["label"]: each["score"] for each in found} for found in pipe(texts, **keys)]
        return torch.tensor([of_text[label] for of_text in said])

    return pipeline_score


def from_model(
    model: Any,
    tokenizer: Any,
    *,
    normalize: bool = False,
    rows: int = 64,
    device: torch.device | str = "cpu",
    ends: Sequence[int] = (),
) -> RewardFunction:
    """The score of a reward model at the document's last token, or as an encoder's own head gives it.

    Args:
        model: its folder or Hub id, a :class:`tasks.lm.heads.reward_model.RewardModel`, or a
            sequence-classification model with one label that reads the policy's tokens.
        tokenizer: the policy's.
        normalize: (score - mean) / standard deviation, from the `scores.json` in the model's folder.
        rows: documents in one forward.
        device: for a model that is loaded.
        ends: tokens beside the tokenizer's eos that end a response of the policy (`PPOTrainer.ends`).

    Texts are read as finished documents; token ids end with eos only where the response does. What a model
    has no places for is cut at its end (an encoder's closing token stays).

    Raises:
        ValueError: no such model, more labels than one, or `normalize` without a scores.json.
    """
    scale = scale_of(model, "normalize") if normalize else (0.0, 1.0)
    if isinstance(model, str | Path):
        model = RewardModel.load(model, tokenizer, device, key="model", policy_ends=ends)
    elif not isinstance(model, RewardModel):
        check_scorer(model)
        model = RewardModel(model, tokenizer, tokenizer, shares_tokens=True, policy_ends=tuple(ends))
    if model.texts is not None:
        return _of_both(model, rows, *scale)
    return _of_tokens(lambda prompts, responses: model.score(prompts, responses, rows), tokenizer, *scale)


def _of_both(model: RewardModel, rows: int, mean: float, std: float) -> RewardFunction:
    """Of a model that reads texts: token ids become question and answer, texts are freed of the template."""

    def model_score(prompts: Sequence, responses: Sequence) -> Tensor:
        if not _are_texts(prompts):
            return (model.score(_ids(prompts), _ids(responses), rows) - mean) / std
        pairs = [parted(prompt, response) for prompt, response in zip(prompts, responses, strict=True)]
        questions, answers = ([pair[i] for pair in pairs] for i in range(2))
        return (model.score_texts(questions, answers, rows) - mean) / std

    model_score.reads_tokens = True
    return model_score


def from_adapter(
    model: Any,
    tokenizer: Any,
    *,
    scores: str | Path | None = None,
    rows: int = 64,
    ends: Sequence[int] = (),
) -> RewardFunction:
    """The score of the reward adapter on the policy's own base, at the document's last token.

    Args:
        model: the policy, with `reward_adapter`.
        tokenizer: the policy's.
        scores: folder of a scores.json, which normalises as in :func:`from_model`; None: raw scores.
        rows: documents in one forward.
        ends: as for :func:`from_model`.

    Raises:
        ValueError: the model has no reward adapter, or the folder no scores.json.
    """
    if not getattr(model, "supports_rm_adapter", False):
        raise ValueError("model has no reward adapter; load it with reward_adapter, or use from_model")
    scale = (0.0, 1.0) if scores is None else scale_of(scores, "normalize")

    def score(prompts: list[list[int]], responses: list[list[int]]) -> Tensor:
        responses = closed(responses, ends, tokenizer.eos_token_id)
        whole = [p + r for p, r in zip(prompts, responses, strict=True)]
        return model.score_documents(whole, rows)

    return _of_tokens(score, tokenizer, *scale)


def _of_tokens(score: Callable, tokenizer: Any, mean: float, std: float) -> RewardFunction:
    def model_score(prompts: Sequence, responses: Sequence) -> Tensor:
        if _are_texts(prompts):
            whole = [p + r for p, r in zip(prompts, responses, strict=True)]
            prompts = [without_eos(ids, tokenizer) for ids in encode(tokenizer, whole, "text")]
            responses = [[tokenizer.eos_token_id]] * len(prompts)
        return (score(_ids(prompts), _ids(responses)) - mean) / std

    model_score.reads_tokens = True
    return model_score


def from_file(path: str | Path, *, tokenizer: Any = None) -> RewardFunction:
    """Human scores: JSON lines (.jsonl, .json) or CSV (.csv) with prompt, response and score.

    Texts are compared without the white space around them; of several scores of one response counts the mean.

    Args:
        path: of the file, UTF-8; further columns are ignored.
        tokenizer: the policy's; needed where token ids come.

    Raises:
        ValueError: no such file, another suffix, a row without the three or whose score is no finite number
            (names file and line). When called: a response without a score (quotes it).
    """
    means = read_human_scores(Path(path))

    def human_score(prompts: Sequence, responses: Sequence) -> Tensor:
        scores = []
        for prompt, response in zip(*_as_texts("from_file", tokenizer, prompts, responses), strict=True):
            if (score := means.get((prompt.strip(), response.strip()))) is None:
                raise ValueError(f"{path} has no score for {_quote(response)} in answer to {_quote(prompt)}")
            scores.append(score)
        return torch.tensor(scores)

    return human_score


def mix(weights: Mapping[RewardFunction, float]) -> RewardFunction:
    """The weighted sum of reward functions; all give a number per response, or all a reward per token.

    Raises:
        ValueError: no function, a weight that is no finite number. When called: scores that
            :func:`scores_of` refuses, or of both kinds at once.
    """
    if not weights:
        raise ValueError("mix: no reward function")
    for part, weight in weights.items():
        if not callable(part):
            raise ValueError(f"mix: {part!r} is no function")
        if not isinstance(weight, int | float) or not math.isfinite(weight):
            raise ValueError(f"mix: the weight of {_name(part)} is {weight!r}, no finite number")

    def mixed_score(prompts: Sequence, responses: Sequence) -> Tensor | list[Tensor]:
        each = {part: scores_of(part, prompts, responses) for part in weights}
        plain = [part for part, rows in each.items() if all(row.numel() == 1 for row in rows)]
        dense = [part for part in each if part not in plain]
        if plain and dense:
            raise ValueError(
                f"mix: {_name(plain[0])} gives a number per response, {_name(dense[0])} a reward per token"
            )
        total = []
        for i, rows in enumerate(zip(*each.values(), strict=True)):
            if len({row.numel() for row in rows}) > 1:
                counts = ", ".join(
                    f"{row.numel()} ({_name(part)})" for part, row in zip(each, rows, strict=True)
                )
                raise ValueError(
                    f"mix: rewards of response {i} are for different numbers of tokens: {counts}"
                )
            flat = (row.reshape(-1).cpu() for row in rows)
            total.append(sum(weight * row for weight, row in zip(weights.values(), flat, strict=True)))
        return total if dense else torch.cat(total)

    mixed_score.reads_tokens = all(getattr(part, "reads_tokens", False) for part in weights)
    return mixed_score


def scores_of(reward_fn: RewardFunction, prompts: Sequence, responses: Sequence) -> list[Tensor]:
    """What a reward function says of B responses, as :func:`tasks.ppo.batch.read_scores` takes it."""
    return read_scores(f"{_name(reward_fn)}: scores", reward_fn(prompts, responses), len(responses))


def texts_of(tokenizer: Any, prompts: Sequence, responses: Sequence) -> tuple[list[str], list[str]]:
    """:func:`tasks.lm.model.template.decode_responses`, of rows that may be tensors. B, B rows -> B, B."""
    return decode_responses(tokenizer, _ids(prompts), _ids(responses))


def _ids(rows: Sequence) -> list[list[int]]:
    return [torch.as_tensor(row).tolist() for row in rows]


def _are_texts(rows: Sequence) -> bool:
    return all(isinstance(row, str) for row in rows)


def _as_texts(name: str, tokenizer, prompts: Sequence, responses: Sequence) -> tuple[Sequence, Sequence]:
    if _are_texts(prompts):
        return prompts, responses
    if tokenizer is None:
        raise ValueError(f"{name} reads texts, but token ids came: give it the policy's tokenizer")
    return texts_of(tokenizer, prompts, responses)


def _name(function: Callable) -> str:
    return getattr(function, "__name__", type(function).__name__)


def _quote(given: Any) -> str:
    text = given if isinstance(given, str) else repr(given)
    return repr(text if len(text) <= QUOTED else text[:QUOTED] + "…")

"""What a registered model says, by every loader, against what the run says: once, before it is registered."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from tasks.lm.model.template import document_text, encode_documents, encode_prompts, encode_texts

EXAMPLES = (("What is 1 + 2?", "It is 3."), ("How do I list the files of a folder?", "With `ls -l`."))
TOLERANCE = 1e-4  # of a score: absolute below 1, relative above


def check_scores(model, tokenizer, settings: Mapping[str, Any], saved: Path, key: str) -> None:
    """Compare the scores of an MLflow model by each of its flavours with those of the training.

    Args:
        model: the reward model as it was trained.
        tokenizer: its own.
        settings: what travels along: whether the tokenizer `closes_itself` a text, the `closing` text
            otherwise, and the `room` for tokens.
        saved: folder of the MLflow model.
        key: names the reward model in messages.

    Raises:
        ValueError: a score differs; one line with both.
    """
    import mlflow

    room, documents = settings["room"], documents_of(tokenizer, settings["closes_itself"], EXAMPLES)
    kept = [i for i, document in enumerate(documents) if room is None or len(document) <= room]
    if not kept:
        return
    expected = training_scores(model, [documents[i] for i in kept])
    frame = [dict(zip(("question", "answer"), EXAMPLES[i], strict=True)) for i in kept]
    texts = [document_text(*EXAMPLES[i]) + settings["closing"] for i in kept]
    found = {
        "pyfunc": mlflow.pyfunc.load_model(str(saved)).predict(frame),
        "transformers": [one["score"] for one in mlflow.transformers.load_model(str(saved))(texts)],
    }
    for loader, scores in found.items():
        _compare(loader, scores, expected, key)


def check_text_scores(folder: Path, saved: Path, key: str) -> None:
    """The same for a model that reads texts, as its folder says; it has one flavour.

    Raises:
        ValueError: as :func:`check_scores`.
    """
    import mlflow

    from tasks.lm.heads.reward_model import load_frozen_style
    from tasks.lm.model.loading import load_tokenizer

    model = load_frozen_style(folder, load_tokenizer(folder, key=key, needs_eos=False), key=key)
    questions, answers = ([example[i] for example in EXAMPLES] for i in range(2))
    found = mlflow.pyfunc.load_model(str(saved)).predict({"question": questions, "answer": answers})
    _compare("pyfunc", found, model.scores(questions, answers).tolist(), key)


def _compare(loader: str, scores: Sequence[float], expected: Sequence[float], key: str) -> None:
    for score, wanted in zip(scores, expected, strict=True):
        if not abs(score - wanted) <= TOLERANCE * max(1.0, abs(wanted)):
            raise ValueError(f"{key}: mlflow.{loader} gives a score of {score:.6g}, the run {wanted:.6g}")


def check_answers(model, tokenizer, settings: Mapping[str, Any], saved: Path, key: str) -> None:
    """Compare the greedy answers of an MLflow model with those of the run.

    Args:
        model: the language model as it was trained.
        tokenizer: its own.
        settings: what travels along: the `defaults` of an answer, the `room` for prompt and answer together,
            and how many tokens of a prompt stay (`cut_prompts_to`).
        saved: folder of the MLflow model.
        key: names the model in messages.

    Raises:
        ValueError: an answer differs; one line with both.
    """
    import mlflow

    prompts = encode_prompts(tokenizer, [question for question, _ in EXAMPLES])
    most, room, cut = settings["defaults"]["max_new_tokens"], settings["room"], settings["cut_prompts_to"]
    bounds = [bound for bound in (cut, room and room - most) if bound is not None]
    kept = [i for i, prompt in enumerate(prompts) if all(len(prompt) <= bound for bound in bounds)]
    asked = [EXAMPLES[i][0] for i in kept]
    expected = greedy_answers(model, tokenizer, [prompts[i] for i in kept], most)
    params = {"do_sample": False, "max_new_tokens": most}
    found = mlflow.pyfunc.load_model(str(saved)).predict(asked, params=params) if asked else []
    for question, said, wanted in zip(asked, found, expected, strict=True):
        if said != wanted:
            raise ValueError(f"{key}: to {question!r} mlflow.pyfunc answers {said!r}, the run {wanted!r}")


def documents_of(
    tokenizer, closes_itself: bool, pairs: Sequence[tuple[str, str]]
) -> list[list[int]]:
    """Token ids of (question, answer) pairs as a reward model reads them."""
    if closes_itself:
        return encode_texts(tokenizer, [document_text(*pair) for pair in pairs])
    return encode_documents(tokenizer, pairs)


def training_scores(model, documents: Sequence[Sequence[int]]) -> list[float]:
    """Scores of documents as reward_eval and ppo compute them."""
    from tasks.lm.heads.scores import score_documents

    return score_documents(model, documents, len(documents)).tolist()


def greedy_answers(model, tokenizer, prompts: Sequence[Sequence[int]], most: int) -> list[str]:
    """The likeliest answers as policy_eval takes them, less half characters and the blanks around."""
    from tasks.lm.model.ends import ends_of
    from tasks.lm.sampling.generation import generate

    eos, pad = tokenizer.eos_token_id, tokenizer.pad_token_id
    ends = ends_of(model, tokenizer)
    found = generate(model, prompts, max_tokens=most, eos_id=ends, pad_id=eos if pad is None else pad)
    clean: dict[str, Any] = {"skip_special_tokens": True, "clean_up_tokenization_spaces": False}
    return [text.replace("\ufffd", "").strip() for text in tokenizer.batch_decode(found.lists(), **clean)]


def closing_text(tokenizer, closes_itself: bool) -> str:
    """Text of the token that ends a scored document; empty where the tokenizer adds such a token itself."""
    is_added = closes_itself or tokenizer("a")["input_ids"][-1] == tokenizer.eos_token_id
    return "" if is_added else tokenizer.eos_token

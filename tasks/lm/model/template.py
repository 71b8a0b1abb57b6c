r"""The only template, and the seam between prompt and response.

A document is ids(`Question: …\n\nAnswer: …`) + eos; a prompt is ids(`Question: …\n\nAnswer:`), without a
trailing space, and must be the document's prefix: then the tokens a policy is prompted with are those it was
trained on. (With `Answer: ` it is not, for byte-level BPE and for Llama's tokenizer.)
"""

from __future__ import annotations

from collections.abc import Sequence

from tasks.lm.model.reading import encode

CLEAN = {"skip_special_tokens": True, "clean_up_tokenization_spaces": False}


def prompt_text(question: str) -> str:
    """The prompt of a question."""
    return f"Question: {question}\n\nAnswer:"


def document_text(question: str, answer: str) -> str:
    """A question with one of its answers."""
    return f"{prompt_text(question)} {answer}"


def parted(prompt: str, response: str) -> tuple[str, str]:
    r"""Question and answer of the texts of a prompt and its response: the template undone.

    Example: "Question: How?\n\nAnswer:", " So." -> "How?", "So.". Of a prompt that was cut at its begin the
    rest is the question.
    """
    question = prompt.removesuffix("Answer:").removesuffix("\n\n").removeprefix("Question: ")
    return question, response.removeprefix(" ")


def decode_responses(
    tokenizer, prompts: Sequence[list[int]], responses: Sequence[list[int]]
) -> tuple[list[str], list[str]]:
    """Token ids -> texts without special tokens. B, B rows -> B, B.

    A response is what the whole text adds to its prompt's: a SentencePiece tokenizer drops the space at the
    start of a text that is decoded alone.
    """
    both = [[*p, *r] for p, r in zip(prompts, responses, strict=True)]
    asked, said, whole = (tokenizer.batch_decode(rows, **CLEAN) for rows in (prompts, responses, both))
    each = zip(asked, said, whole, strict=True)
    return asked, [text[len(p) :] if text.startswith(p) else r for p, r, text in each]


def encode_prompts(tokenizer, questions: Sequence[str]) -> list[list[int]]:
    """Token ids of the prompt of each question."""
    return [
        without_eos(ids, tokenizer)
        for ids in encode(tokenizer, [prompt_text(q) for q in questions], "text")
    ]


def encode_documents(tokenizer, pairs: Sequence[tuple[str, str]]) -> list[list[int]]:
    """Token ids of each (question, answer), eos at the end."""
    texts = [document_text(q, a) for q, a in pairs]
    return [
        [*without_eos(ids, tokenizer), tokenizer.eos_token_id] for ids in encode(tokenizer, texts, "text")
    ]


def response_of(prompt: Sequence[int], document: Sequence[int], where: str) -> list[int]:
    """The document's tokens after its prompt.

    Raises:
        ValueError: the prompt is not the document's prefix (names `where`).
    """
    if list(document[: len(prompt)]) != list(prompt):
        raise ValueError(
            f"{where}: the prompt's tokens do not begin the document's; the tokenizer merges the seam"
        )
    return list(document[len(prompt) :])


def encode_texts(tokenizer, texts: list[str]) -> list[list[int]]:
    """Token ids of each text (:func:`tasks.lm.model.reading.encode`)."""
    return encode(tokenizer, texts, "text")


def without_eos(ids: list[int], tokenizer) -> list[int]:
    """The ids less the eos that some tokenizers append themselves; bos may equal eos and stays."""
    return ids[:-1] if len(ids) > 1 and ids[-1] == tokenizer.eos_token_id else ids

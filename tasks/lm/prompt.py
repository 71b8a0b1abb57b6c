r"""The only template, and the seam between prompt and response.

A document is ids(`Question: …\n\nAnswer: …`) + eos; a prompt is ids(`Question: …\n\nAnswer:`), without a
trailing space, and must be the document's prefix: then the tokens a policy is prompted with are those it was
trained on. (With `Answer: ` it is not, for byte-level BPE and for Llama's tokenizer.)
"""

from __future__ import annotations

from collections.abc import Sequence


def prompt_text(question: str) -> str:
    """The prompt of a question."""
    return f"Question: {question}\n\nAnswer:"


def document_text(question: str, answer: str) -> str:
    """A question with one of its answers."""
    return f"{prompt_text(question)} {answer}"


def encode_prompts(tokenizer, questions: Sequence[str]) -> list[list[int]]:
    """Token ids of the prompt of each question."""
    return [
        without_eos(ids, tokenizer) for ids in encode_texts(tokenizer, [prompt_text(q) for q in questions])
    ]


def encode_documents(tokenizer, pairs: Sequence[tuple[str, str]]) -> list[list[int]]:
    """Token ids of each (question, answer), eos at the end."""
    texts = [document_text(q, a) for q, a in pairs]
    return [[*without_eos(ids, tokenizer), tokenizer.eos_token_id] for ids in encode_texts(tokenizer, texts)]


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
    """Token ids of each text, with what the tokenizer puts around one.

    A post that writes `</s>` or `<s>` means these letters, not the token that ends a document.
    """
    if not texts:
        return []
    kept = {"return_attention_mask": False, "return_token_type_ids": False}
    return tokenizer(texts, split_special_tokens=True, **kept)["input_ids"]


def without_eos(ids: list[int], tokenizer) -> list[int]:
    """The ids less the eos that some tokenizers append themselves; bos may equal eos and stays."""
    return ids[:-1] if len(ids) > 1 and ids[-1] == tokenizer.eos_token_id else ids

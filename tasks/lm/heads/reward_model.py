"""A reward model as a policy's stages meet it: prompts and responses in the policy's tokens -> scores.

It may speak another language than the policy: an encoder, or a decoder with a tokenizer of its own. Here, and
nowhere else, is decided what it reads: the same token ids where the vocabularies are one, else the same text.
One of two experts (:mod:`tasks.lm.heads.frozen_style`) reads question and answer as texts of their own.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tasks.lm.heads.frozen_style import HEAD, FrozenStyle, Head
from tasks.lm.heads.scores import score_documents
from tasks.lm.model.context import room_of
from tasks.lm.model.ends import closed, same_words
from tasks.lm.model.kinds import is_encoder
from tasks.lm.model.loading import create_reward, fit_embeddings, load_encoder, load_reward, load_tokenizer
from tasks.lm.model.reading import encode
from tasks.lm.model.template import CLEAN, decode_responses, parted, without_eos

SCORES = "scores.json"
LEAST_STD = 1e-6  # scores are divided by no less


def scale_of(model: Any, key: str) -> tuple[float, float]:
    """Mean and standard deviation of a reward model's scores on its validation part, from its scores.json.

    Args:
        model: its folder.
        key: of messages.

    Raises:
        ValueError: it is no folder, or holds no such file.
    """
    path = Path(model) / SCORES if isinstance(model, str | Path) else None
    if path is None or not path.is_file():
        name = str(path.parent) if path else type(model).__name__
        raise ValueError(f"{key}: no scores.json beside {name!r}; it holds mean and std of the scores")
    scale = json.loads(path.read_text())
    return scale["mean"], max(scale["std"], LEAST_STD)


def write_scale(folder: Path, metrics: Mapping[str, float]) -> None:
    """The scores.json beside a model, from its `score_mean` and `score_std`."""
    scores = {"mean": metrics["score_mean"], "std": metrics["score_std"]}
    (folder / SCORES).write_text(json.dumps(scores, indent=2, sort_keys=True) + "\n")


@dataclass(frozen=True, slots=True)
class RewardModel:
    """`RewardModel.load(folder, policy_tokenizer).score(prompts, responses, rows=64)`."""

    model: Any
    tokenizer: Any  # its own
    policy_tokenizer: Any
    shares_tokens: bool  # it reads the policy's token ids as they are
    policy_ends: tuple[int, ...] = ()  # beside the policy tokenizer's eos
    texts: FrozenStyle | None = None  # what scores, where it is a model that reads texts

    @classmethod
    def load(
        cls,
        base: str | Path,
        policy_tokenizer: Any,
        device: torch.device | str = "cpu",
        revision: str = "main",
        key: str = "artifacts/reward/model",
        policy_ends: Sequence[int] = (),
        is_new: bool = False,
        **keys: Any,
    ) -> RewardModel:
        """From a folder or the Hub.

        Args:
            base: folder or Hub id; holds model and tokenizer.
            policy_tokenizer: of the policy whose tokens will be scored.
            device: the model's.
            revision: on the Hub.
            key: names `base` in messages.
            policy_ends: tokens beside that tokenizer's eos which end a response (:mod:`tasks.lm.model.ends`).
            is_new: whether only shape and tokenizer are taken from `base`, and the weights are new.
            keys: for transformers' `from_pretrained`.

        Raises:
            ValueError: model or tokenizer cannot be loaded, or a decoder's tokenizer has no eos.

        A folder with a head.json is read as :class:`tasks.lm.heads.frozen_style.FrozenStyle`.
        """
        tokenizer = load_tokenizer(base, revision, key, needs_eos=False)
        if (Path(base) / HEAD).is_file() and not is_new:
            texts = load_frozen_style(base, tokenizer, device, key)
            return cls(texts.encoder, tokenizer, policy_tokenizer, False, tuple(policy_ends), texts)
        model = create_reward(base, key) if is_new else load_reward(base, revision, key, **keys)
        if tokenizer.eos_token_id is None and not is_encoder(model):
            raise ValueError(f"{key}: the tokenizer of {base} has no eos token")
        fit_embeddings(model, tokenizer)
        shares_tokens = same_words(tokenizer, policy_tokenizer) and not is_encoder(model)
        return cls(model.to(device), tokenizer, policy_tokenizer, shares_tokens, tuple(policy_ends))

    def documents(
        self, prompts: Sequence[Sequence[int]], responses: Sequence[Sequence[int]]
    ) -> list[list[int]]:
        """Prompt and response in the tokens that the model reads. B, B lists of the policy's -> B lists.

        A text is decoded whole and tokenised whole. It ends with eos where the response ended, by whichever
        token, for with eos the documents ended that taught the model; an encoder closes every document
        itself. What its positions do not hold is cut, but not that closing token.
        """
        if self.policy_ends:
            responses = closed(responses, self.policy_ends, self.policy_tokenizer.eos_token_id)
        whole, most = [[*p, *r] for p, r in zip(prompts, responses, strict=True)], room_of(self.model)
        if self.shares_tokens:
            return [ids[:most] for ids in whole]
        found = encode(self.tokenizer, self.policy_tokenizer.batch_decode(whole, **CLEAN), "text")
        if is_encoder(self.model):
            return [ids if most is None or len(ids) <= most else [*ids[: most - 1], ids[-1]] for ids in found]
        eos = self.policy_tokenizer.eos_token_id
        ends = [[self.tokenizer.eos_token_id] if ids[-1] == eos else [] for ids in whole]
        whole = ([*without_eos(ids, self.tokenizer), *end] for ids, end in zip(found, ends, strict=True))
        return [ids[:most] for ids in whole]

    def score(
        self,
        prompts: Sequence[Sequence[int]],
        responses: Sequence[Sequence[int]],
        rows: int,
        reads_prompts_once: bool = False,
    ) -> Tensor:
        """Scores of responses, at most `rows` in one forward. B, B lists -> [B] on the CPU.

        `reads_prompts_once`: neighbours of one prompt share it, where the model reads the policy's tokens.
        """
        if self.texts is not None:
            return self.score_texts(*self.parts(prompts, responses), rows)
        sizes = [len(p) for p in prompts] if reads_prompts_once and self.shares_tokens else None
        return score_documents(self.model, self.documents(prompts, responses), rows, sizes)

    def score_texts(self, questions: Sequence[str], answers: Sequence[str], rows: int) -> Tensor:
        """As `score`, of texts, where `texts` is there to read them. B, B texts -> [B] on the CPU."""
        return self.texts.scores(questions, answers, rows).float()

    def parts(
        self, prompts: Sequence[Sequence[int]], responses: Sequence[Sequence[int]]
    ) -> tuple[list[str], list[str]]:
        """Questions and answers of the policy's tokens, without the template. B, B lists -> B, B texts."""
        texts = decode_responses(self.policy_tokenizer, list(map(list, prompts)), list(map(list, responses)))
        pairs = [parted(prompt, response) for prompt, response in zip(*texts, strict=True)]
        return [question for question, _ in pairs], [answer for _, answer in pairs]


def load_frozen_style(
    base: str | Path, tokenizer: Any, device: torch.device | str = "cpu", key: str = "artifacts/reward/model"
) -> FrozenStyle:
    """From the folder that the reward stage writes; arguments as for :meth:`RewardModel.load`.

    Raises:
        ValueError: the encoder cannot be loaded, or the head is none for it.
    """
    encoder = load_encoder(base, key=key).to(device)
    try:
        return frozen_style(encoder, tokenizer, Head.read(Path(base)))
    except ValueError as error:
        raise ValueError(f"{key}: {base}: {error}") from None


def frozen_style(encoder: Any, tokenizer: Any, head: Head) -> FrozenStyle:
    """The parts together, reading texts as all else does here (:mod:`tasks.lm.model.reading`)."""
    return FrozenStyle(encoder, tokenizer, head, lambda texts: encode(tokenizer, texts, "text"))

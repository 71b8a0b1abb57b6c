"""The generation arguments of transformers that a rollout understands.

Exact, so that `step` takes the log-probabilities at which was sampled: lengths, several eos tokens, stop
strings, several responses to a prompt. Restrictions and penalties (`top_k`, `top_p`, `min_new_tokens`,
`repetition_penalty`, `no_repeat_ngram_size`, `bad_words_ids`, processors) sample from another distribution
than the policy's own, whose log-probabilities `step` takes all the same, as TRL does; the log says so. All
else is refused by name.
"""

from __future__ import annotations

import inspect
import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from transformers import GenerationConfig, GenerationMixin, LogitsProcessorList
from transformers.generation import (
    NoBadWordsLogitsProcessor,
    NoRepeatNGramLogitsProcessor,
    RepetitionPenaltyLogitsProcessor,
)

from tasks.ppo.config import PPOConfig

UNTOUCHED = {  # arguments that no value of which changes a response here
    "pad_token_id", "bos_token_id", "synced_gpus", "tokenizer", "cache_implementation", "disable_compile",
    "use_model_defaults",
}  # fmt: skip
DEFAULTS = {  # transformers'; None is one of every argument
    "num_beams": 1, "num_beam_groups": 1, "use_cache": True, "typical_p": 1.0, "epsilon_cutoff": 0.0,
    "eta_cutoff": 0.0, "output_scores": False, "output_logits": False, "output_attentions": False,
    "output_hidden_states": False, "diversity_penalty": 0.0, "encoder_repetition_penalty": 1.0,
    "length_penalty": 1.0, "encoder_no_repeat_ngram_size": 0, "early_stopping": False,
    "renormalize_logits": False, "remove_invalid_values": False, "return_dict_in_generate": False,
    "token_healing": False, "low_memory": False, "is_assistant": False, "num_assistant_tokens": 20,
    "num_assistant_tokens_schedule": "constant", "assistant_confidence_threshold": 0.4,
    "assistant_lookbehind": 10, "target_lookbehind": 10, "stopping_criteria": [], "remove_padding":
    True, "pad_to_multiple_of": None,
}  # fmt: skip
REASONS = {
    "num_beams": "beam search draws from no distribution that PPO could learn from",
    "penalty_alpha": "contrastive search draws from no distribution that PPO could learn from",
    "assistant_model": "the policy samples alone",
    "streamer": "responses come as a whole",
    "return_dict_in_generate": "responses come as token ids",
    "attention_mask": "prompts come as rows of their own length, and none is padded",
    "input_ids": "prompts are the first argument",
    "stopping_criteria": "eos_token_id, stop_strings and max_new_tokens end a response",
}  # fmt: skip
_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Asked:
    """How to sample B responses."""

    max_tokens: Sequence[int]  # [B]
    eos_id: int | tuple[int, ...] | None  # of several each ends a response; None: no token does
    do_sample: bool
    top_k: int  # 0: all
    top_p: float
    min_tokens: int  # eos has no chance before
    each: int = 1  # responses to each prompt, side by side
    processors: Callable | None = None  # transformers' list of them
    stop_strings: tuple[str, ...] = ()


def asked_of(
    given: dict[str, Any],
    config: PPOConfig,
    eos_id: int | Sequence[int],
    vocabulary: int,
    rows: int,
    draw_length: Callable[[], int] | Sequence[int] | None = None,
) -> Asked:
    """Generation arguments as transformers names them, for so many prompts.

    Args:
        given: the arguments; those of a `generation_config` count where they are not given beside it.
        config: its temperature is the only one: `step` computes log-probabilities at it.
        eos_id: of the model and its tokenizer, one or several; `eos_token_id` overrides it.
        vocabulary: tokens; an eos outside it never comes.
        rows: prompts.
        draw_length: gives the most new tokens of each response in turn, or these themselves; None:
            `max_new_tokens`, else `response_tokens`.

    Raises:
        ValueError: an argument that is unknown, or asks for something other than sampling from the policy.
    """
    left = {**_of_object(given.get("generation_config")), **given}
    left.pop("generation_config", None)
    most = left.pop("max_new_tokens", None)
    for name in ("max_length", "min_length"):
        if (left.pop(name, None) or 0) > 0:
            new = name.replace("length", "new_tokens")
            raise ValueError(f"generate: give {new}; {name} counts the prompt, which differs by row")
    most = config.response_tokens if most is None else most
    temperature = left.pop("temperature", None)
    if temperature not in (None, config.temperature):
        raise ValueError(
            f"generate: temperature is {temperature}, but step takes its log-probabilities at "
            f"ppo.temperature, {config.temperature}; set it there"
        )
    eos_ids, each = _eos_of(left.pop("eos_token_id", eos_id), vocabulary), _count(left)
    if callable(draw_length):
        draw_length = [int(draw_length()) for _ in range(rows * each)]
    asked = Asked(
        max_tokens=[most] * (rows * each) if draw_length is None else list(draw_length),
        eos_id=(eos_ids[0] if eos_ids else None) if len(eos_ids) < 2 else eos_ids,
        do_sample=_or(left.pop("do_sample", None), True),
        top_k=int(left.pop("top_k", 0) or 0),
        top_p=float(left.pop("top_p", 1.0) or 1.0),
        min_tokens=max(int(left.pop("min_new_tokens", 0) or 0), 0),
        each=each,
        processors=_processors(left, eos_ids),
        stop_strings=_texts(left.pop("stop_strings", None)),
    )
    _refuse(left)
    if min(asked.max_tokens, default=1) < 1:
        raise ValueError(f"generate: a response needs at least one new token, not {min(asked.max_tokens)}")
    if asked.do_sample and (asked.top_k or asked.top_p < 1 or asked.min_tokens or asked.processors):
        _log.warning(
            "generate: top_k, top_p, min_new_tokens, penalties and processors sample from another "
            "distribution than the one that step takes log-probabilities from; KL may become negative"
        )
    return asked


def _of_object(found: Any) -> dict[str, Any]:
    """What a GenerationConfig says."""
    if found is None:
        return {}
    if not isinstance(found, GenerationConfig):
        name = type(found).__name__
        raise ValueError(f"generate: generation_config must be a GenerationConfig, not {name}")
    private = {name for name in vars(found) if name.startswith("_")} | {"transformers_version"}
    return {name: value for name, value in vars(found).items() if name not in private and value is not None}


def _eos_of(given: Any, vocabulary: int) -> tuple[int, ...]:
    """The tokens that end a response; those outside the vocabulary never come."""
    each = given.tolist() if hasattr(given, "tolist") else given
    each = list(each) if isinstance(each, list | tuple) else [] if each is None else [each]
    if not all(type(one) is int for one in each) or (isinstance(given, list | tuple) and not each):
        raise ValueError(f"generate: eos_token_id must be a token or several, not {given!r}")
    return tuple(dict.fromkeys(one for one in each if 0 <= one < vocabulary))


def _count(left: dict[str, Any]) -> int:
    each = _or(left.pop("num_return_sequences", None), 1)
    if type(each) is not int or each < 1:
        raise ValueError(f"generate: num_return_sequences must be a whole number from 1, not {each!r}")
    return each


def _texts(given: str | Sequence[str] | None) -> tuple[str, ...]:
    texts = (given,) if isinstance(given, str) else tuple(given or ())
    if not all(isinstance(text, str) and text for text in texts):
        raise ValueError(f"generate: stop_strings must be texts, not {given!r:.60}")
    return texts


def _processors(left: dict[str, Any], eos_ids: tuple[int, ...]) -> LogitsProcessorList | None:
    """Transformers' own processors, in its order, then the caller's."""
    penalty, size = left.pop("repetition_penalty", None), left.pop("no_repeat_ngram_size", None)
    words, own = left.pop("bad_words_ids", None), left.pop("logits_processor", None)
    made = LogitsProcessorList()
    try:
        if penalty not in (None, 1.0):
            made.append(RepetitionPenaltyLogitsProcessor(penalty))
        if size not in (None, 0):
            made.append(NoRepeatNGramLogitsProcessor(size))
        if words is not None:
            made.append(NoBadWordsLogitsProcessor(words, list(eos_ids) or None))
    except (TypeError, ValueError) as error:
        raise ValueError(f"generate: {' '.join(str(error).split())}") from None
    made.extend(own or [])
    return made or None


def _refuse(left: Mapping[str, Any]) -> None:
    """Raises ValueError for the first argument that would change something, or that nobody knows."""
    known = {*DEFAULTS, *UNTOUCHED, *vars(GenerationConfig())}
    known |= set(inspect.signature(GenerationMixin.generate).parameters)
    for name, value in left.items():
        if name in UNTOUCHED or (name in known and (value is None or value == DEFAULTS.get(name, ...))):
            continue
        reason = f": {REASONS[name]}" if name in REASONS else ""
        raise ValueError(f"generate: {name}={value!r:.60} is not known to this sampler{reason}")


def _or(value: Any, default: Any) -> Any:
    return default if value is None else value

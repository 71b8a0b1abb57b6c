"""TRL's names that a trainer's configuration takes, where they mean what something of its own means."""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, TypeVar

Config = TypeVar("Config", bound=type)
_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Only:
    """A name of which only what is done anyway is taken: `Only((None, False), "there is no padding")`."""

    accepted: tuple[Any, ...]
    instead: str  # why, or what serves

    def __call__(self, name: str, value: Any, keys: Mapping[str, Any]) -> dict[str, Any]:
        """Nothing, or a refusal."""
        if any(value is one or (type(value) is type(one) and value == one) for one in self.accepted):
            return {}
        raise TypeError(f"{name}={value!r}: {self.instead}")


@dataclass(frozen=True, slots=True)
class Unused:
    """A name that changes no result; that it does nothing is said."""

    reason: str

    def __call__(self, name: str, value: Any, keys: Mapping[str, Any]) -> dict[str, Any]:
        """Nothing."""
        if value is not None:
            _log.warning("%s has no effect: %s", name, self.reason)
        return {}


@dataclass(frozen=True, slots=True)
class Is:
    """Another name of a setting: `Is("assistant_only")`."""

    own: str
    values: Mapping[Any, Any] | None = None  # TRL's -> ours; None: the same

    def __call__(self, name: str, value: Any, keys: Mapping[str, Any]) -> dict[str, Any]:
        """The setting."""
        if self.own in keys:
            raise TypeError(f"{name} is {self.own} here, and both are given")
        if value is None:
            return {}
        return {self.own: value if self.values is None else self.values[value]}


Rule = Callable[[str, Any, Mapping[str, Any]], dict[str, Any]]
NO_PADDING = "there is no padding here; leave it out"
MODEL = {
    "model_init_kwargs": Only((None, {}), "load the model with them and give it as model"),
    "trust_remote_code": Only((False, None), "code that comes with a model is never run"),
    "chat_template_path": Only((None,), "set chat_template of the tokenizer and give it as processing_class"),
    "eos_token": Only((None,), "set eos_token of the tokenizer and give it as processing_class"),
    "pad_token": Only((None,), "set pad_token of the tokenizer and give it as processing_class"),
    "dataset_num_proc": Unused("rows are read in one process"),
    "pad_to_multiple_of": Only((None, "auto"), NO_PADDING),
    "activation_offloading": Only((False, None), "set gradient_checkpointing or microbatch_tokens"),
    "max_seq_length": Is("max_length"),
    "warmup_ratio": Only((None, 0, 0.0), "warmup_steps takes a share below 1"),
    "tokenizer": Only((None,), "give it to the trainer, as processing_class"),
    "use_liger": Only((False, None), "packed rows have kernels of their own"),
}


def takes(names: Mapping[str, Rule]) -> Callable[[Config], Config]:
    """A decorator of a configuration: keywords that are not its own are translated, or refused by name."""

    def wrap(config: Config) -> Config:
        made = config.__init__

        @functools.wraps(made)
        def make(self: Any, *given: Any, **keys: Any) -> None:
            made(self, *given, **translated(config.__name__, names, keys))

        config.__init__ = make
        config.other_names = names
        return config

    return wrap


def translated(config: str, names: Mapping[str, Rule], keys: Mapping[str, Any]) -> dict[str, Any]:
    """Keywords with TRL's names -> the configuration's own.

    Raises:
        TypeError: one that has no meaning here; the message says what serves.
    """
    found = {name: value for name, value in keys.items() if name not in names}
    for name in keys.keys() & names.keys():
        try:
            new = names[name](name, keys[name], keys)
        except TypeError as error:
            raise TypeError(f"{config}: {error}") from None
        if twice := new.keys() & found.keys():
            raise TypeError(f"{config}: {name} sets {min(twice)}, which is given too")
        found |= new
    return found

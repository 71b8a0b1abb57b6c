"""A policy and its value head from a folder or the Hub: our own layout, PEFT's, TRL's; safetensors alone."""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from torch import Tensor

from tasks.lm.adapters.active import REFERENCE, at_work_on, weights_of
from tasks.lm.adapters.files import CONFIG, WEIGHTS, SavedAdapter, put_on, read_adapter
from tasks.lm.adapters.lora import add_adapter, has_adapter, stack_adapter
from tasks.lm.heads.reward_adapter import save_reward_adapter
from tasks.lm.model.hub import VALUE_HEAD, find_file
from tasks.lm.model.loading import check_keys, load_causal
from tasks.lm.model.quantized import read_quantized
from tasks.run.finite import check_tensors

ADAPTERS = "adapters.json"  # of a policy with several: which are at work, which is whose
PICKLE = "pytorch_model.bin"  # where TRL ≤ 0.11 puts the head of a model under an adapter
_log = logging.getLogger(__name__)


def load_policy(
    base: str | Path,
    is_trainable: bool = True,
    *,
    peft_config=None,
    load: Callable = load_causal,
    revision: str = "main",
    token=None,
    **keys: Any,
):
    """The language model of a folder or of the Hub; under its adapters, where these are what is there.

    Args:
        base: holds a language model, or an adapter whose configuration names its model.
        is_trainable: whether the adapter is to be trained further.
        peft_config: of a fresh adapter; one that `base` holds is frozen below it.
        load: of :mod:`tasks.lm.model.loading`, for models of the wanted kind.
        revision: on the Hub, of `base`.
        token: for the Hub.
        keys: for transformers' `from_pretrained`.

    Raises:
        ValueError: no configuration or no safetensors weights there, an adapter without its model's name or
            of another model, code from there is to be run, or a quantised base where none can run.
    """
    check_keys(keys, "base")
    keys, there = read_quantized(keys), {"revision": revision, "token": token}
    several = _several(base, **there)
    if several is not None or find_file(base, CONFIG, **there):
        model = partial(load, token=token, **keys)
        return _under_adapters(base, several, is_trainable, peft_config, model, there)
    model = load(base, revision, "base", token=token, **keys)
    return model if peft_config is None else add_adapter(model, config=peft_config)


def _under_adapters(
    base, several: dict[str, Any] | None, is_trainable: bool, peft_config, load: Callable, there
):
    several = several or {"adapters": {"default": True}, "at_work": ["default"]}
    if peft_config is not None and list(several["adapters"]) != ["default"]:
        raise ValueError(f"peft_config: the policy in {base} has several adapters; merge it first")
    parts = {name: "" if name == "default" else name for name in several["adapters"]}
    saved = {name: _adapter_in(base, part, **there) for name, part in parts.items()}
    config = next(iter(saved.values())).config
    asked = config.base_model_name_or_path, config.revision or "main", "base"
    model = load(*asked)
    if peft_config is not None:
        model = put_on(model, saved["default"], REFERENCE)
        stack_adapter(model, peft_config)
        return model
    for name, learns in several["adapters"].items():
        model = put_on(model, saved[name], name, trains=learns and is_trainable)
    flags = [(p, p.requires_grad) for p in model.parameters()]
    model.base_model.set_adapter(several["at_work"])
    for parameter, flag in flags:
        parameter.requires_grad_(flag)
    return model


def save_policy(model, folder: str | Path, **keys: Any) -> None:
    """The language model of one with a value head: a plain transformers folder, or its adapters'.

    One adapter stands in `folder` itself, where peft finds it. Of several each has a folder of its own, and
    `adapters.json` says what they are: peft would take one of them for the whole.
    """
    if not keys.pop("safe_serialization", True):
        raise ValueError("safe_serialization=False: safetensors alone are written, no pickle")
    causal = model.pretrained_model
    others = [name for name in getattr(causal, "peft_config", {}) if name != model.rm_adapter_name]
    if has_adapter(causal):
        keys = {"selected_adapters": others, **keys}
    causal.save_pretrained(folder, **keys)
    if model.supports_rm_adapter:
        save_reward_adapter(model, Path(folder) / model.rm_adapter_name)
    if len(others) > 1 or model.supports_rm_adapter:
        learns = {n: any(p.requires_grad for p in weights_of(causal, n).values()) for n in others}
        facts = {"adapters": learns, "at_work": at_work_on(causal), "reward": model.rm_adapter_name}
        text = json.dumps(facts, indent=2) + "\n"
        (Path(folder) / ADAPTERS).write_text(text, encoding="utf-8")


def saved_reward_adapter(
    base: str | Path, revision: str = "main", token: str | bool | None = None
) -> tuple[SavedAdapter, str] | None:
    """The reward adapter that was saved with a policy, and its name; None: none was."""
    name = (_several(base, revision, token) or {}).get("reward")
    return None if name is None else (read_adapter(base, "base", name, revision, token), name)


def _adapter_in(base: str | Path, part: str, revision: str, token) -> SavedAdapter:
    weights = f"{part}/{WEIGHTS}".lstrip("/")
    if find_file(base, weights, revision, token) is None:
        raise ValueError(f"base: the adapter in {base} has no {weights}")
    saved = read_adapter(base, "base", part, revision, token)
    if not saved.config.base_model_name_or_path:
        raise ValueError(f"base: the adapter in {base} names no base model")
    return saved


def _several(base: str | Path, revision: str = "main", token=None) -> dict[str, Any] | None:
    """What `adapters.json` says; None: there is none."""
    path = find_file(base, ADAPTERS, revision, token)
    if path is None:
        return None
    try:
        facts = json.loads(path.read_text(encoding="utf-8"))
        names = {*facts["adapters"], *([facts["reward"]] if facts["reward"] else [])}
        is_right = set(facts["at_work"]) <= set(facts["adapters"]) and bool(facts["at_work"])
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"base: {path} cannot be read: {error!r}") from error
    if not is_right or not all(re.fullmatch(r"\w[\w-]*", name) for name in names):  # they name folders
        raise ValueError(f"base: {path} does not describe adapters")
    return facts


def read_value_head(
    base: str | Path, revision: str = "main", token: str | bool | None = None
) -> dict[str, Tensor]:
    """The tensors of a saved value head by their names in it; none where no head is saved.

    They stand in a file of their own, or as TRL ≤ 0.11 left them: as `v_head.*` among the model's, in its one
    checkpoint or in some of its shards. Nothing else is read of these, and no pickle at all.

    Raises:
        ValueError: a file cannot be read, or holds a number that is not finite.
    """
    if path := find_file(base, VALUE_HEAD, revision, token):
        return _tensors(path, "")
    if path := find_file(base, "model.safetensors", revision, token):
        return _tensors(path, "v_head.")
    index, found = find_file(base, "model.safetensors.index.json", revision, token), {}
    places = json.loads(index.read_text(encoding="utf-8"))["weight_map"] if index else {}
    for shard in {shard for name, shard in places.items() if name.startswith("v_head.")}:
        if path := find_file(base, shard, revision, token):
            found |= _tensors(path, "v_head.")
    return found


def warn_of_pickle(base: str | Path, revision: str = "main", token: str | bool | None = None) -> None:
    """Say that no value head was read where TRL may have pickled one."""
    if find_file(base, CONFIG, revision, token) or (Path(base) / PICKLE).is_file():
        _log.warning("%s: a fresh value head; one that was pickled into %s is never read", base, PICKLE)


def _tensors(path: Path, prefix: str) -> dict[str, Tensor]:
    try:
        with safe_open(path, "pt") as file:
            names = [name for name in file.keys() if name.startswith(prefix)]
            found = {name.removeprefix(prefix): file.get_tensor(name) for name in names}
    except SafetensorError as error:
        raise ValueError(f"{path} cannot be read: {error}") from error
    check_tensors(str(path), found)
    return found

"""A policy and its value head from a folder or the Hub: our own layout, PEFT's, TRL's; safetensors alone."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from torch import Tensor

from tasks.lm.adapters import has_adapter
from tasks.lm.loading import load_causal

VALUE_HEAD = "value_head.safetensors"
PICKLE = "pytorch_model.bin"  # where TRL ≤ 0.11 puts the head of a model under an adapter
_log = logging.getLogger(__name__)


def find_file(
    base: str | Path, name: str, revision: str = "main", token: str | bool | None = None
) -> Path | None:
    """A file of a folder, or of a repository on the Hub through its cache; None where there is none."""
    if Path(base).is_dir():
        path = Path(base) / name
        return path if path.is_file() else None
    from huggingface_hub import errors, hf_hub_download

    try:
        return Path(hf_hub_download(str(base), name, revision=revision, token=token))
    except (errors.EntryNotFoundError, errors.HfHubHTTPError, errors.HFValidationError) as error:
        if name == VALUE_HEAD and isinstance(error, errors.LocalEntryNotFoundError):
            _log.warning("%s of %s is not in the cache, and the Hub cannot be asked for it", name, base)
    return None  # of what else is amiss, loading the model tells


def load_policy(
    base: str | Path,
    is_trainable: bool = True,
    *,
    load: Callable = load_causal,
    revision: str = "main",
    token=None,
    **keys: Any,
):
    """The language model of a folder or of the Hub; under its adapter, where one is what is there.

    Args:
        base: holds a language model, or an adapter whose configuration names its model.
        is_trainable: whether the adapter is to be trained further.
        load: of :mod:`tasks.lm.loading`, for models of the wanted kind.
        revision: on the Hub, of `base`.
        token: for the Hub.
        keys: for transformers' `from_pretrained`.

    Raises:
        ValueError: no configuration or no safetensors weights there, an adapter without its model's name, or
            code from there is to be run.
    """
    if keys.pop("trust_remote_code", False):
        raise ValueError("trust_remote_code: code that comes with a model is never run")
    if find_file(base, "adapter_config.json", revision, token) is None:
        return load(base, revision, "base", token=token, **keys)
    from peft import PeftConfig, PeftModel

    weights = find_file(base, "adapter_model.safetensors", revision, token)
    if weights is None:
        raise ValueError(f"base: the adapter in {base} has no adapter_model.safetensors")
    config = PeftConfig.from_pretrained(str(weights.parent))
    if not config.base_model_name_or_path:
        raise ValueError(f"base: the adapter in {base} names no base model")
    asked = config.base_model_name_or_path, config.revision or "main", "base"
    model = load(*asked, token=token, **keys)
    return PeftModel.from_pretrained(model, str(weights.parent), is_trainable=is_trainable)


def read_value_head(
    base: str | Path, revision: str = "main", token: str | bool | None = None
) -> dict[str, Tensor]:
    """The tensors of a saved value head by their names in it; none where no head is saved.

    They stand in a file of their own, or as TRL ≤ 0.11 left them: as `v_head.*` among the model's, in its one
    checkpoint or in some of its shards. Nothing else is read of these, and no pickle at all.

    Raises:
        ValueError: a file cannot be read.
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


def warn_of_pickle(base: str | Path, model) -> None:
    """Say that no value head was read where TRL may have pickled one."""
    if has_adapter(model) or (Path(base) / PICKLE).is_file():
        _log.warning("%s: a fresh value head; one that was pickled into %s is never read", base, PICKLE)


def _tensors(path: Path, prefix: str) -> dict[str, Tensor]:
    try:
        with safe_open(path, "pt") as file:
            names = [name for name in file.keys() if name.startswith(prefix)]
            return {name.removeprefix(prefix): file.get_tensor(name) for name in names}
    except SafetensorError as error:
        raise ValueError(f"{path} cannot be read: {error}") from error

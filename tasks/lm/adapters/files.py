"""Adapters as files: read, checked against the base they are to sit on, put on it, written.

An adapter of another base would load in silence where the sizes happen to agree; it is refused by name, by
target modules and by shapes, before the model is touched.
"""

from __future__ import annotations

import filecmp
import json
import re
from collections.abc import Mapping
from copy import deepcopy
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from tasks.lm.adapters.active import add_named, take_off, weights_of
from tasks.lm.adapters.kinds import check_kind, rewrites
from tasks.lm.adapters.plain_lora import plain_lora
from tasks.lm.model.hub import find_file
from tasks.lm.model.kinds import unwrapped
from tasks.run.finite import check_tensors

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"  # peft's names
HEADS = ("score", "classifier")
_HEAD = re.compile(r"(?:^|\.)(?:score|classifier)\.(?:modules_to_save\.)?(?:[^.]+\.)?(weight|bias)$")
_TARGET = re.compile(r"^base_model\.model\.(.+)\.(lora(?:_embedding)?_[AB])(?:\.weight)?$")
WIDTHS = ("in_features", "nx", "num_embeddings"), ("out_features", "nf", "embedding_dim")  # of a layer


@dataclass(frozen=True, slots=True)
class SavedAdapter:
    """An adapter as it was saved."""

    name: str  # where it came from, for messages
    folder: Path
    config: Any  # peft's
    tensors: Mapping[str, Tensor]  # as peft names them in its file, without the head
    head: Mapping[str, Tensor]  # `weight` [labels, H], perhaps `bias`; empty: no score head


def read_adapter(
    base: str | Path, key: str, part: str = "", revision: str = "main", token: str | bool | None = None
) -> SavedAdapter:
    """From a folder or the Hub; safetensors alone.

    Args:
        base: folder or Hub id.
        key: names it in messages.
        part: a folder in it.
        revision: on the Hub.
        token: for the Hub.

    Raises:
        ValueError: no adapter there, files that cannot be read, one that is not served, or a number in it
            that is not finite.
    """
    from peft import PeftConfig

    inside = f"{part}/" if part else ""
    paths = [find_file(base, f"{inside}{name}", revision, token) for name in (CONFIG, WEIGHTS)]
    for name, path in zip((CONFIG, WEIGHTS), paths, strict=True):
        if path is None:
            raise ValueError(f"{key}: there is no {inside}{name} in {base}; a LoRA adapter has one")
    try:
        config, tensors = PeftConfig.from_pretrained(str(paths[0].parent)), load_file(paths[1])
    except (SafetensorError, TypeError, ValueError) as error:
        raise ValueError(f"{key}: the adapter in {base} cannot be read: {error}") from error
    check_kind(config, learns=False, key=f"{key}: {base}")
    check_tensors(f"{key}: {paths[1]}", tensors)
    head = {found[1]: value for name, value in tensors.items() if (found := _HEAD.search(name))}
    rest = {name: value for name, value in tensors.items() if not _HEAD.search(name)}
    return SavedAdapter(f"{key}: the adapter in {base}", paths[0].parent, config, rest, head)


def check_base(model: nn.Module, saved: SavedAdapter) -> None:
    """Refuse an adapter of another base than the one under `model`.

    Raises:
        ValueError: the base has another name (and is not the same folder or the same files), lacks a module
            that the adapter sits on, or one has another size.
    """
    bare = unwrapped(model)
    own, other = str(getattr(bare, "name_or_path", "") or ""), str(saved.config.base_model_name_or_path or "")
    if own and other and not _is_same_base(own, other, saved.folder):
        raise ValueError(
            f"{saved.name} is of the base {other}, the model is {own}; load {other}, or, where that is the "
            f"same model, write its name as base_model_name_or_path into {CONFIG}"
        )
    modules = {name.replace(".base_layer", ""): m for name, m in bare.named_modules()}
    for name, value in saved.tensors.items():
        if found := _TARGET.match(name):
            _check_size(saved, found[1], found[2], value, modules.get(found[1]))


def put_on(model, saved: SavedAdapter, name: str, trains: bool = False):
    """A saved adapter on a model, or beside those that a peft model has; it is at work only on a bare one.

    The base stays what it is: one whose initialisation had moved it comes as a plain adapter
    (:mod:`tasks.lm.adapters.plain_lora`).

    Returns:
        The peft model.

    Raises:
        ValueError: as :func:`check_base`, a name that a module or another adapter has, or a base that an
            adapter which is there has moved.
    """
    from peft import get_peft_model, set_peft_model_state_dict

    check_base(model, saved)
    _check_unmoved(model, saved)
    if rewrites(saved.config):
        config, tensors = plain_lora(model, saved.config, saved.tensors)
        saved = replace(saved, config=config, tensors=tensors)
    config, bare = deepcopy(saved.config), unwrapped(model)
    has_head = any(isinstance(getattr(bare, head, None), nn.Module) for head in HEADS)
    speaks = "SEQ_2_SEQ_LM" if bare.config.is_encoder_decoder else "CAUSAL_LM"
    config.task_type = "SEQ_CLS" if has_head else speaks
    if name in {part for place, _ in model.named_modules() for part in place.split(".")}:
        raise ValueError(f"{saved.name} cannot be called {name}: the model has a part of that name")
    if hasattr(model, "peft_config"):
        add_named(model, name, config)
    else:
        with torch.random.fork_rng(devices=[]):
            model = get_peft_model(model, config, adapter_name=name)
    heads = {f"base_model.model.{_head_of(bare)}.{k}": v for k, v in saved.head.items()} if has_head else {}
    parameters = weights_of(model, name)
    try:
        loaded = set_peft_model_state_dict(model, {**saved.tensors, **heads}, adapter_name=name)
        missing = parameters.keys() & set(loaded.missing_keys)
        found = {id(p) for n, p in parameters.items() if n not in missing}  # layers may share one parameter
        strange = [*loaded.unexpected_keys, *sorted(n for n in missing if id(parameters[n]) not in found)]
    except RuntimeError as error:  # a rank that is not the configuration's
        strange = [" ".join(str(error).split())]
    if strange:
        take_off(model, name)
        raise ValueError(f"{saved.name} does not fit its own configuration: {strange[0]}")
    for parameter in parameters.values():
        parameter.requires_grad_(trains)
    return model


def _check_unmoved(model: nn.Module, saved: SavedAdapter) -> None:
    for name, config in getattr(model, "peft_config", {}).items():
        if init := rewrites(config):
            raise ValueError(
                f"{saved.name} is of the base as it was, and the adapter {name} (init_lora_weights={init!r}) "
                "has moved a part of it into itself; save that one and load it from its folder, or merge it"
            )


def write_adapter(
    folder: Path, config: Any, tensors: Mapping[str, Tensor], head: Mapping[str, Tensor], base: str | None
) -> None:
    """A folder that peft loads, with its score head where there is one; equal adapters give equal bytes.

    Args:
        folder: made where it is missing.
        config: peft's, unchanged.
        tensors: as peft names them in its file.
        head: of a sequence classification; empty: a causal model's adapter.
        base: the base's name in the configuration; None: as it is.

    Raises:
        ValueError: a number that is not finite.
    """
    heads = {f"base_model.model.score.{name}": value for name, value in head.items()}
    tensors = {**tensors, **heads}
    check_tensors("the adapter is not saved", tensors)
    config = deepcopy(config)
    if head:
        config.task_type, config.modules_to_save = "SEQ_CLS", list(HEADS)
    config.inference_mode = True
    if base is not None:
        config.base_model_name_or_path = base
    folder.mkdir(parents=True, exist_ok=True)
    config.save_pretrained(str(folder))
    path = folder / CONFIG
    facts = json.loads(path.read_text(encoding="utf-8"))
    facts["target_modules"] = _sorted(facts["target_modules"])  # a set has another order in every process
    path.write_text(json.dumps(facts, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    save_file({n: v.detach().contiguous().cpu() for n, v in tensors.items()}, folder / WEIGHTS)


def tensors_of(model, name: str) -> dict[str, Tensor]:
    """The tensors of an adapter of a peft model as peft names them in its file, without a head."""
    from peft import get_peft_model_state_dict

    found = get_peft_model_state_dict(model, adapter_name=name, save_embedding_layers=False)
    return {n: v for n, v in found.items() if not _HEAD.search(n)}


def _head_of(bare: nn.Module) -> str:
    return next(head for head in HEADS if isinstance(getattr(bare, head, None), nn.Module))


def _sorted(targets: Any) -> Any:
    return sorted(targets) if isinstance(targets, list) else targets


def _is_same_base(own: str, other: str, folder: Path) -> bool:
    """By name, by place (a relative name may start anywhere above the adapter), or by its files."""
    if own == other:
        return True
    here = Path(own)
    if not here.is_dir():
        return False
    places = [(above / other).resolve() for above in (Path.cwd(), *folder.resolve().parents)]
    if here.resolve() in places:
        return True
    files = sorted(path.name for path in here.glob("*.safetensors"))
    same = lambda there: filecmp.cmpfiles(here, there, files, shallow=False)[0] == files  # noqa: E731
    return bool(files) and any(same(there) for there in places[:1] if there.is_dir())


def _check_size(saved: SavedAdapter, place: str, kind: str, value: Tensor, module: nn.Module | None) -> None:
    axis, side = (1, 0) if kind.endswith("A") else (0, 1)  # lora_A [r, in], lora_B [out, r]
    wanted = next((getattr(module, name) for name in WIDTHS[side] if hasattr(module, name)), None)
    if wanted is None:
        raise ValueError(f"{saved.name} is of another base: the model has no layer {place}")
    if wanted != value.shape[axis]:
        raise ValueError(
            f"{saved.name} is of another base: its {kind} of {place} is for {value.shape[axis]} numbers, "
            f"the model has {wanted}"
        )

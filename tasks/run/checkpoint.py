"""Checkpoints that survive a kill at any moment: staged beside, hashed, renamed; the newest valid one wins.

A checkpoint is a folder: ``tensors.safetensors``, ``state.json`` (all else, and the tensors' places) and
``manifest.json`` with the sha256 of each file. Nothing is pickled.
"""

from __future__ import annotations

import hashlib
import json
import logging
import math
import os
import random
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from tasks.run.files import remove, staged

FORMAT = 1
TENSORS, STATE, MANIFEST = "tensors.safetensors", "state.json", "manifest.json"
_NAME = re.compile(r"checkpoint-(\d+)(?:\.(\d+))?")  # .n: the same step saved again, never over the first
_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """A state as it was after `step` steps: ``Checkpoint(200, {"model": {...}, "lr": 1e-3}, path)``.

    Attributes:
        step: of the training that saved it.
        state: what `save` was given; tensors on the CPU.
        path: the folder it was read from.
    """

    step: int
    state: dict[str, Any]
    path: Path


def save(
    folder: Path, step: int, state: Mapping[str, Any], keep: int = 2, texts: Mapping[str, str] | None = None
) -> Path:
    """Write a checkpoint durably; until it is whole, all earlier ones stay. Tied tensors stay tied.

    History then stands at `step`: older checkpoints of the same or a later step are removed, and of the
    rest all but the newest `keep`.

    Args:
        folder: holds the checkpoints of one run; one process writes there at a time.
        step: at least 0.
        state: nested dict (keys str or int), list, tuple of tensors, str, int, float, bool, None.
        keep: how many checkpoints stay.
        texts: further files, name -> contents.

    Returns:
        The checkpoint's folder.

    Raises:
        ValueError: `state` holds anything else, the message says where; `step` is negative.
        OSError: the disk is full, or the like; what was there before is untouched.
    """
    if step < 0:
        raise ValueError(f"a checkpoint's step cannot be negative ({step})")
    tensors = _Tensors()
    skeleton = json.dumps(_encode(state, "state", tensors))
    _sweep(folder)
    final = _free_name(folder, step)
    with staged(final, by_every_rank=True) as path:  # who saves decides which ranks do
        path.mkdir()
        _write_tensors(path / TENSORS, tensors.named)
        for name, text in {**(texts or {}), STATE: skeleton}.items():
            (path / name).write_text(text, encoding="utf-8")
        files = {file.name: _sha256(file) for file in sorted(path.iterdir())}
        manifest = json.dumps({"format": FORMAT, "step": step, "files": files}, indent=2)
        (path / MANIFEST).write_text(manifest + "\n", encoding="utf-8")
    ahead = [other for (at, _), other in _found(folder) if at >= step and other != final]
    for old in ahead + [other for _, other in _found(folder) if other not in ahead][keep:]:
        _discard(old)
    return final


def latest(folder: Path, step: int | None = None) -> Checkpoint | None:
    """The newest checkpoint (at `step`) that verifies, or None; one warning line for each that does not."""
    for (at, _), path in _found(folder):
        try:
            if step in (None, at):
                return load(path)
        except (ValueError, OSError, SafetensorError) as error:
            _log.warning("checkpoint skipped: %s", " ".join(str(error).split()))
    return None


def load(path: Path) -> Checkpoint:
    """Read one checkpoint folder after verifying every file against its manifest.

    Raises:
        ValueError: a file is missing, cut or changed, or this is no checkpoint; the message names the file.
    """
    step = _verified_step(path)
    skeleton = json.loads((path / STATE).read_text(encoding="utf-8"))
    # copied into memory aligned as any other tensor's, or matrix products may differ in their last bits
    tensors = {name: mapped.clone() for name, mapped in load_file(path / TENSORS).items()}
    return Checkpoint(step, _decode(skeleton, tensors), path)


def rng_state() -> dict[str, Any]:
    """The generators of python, numpy, torch and (where there is one) every CUDA device, fit for `save`."""
    name, keys, position, has_gauss, gauss = numpy.random.get_state()
    return {
        "python": random.getstate(),
        "numpy": (name, keys.tolist(), int(position), int(has_gauss), float(gauss)),
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [],
    }


def restore_rng(state: Mapping[str, Any]) -> None:
    """Set the generators back to what `rng_state` returned; CUDA devices that are not here are left out."""
    random.setstate(state["python"])
    numpy.random.set_state(state["numpy"])
    torch.set_rng_state(state["torch"])
    for device, cuda in enumerate(state["cuda"][: torch.cuda.device_count()]):
        torch.cuda.set_rng_state(cuda, device)


class _Tensors:
    """Names for tensors: one per distinct view; none shares memory with another, as safetensors demands."""

    def __init__(self) -> None:
        self.named: dict[str, torch.Tensor] = {}
        self._views: dict[tuple, str] = {}
        self._storages: set[tuple] = set()

    def name(self, tensor: torch.Tensor, where: str) -> str:
        if type(tensor) not in (torch.Tensor, torch.nn.Parameter) or tensor.layout is not torch.strided:
            raise ValueError(f"{where}: a {type(tensor).__name__} of layout {tensor.layout} cannot be saved")
        view = (tensor.device, tensor.data_ptr(), tensor.dtype, tuple(tensor.shape), tensor.stride())
        if tensor.numel() and view in self._views:
            return self._views[view]
        whole = tensor.detach().contiguous()
        storage = (whole.device, whole.untyped_storage().data_ptr())
        name = self._views[view] = f"{len(self.named)}:{where}"
        self.named[name] = whole.clone() if storage in self._storages else whole
        self._storages.add(storage)
        return name


def _encode(value: Any, where: str, tensors: _Tensors) -> Any:
    """`value` as plain JSON; what JSON lacks becomes an object of one key with a tilde."""
    if isinstance(value, torch.Tensor):
        return {"~tensor": tensors.name(value, where)}
    if isinstance(value, float) and not math.isfinite(value):
        return {"~float": repr(float(value))}
    if value is None or isinstance(value, bool | int | float | str):
        return value
    if isinstance(value, list | tuple):
        items = [_encode(item, f"{where}.{index}", tensors) for index, item in enumerate(value)]
        return {"~tuple": items} if isinstance(value, tuple) else items
    if not isinstance(value, Mapping):
        raise ValueError(f"{where}: a checkpoint cannot hold a {type(value).__name__}")
    if wrong := [key for key in value if isinstance(key, bool) or not isinstance(key, str | int)]:
        raise ValueError(f"{where}: a checkpoint's dict keys are str or int, not {wrong[0]!r}")
    pairs = [[key, _encode(item, f"{where}.{key}", tensors)] for key, item in value.items()]
    plain = all(isinstance(key, str) and not key.startswith("~") for key in value)
    return dict(pairs) if plain else {"~dict": pairs}


def _decode(value: Any, tensors: Mapping[str, torch.Tensor]) -> Any:
    if isinstance(value, list):
        return [_decode(item, tensors) for item in value]
    if not isinstance(value, dict):
        return value
    match next(iter(value.items()), None):
        case ("~tensor", name):
            return tensors[name]
        case ("~float", text):
            return float(text)
        case ("~tuple", items):
            return tuple(_decode(item, tensors) for item in items)
        case ("~dict", pairs):
            return {key: _decode(item, tensors) for key, item in pairs}
    return {key: _decode(item, tensors) for key, item in value.items()}


def _write_tensors(path: Path, tensors: dict[str, torch.Tensor]) -> None:
    try:
        save_file(tensors, path)
    except SafetensorError as error:  # a full disk reaches us as text: give the caller the OSError it is
        if code := re.search(r"os error (\d+)", str(error)):
            raise OSError(int(code[1]), os.strerror(int(code[1])), str(path)) from error
        raise


def _verified_step(path: Path) -> int:
    named, manifest = _NAME.fullmatch(path.name), path / MANIFEST
    if not manifest.is_file():
        raise ValueError(f"{manifest} is missing")
    try:
        facts = json.loads(manifest.read_text(encoding="utf-8"))
        form, step, files = facts["format"], facts["step"], dict(facts["files"])
    except (ValueError, KeyError, TypeError):
        raise ValueError(f"{manifest} cannot be read") from None
    if form != FORMAT or not {STATE, TENSORS} <= files.keys() or (named and step != int(named[1])):
        raise ValueError(f"{manifest} does not describe a checkpoint of format {FORMAT} at {path.name}")
    for name, digest in files.items():
        if not (path / name).is_file():
            raise ValueError(f"{path / name} is missing")
        if _sha256(path / name) != digest:
            raise ValueError(f"{path / name} does not have the sha256 of its manifest: cut or changed")
    return step


def _found(folder: Path) -> list[tuple[tuple[int, int], Path]]:
    """((step, times saved before), folder) of every checkpoint, newest first."""
    names = ((_NAME.fullmatch(path.name), path) for path in folder.glob("checkpoint-*"))
    return sorted((((int(m[1]), int(m[2] or 0)), path) for m, path in names if m), reverse=True)


def _free_name(folder: Path, step: int) -> Path:
    """Sorts after every checkpoint of this step."""
    again = [times for (at, times), _ in _found(folder) if at == step]
    return folder / (f"checkpoint-{step}.{max(again) + 1}" if again else f"checkpoint-{step}")


def _discard(path: Path) -> None:
    """Remove a checkpoint so that a kill halfway leaves nothing that looks like one."""
    gone = path.with_name(f".replaced-{path.name}")
    os.rename(path, gone)
    remove(gone)


def _sweep(folder: Path) -> None:
    """Remove what killed processes left half made or half removed (names of `tasks.run.files`)."""
    for pattern in (".staged-checkpoint-*", ".replaced-checkpoint-*"):
        for path in folder.glob(pattern):
            remove(path)


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()

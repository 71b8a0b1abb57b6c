"""Outs are never written in place: staged beside, made durable, renamed."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from tasks.run.finite import check_numbers
from tasks.run.ranks import is_first


@contextmanager
def staged(final: Path, by_every_rank: bool = False) -> Iterator[Path]:
    """A path beside `final` (not created, same suffix) which takes its place when the block ends well.

    The block writes a file or a folder there. Whatever stood at `final` stays until then, and stays for good
    when the block raises. Files and folders are on disk before the rename, and the rename before the return.
    Of several training processes only the first does so; another gets a path that leads nowhere lasting, and
    need not write there at all, unless what stands at `final` is its own (`by_every_rank`).
    """
    if not (by_every_rank or is_first()):
        with TemporaryDirectory() as nowhere:
            yield Path(nowhere) / final.name
        return
    final.parent.mkdir(parents=True, exist_ok=True)
    new, old = final.with_name(f".staged-{final.name}"), final.with_name(f".replaced-{final.name}")
    _recover(final, new, old)
    try:
        yield new
        _open_up(new)
        _sync_tree(new)
    except BaseException:
        remove(new)
        raise
    if os.path.lexists(final) and (final.is_dir() or new.is_dir()):
        os.rename(final, old)  # rename replaces a file by a file and no more
    os.replace(new, final)
    _sync(final.parent)
    remove(old)


def write_json(final: Path, value: Any, by_every_rank: bool = False) -> None:
    """Stage `value` as JSON, keys sorted, newline at the end; ValueError names a nan or infinity."""
    check_numbers(str(final), value)
    try:
        text = json.dumps(value, sort_keys=True, indent=2, allow_nan=False, ensure_ascii=False)
    except ValueError as error:
        raise ValueError(f"{final}: {error}") from None
    with staged(final, by_every_rank) as path:
        path.write_text(text + "\n", encoding="utf-8")


def remove(path: Path) -> None:
    """Remove a file, a link or a whole folder, if it is there."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def _recover(final: Path, new: Path, old: Path) -> None:
    """Undo what a killed process left: half a new one, or an old one moved aside."""
    remove(new)
    if os.path.lexists(old) and not os.path.lexists(final):
        os.rename(old, final)
    remove(old)


def _open_up(path: Path) -> None:
    """Let others read what the umask lets them: safetensors writes by way of a file of mode 0600."""
    umask = os.umask(0o077)
    os.umask(umask)
    for entry in (path, *path.rglob("*")):
        if not entry.is_symlink():
            wanted = (0o777 if entry.is_dir() else 0o666) & ~umask
            if (mode := entry.stat().st_mode) | wanted != mode:
                entry.chmod(mode | wanted)


def _sync_tree(path: Path) -> None:
    if path.is_dir():
        for entry in path.iterdir():
            _sync_tree(entry)
    _sync(path)


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)

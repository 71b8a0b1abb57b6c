"""Staged writing: the old stays until the new is whole."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from tasks.run import files
from tasks.run.files import staged, write_json


def folder(path: Path, **contents: str) -> Path:
    path.mkdir(parents=True)
    for name, text in contents.items():
        (path / name).write_text(text)
    return path


def names(path: Path) -> list[str]:
    return sorted(entry.name for entry in path.iterdir())


def test_a_file_appears_whole_and_alone(tmp_path):
    final = tmp_path / "deep" / "down" / "table.parquet"
    with staged(final) as path:
        assert path.parent == final.parent and path.suffix == ".parquet" and not path.exists()
        path.write_text("new")
        assert not final.exists()
    assert final.read_text() == "new" and names(final.parent) == ["table.parquet"]


@pytest.mark.parametrize("old", ["file", "folder", "link"])
@pytest.mark.parametrize("new", ["file", "folder"])
def test_the_new_replaces_the_old(tmp_path, old, new):
    final, elsewhere = tmp_path / "out" / "model", folder(tmp_path / "elsewhere", kept="kept")
    final.parent.mkdir()
    if old == "file":
        final.write_text("old")
    elif old == "folder":
        folder(final, weights="old", more="old")
    else:
        final.symlink_to(elsewhere)
    with staged(final) as path:
        folder(path, weights="new") if new == "folder" else path.write_text("new")
        assert final.exists()
    assert names(final.parent) == ["model"] and not final.is_symlink()
    assert (final / "weights" if new == "folder" else final).read_text() == "new"
    assert names(elsewhere) == ["kept"], "a link is replaced, not written through"
    if new == "folder":
        assert names(final) == ["weights"]


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
def test_on_an_error_the_old_stays(tmp_path, error):
    final = folder(tmp_path / "model", weights="old")
    with pytest.raises(error), staged(final) as path:
        folder(path, weights="half")
        raise error
    assert names(tmp_path) == ["model"] and (final / "weights").read_text() == "old"


def test_what_a_killed_process_left_is_undone(tmp_path):
    folder(tmp_path / ".staged-model", weights="half")
    folder(tmp_path / ".replaced-model", weights="old")
    with pytest.raises(ValueError), staged(tmp_path / "model") as path:
        assert not path.exists()
        raise ValueError
    assert names(tmp_path) == ["model"] and (tmp_path / "model" / "weights").read_text() == "old"


def test_everything_is_synced_before_the_rename_and_the_parent_after_it(tmp_path, monkeypatch):
    events, sync, replace = [], files._sync, os.replace
    monkeypatch.setattr(files, "_sync", lambda path: (events.append(path.name), sync(path)))
    monkeypatch.setattr(os, "replace", lambda a, b: (events.append("rename"), replace(a, b)))
    with staged(tmp_path / "out" / "model") as path:
        folder(path / "inner", weights="new")
    assert events == ["weights", "inner", ".staged-model", "rename", "out"]


def test_json_is_sorted_exact_and_ends_with_a_newline(tmp_path):
    value = {"b": 0.1 + 0.2, "a": "Grüße"}
    write_json(tmp_path / "metrics.json", value)
    text = (tmp_path / "metrics.json").read_text(encoding="utf-8")
    assert text == '{\n  "a": "Grüße",\n  "b": 0.30000000000000004\n}\n'
    assert json.loads(text) == value


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_json_refuses_what_json_cannot_say(tmp_path, bad):
    write_json(tmp_path / "metrics.json", {"a": 1.0})
    with pytest.raises(ValueError, match=rf"metrics\.json: a\.b\[1\] is {bad}$"):
        write_json(tmp_path / "metrics.json", {"a": {"b": [0.5, bad]}})
    assert json.loads((tmp_path / "metrics.json").read_text()) == {"a": 1.0}


@pytest.mark.parametrize(("umask", "of_file", "of_folder"), [(0o022, 0o644, 0o755), (0o077, 0o600, 0o700)])
def test_others_may_read_what_the_umask_lets_them(tmp_path, umask, of_file, of_folder):
    """safetensors writes by way of a file of mode 0600: a served model must not stay so."""
    final, before = tmp_path / "model", os.umask(umask)
    try:
        with staged(final) as path:
            for name in ("weights", "inner/weights"):
                (path / name).parent.mkdir(parents=True, exist_ok=True)
                (path / name).touch(mode=0o600)
            (path / "script").touch(mode=0o700)
            (path / "link").symlink_to("weights")
    finally:
        found = os.umask(before)
    assert found == umask, "the umask is as before"
    mode = lambda name: (final / name).stat().st_mode & 0o777  # noqa: E731
    assert mode("weights") == mode("inner/weights") == of_file and mode("inner") == of_folder
    assert mode("script") & 0o700 == 0o700 and (final / "link").is_symlink()

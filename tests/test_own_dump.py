"""A run on one's own dump and base model leaves its folder: pushed, cloned, pulled, in DVC's workspaces."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path
from xml.sax.saxutils import quoteattr

import pytest
import tiny
from test_end_to_end import AUTHOR, Clone

pytestmark = pytest.mark.slow
SMALL = (
    "data.split.sft=0.25 data.split.reward=0.25 data.split.rl=0.3 data.split.eval=0.2 machine.threads=1 "
    "pack.row_tokens=512 pack.document_tokens=256 pack.prompt_tokens=200"
).split()


def dump(path: Path, questions: int = 60) -> Path:
    """Questions with two answers each, in the official format."""
    rows = []
    for first in range(1, 3 * questions, 3):
        of = {"CreationDate": "2020-01-02T03:04:05.000", "OwnerUserId": "5"}
        asked = {
            "Title": f"How does thing {first} work?",
            "Body": f"<p>Thing {first} turns, why {first}?</p>",
        }
        rows.append(of | asked | {"Id": first, "PostTypeId": 1, "Score": 3})
        for number, words in ((1, "It turns"), (2, "Nobody knows")):
            answer = {"Id": first + number, "ParentId": first, "Score": 6 - 3 * number, "PostTypeId": 2}
            rows.append(of | answer | {"Body": f"<p>{words} {first}, {number} of {first}.</p>"})
    lines = ["<row " + " ".join(f"{k}={quoteattr(str(v))}" for k, v in row.items()) + " />" for row in rows]
    path.write_text('<?xml version="1.0" encoding="utf-8"?>\n<posts>\n' + "\n".join(lines) + "\n</posts>")
    return path


class Repository(Clone):
    """A repository with a run of `data` and `pack` on a dump and a base model of one's own, pushed."""

    def __init__(self, root: Path, outside: Path) -> None:
        super().__init__(root)
        self.dump, self.base = (
            dump(outside / "my site, 1.Posts.xml"),
            tiny.save(tiny.causal(), outside / "base", tiny.tokenizer()),
        )
        self.run(*self.use(f"data.source={self.dump}", f"model.base={self.base}"))
        self.run("dvc", "repro", "pack")
        self.run("dvc", "remote", "add", "-d", "local", str(outside / "remote"))
        self.run("git", "add", "dvc.lock", "artifacts")  # this copy began without them
        self.run("git", *AUTHOR, "commit", "-qam", "a run")
        self.run("dvc", "push", "data", "pack")

    def use(self, *settings: str) -> list[str]:
        """The command that writes params.yaml."""
        return [sys.executable, "-m", "params", "use", "stack_exchange", *SMALL, *settings]

    def cloned(self, folder: Path) -> Clone:
        """A clone elsewhere, with an environment of its own."""
        shutil.rmtree(folder, ignore_errors=True)
        subprocess.run(["git", "clone", "-q", str(self.root), str(folder)], check=True)
        clone = object.__new__(Clone)
        clone.root, clone.environment = folder, self.environment | {"PYTHONPATH": str(folder)}
        return clone


@pytest.fixture(scope="module")
def repository(tmp_path_factory) -> Repository:
    return Repository(tmp_path_factory.mktemp("repository"), tmp_path_factory.mktemp("outside"))


def test_a_clone_without_the_files_has_nothing_to_do_and_loses_nothing(repository, tmp_path):
    clone = repository.cloned(tmp_path / "clone")
    clone.run("dvc", "pull", "data", "pack")
    for command in (["repro"], ["repro", "--allow-missing"], ["status"]):
        assert "Data and pipelines are up to date." in clone.run("dvc", *command, "pack")
    assert not (clone.root / "data/raw").exists()
    told = clone.run("python", "-m", "params", "check")
    assert "data/raw/my site, 1.Posts.xml is not on this machine" in told and "data/base/" in told
    named = ["data.source=['my site, 1.Posts.xml']", "model.base=data/base"]
    clone.run(*repository.use(*named, "data.split.eval=0.25", "data.split.rl=0.25"))
    before = {path.name: path.read_bytes() for path in (clone.root / "artifacts/data").iterdir()}
    printed = clone.run("dvc", "repro", "pack", status=255)
    assert "is not on this machine (recorded: " in printed and "dvc checkout" not in printed
    assert {path.name: path.read_bytes() for path in (clone.root / "artifacts/data").iterdir()} == before


def test_dvc_carries_the_files_where_it_is_asked_to(repository, tmp_path):
    """`dvc add --no-relink`: the dump stands in its place and in the cache, and nowhere else."""
    origin = repository.cloned(tmp_path / "origin")
    origin.run(*repository.use(f"data.source={repository.dump}", f"model.base={repository.base}"))
    origin.run("dvc", "add", "--no-relink", "data/raw", "data/base")
    assert (origin.root / "data/raw/my site, 1.Posts.xml").is_symlink()
    origin.run("git", "add", "data/raw.dvc", "data/base.dvc")
    origin.run("git", *AUTHOR, "commit", "-qam", "tracked")
    origin.run("dvc", "pull", "data", "pack")
    origin.run("dvc", "push", "data/raw.dvc", "data/base.dvc")
    subprocess.run(["git", "clone", "-q", str(origin.root), str(tmp_path / "clone")], check=True)
    origin.root, origin.environment = (
        tmp_path / "clone",
        origin.environment | {"PYTHONPATH": str(tmp_path / "clone")},
    )
    origin.run("dvc", "pull", "data", "pack", "data/raw.dvc", "data/base.dvc")
    assert "Data and pipelines are up to date." in origin.run("dvc", "repro", "pack")
    printed = origin.run("dvc", "repro", "--force", "pack")
    assert "Running stage 'data'" in printed and "Running stage 'pack'" in printed
    assert origin.run("git", "status", "--porcelain") == ""  # and the same came out


def test_experiments_see_the_files_in_workspaces_of_their_own(repository):
    repository.run(
        "dvc", "exp", "run", "--temp", "-S", "data.split.rl=0.25", "-S", "data.split.eval=0.25", "pack"
    )
    repository.run("dvc", "exp", "run", "--temp", "-S", "data.source=['my site, 1.Posts.xml']", "pack")
    found = json.loads(repository.run("dvc", "exp", "show", "--json"))
    assert sum(len(one["experiments"] or []) for one in found) >= 1
    assert repository.run("git", "status", "--porcelain") == ""


def test_a_changed_file_is_seen_and_taken_when_recorded(repository, tmp_path):
    clone = repository.cloned(tmp_path / "clone")
    own = dump(tmp_path / "my site, 1.Posts.xml")
    clone.run(*repository.use(f"data.source={own}", f"model.base={repository.base}"))
    assert clone.run("git", "status", "--porcelain") == ""  # the same dump from another place is the same run
    dump(own, questions=70)
    for command in (["python", "-m", "params", "check"], ["python", "-m", "tasks", "data"]):
        assert "is not the file that data/raw.json records" in clone.run(*command, status=1)
    assert clone.run("python", "-m", "params", "record") == "data/raw.json: written\n"
    assert "Running stage 'data'" in clone.run("dvc", "repro", "data")

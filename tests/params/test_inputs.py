"""What a stage finds of the files from outside: the recorded ones, those of the repository, or one line."""

import json
import os
from pathlib import Path

import pytest

from params import inputs
from params.inputs import BASES, RAW, measure, prepare, read_record, record_path, record_text
from params.load import ParamsError, validate
from params.schema import Params

ALL = {record_path(folder) for folder in (RAW, *BASES.values())}


def run_of(**sections) -> Params:
    return validate({"data": {"source": ["a.7z", "hf://datasets/o/n"]}, **sections})


@pytest.fixture
def root(tmp_path) -> Path:
    """A repository with a recorded dump and a recorded base model."""
    root = tmp_path / "repository"
    for folder, name in ((RAW, "a.7z"), (BASES["model.base"], "config.json")):
        (root / folder).mkdir(parents=True)
        (root / folder / name).write_text(name)
        record = {name: measure(root / folder / name, root)}
        (root / record_path(folder)).write_text(record_text(record))
    return root


def test_a_stage_goes_on_with_the_recorded_files(root):
    for sections in ({}, {"model": {"base": "data/base"}}, {"data": {"source": "sample"}}):
        prepare(run_of(**sections), root, root, ALL, reads=True)


@pytest.mark.parametrize("reads", [True, False])
def test_what_is_recorded_and_not_here(root, reads):
    """It stops only a stage that reads it; where DVC carries it, the message says so."""
    (root / RAW / "a.7z").unlink()
    if not reads:
        prepare(run_of(), root, root, ALL, reads)
        return
    with pytest.raises(
        ParamsError, match=r"data\.source: data/raw/a\.7z is not on this machine.*\); `python -m"
    ):
        prepare(run_of(), root, root, ALL, reads)
    (root / "data/raw.dvc").write_text("outs: []")
    with pytest.raises(ParamsError, match=r"\); `dvc pull data/raw\.dvc`, or `python -m params use"):
        prepare(run_of(), root, root, ALL, reads)
    prepare(
        run_of(), root, root, {record_path(BASES["model.base"])}, reads
    )  # a stage that has nothing to do with it


@pytest.mark.parametrize("reads", [True, False])
@pytest.mark.parametrize("folder", [RAW, BASES["model.base"]])
def test_another_file_than_the_recorded_one_stops_every_stage(root, folder, reads):
    params = run_of(model={"base": "data/base"})
    (path,) = (root / folder).iterdir()
    status = path.stat()
    path.write_text(path.read_text()[::-1])  # as long as before
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns + 1))
    words = rf"{folder}/{path.name} is not the file that {folder}\.json records \(md5 \w+ instead of"
    with pytest.raises(ParamsError, match=words):
        prepare(params, root, root, ALL, reads)


@pytest.mark.parametrize(
    ("sections", "message"),
    [
        ({"data": {"source": ["b.7z"]}}, r"data\.source: data/raw/b\.7z is missing; `python -m params use …"),
        (
            {"data": {"source": ["mine.7z"]}},
            r"data/raw/mine\.7z is not recorded in data/raw\.json; `python -m",
        ),
        (
            {"model": {"base": "{root}/data"}},
            r"model\.base: .*/data is a folder that no record knows; `python -m",
        ),
        ({"reward": {"base": "data/reward_base"}}, r"reward\.base: data/reward_base\.json records no files"),
    ],
)
def test_what_is_not_recorded(root, sections, message):
    sections = json.loads(json.dumps(sections).replace("{root}", str(root)))
    (root / RAW / "mine.7z").write_text("mine")
    with pytest.raises(ParamsError, match=message):
        prepare(run_of(**sections), root, root, ALL, reads=True)


def test_a_workspace_of_dvc_sees_the_files_of_the_repository(root, tmp_path):
    """`dvc exp run --temp` and its queue check out what git carries, and no more."""
    workspace = tmp_path / "exps" / "tmp1"
    for folder in (RAW, BASES["model.base"]):
        (workspace / folder.parent).mkdir(parents=True, exist_ok=True)
        (workspace / record_path(folder)).write_text((root / record_path(folder)).read_text())
    dump = tmp_path / "a.7z"
    (root / RAW / "a.7z").rename(dump)
    (root / RAW / "a.7z").symlink_to(dump)
    prepare(run_of(model={"base": "data/base"}), workspace, root, ALL, reads=True)
    assert os.readlink(workspace / RAW / "a.7z") == str(dump)  # and not a link to a link
    assert (workspace / "data/base/config.json").read_text() == "config.json"
    prepare(run_of(), workspace, root, ALL, reads=True)


@pytest.mark.parametrize(
    "text", ["", "[]", "{", '{"a": 1}', '{"a": {"md5": "x"}}', '{"../a": {"md5": "x", "size": 1}}', b"\xff"]
)
def test_a_damaged_record_is_one_line(root, text):
    path = root / "data/raw.json"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(
        ParamsError, match=r"raw\.json is no record of files; `git checkout HEAD data/raw\.json`"
    ):
        read_record(root, RAW)


def test_a_file_is_hashed_once(root, monkeypatch):
    real, hashed = inputs.hashlib.file_digest, []
    monkeypatch.setattr(
        inputs.hashlib, "file_digest", lambda file, kind: hashed.append(kind) or real(file, kind)
    )
    path = root / RAW / "a.7z"
    assert measure(path, root) == measure(path, root) == read_record(root, RAW)["a.7z"]
    assert hashed == []  # the fixture did
    (root / "scratch/inputs.json").write_text("{")
    assert measure(path, root).size == 4 and hashed == ["md5"]
    assert json.loads((root / "scratch/inputs.json").read_text())

"""Places on disk, and the fingerprint: it changes with what a stage computes from, and with nothing else."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from tasks.run.layout import STAGES, Layout, content_hash

REPOSITORY = Path(__file__).parents[2]
PIPELINE = {
    "pack": {"cmd": "x", "params": ["pack"], "outs": ["artifacts/pack/rows", "artifacts/pack/groups"]},
    "sft": {
        "cmd": "x",
        "deps": ["code", "artifacts/pack/rows", "artifacts/pack/groups/a.txt"],
        "params": ["seed", "ppo.temperature"],
    },
}
PARAMS = {"seed": 0, "ppo": {"temperature": 1.0, "updates": 5}, "machine": {"threads": 2}}


def write(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)


def lock(root: Path, md5: str) -> None:
    outs = [{"path": "artifacts/pack/rows", "md5": md5}, {"path": "artifacts/pack/groups", "md5": md5}]
    write(root / "dvc.lock", yaml.safe_dump({"schema": "2.0", "stages": {"pack": {"outs": outs}}}))


@pytest.fixture
def layout(tmp_path) -> Layout:
    write(tmp_path / "dvc.yaml", yaml.safe_dump({"stages": PIPELINE}))
    write(tmp_path / "params.yaml", yaml.safe_dump(PARAMS))
    lock(tmp_path, "0123.dir")
    for name in ("code/a.py", "artifacts/pack/rows/0.txt", "artifacts/pack/groups/a.txt"):
        write(tmp_path / name, "one")
    return Layout(tmp_path, tmp_path)


def params(**changes) -> str:
    return yaml.safe_dump({**PARAMS, **changes})


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("code/a.py", "two"),
        ("code/b.py", "one"),
        ("artifacts/pack/groups/a.txt", "two"),
        ("params.yaml", params(seed=1)),
        ("params.yaml", params(ppo={"temperature": 0.7, "updates": 5})),
    ],
)
def test_fingerprint_changes_with_code_files_and_tracked_values(layout, name, text):
    before = layout.fingerprint("sft")
    write(layout.root / name, text)
    assert layout.fingerprint("sft") != before


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("params.yaml", params(machine={"threads": 64})),
        ("params.yaml", params(ppo={"updates": 6, "temperature": 1.0})),
        ("code/__pycache__/a.pyc", "bytes"),
        ("code/.gitignore", "*"),
        ("artifacts/pack/rows/0.txt", "two"),  # dvc.lock speaks for it
        ("artifacts/pack/groups/b.txt", "two"),  # sft depends on a.txt alone
    ],
)
def test_fingerprint_ignores_everything_else(layout, name, text):
    before = layout.fingerprint("sft")
    write(layout.root / name, text)
    assert layout.fingerprint("sft") == before


def test_an_upstream_out_counts_by_its_md5_in_the_lock(layout):
    before = layout.fingerprint("sft")
    lock(layout.root, "4567.dir")
    assert layout.fingerprint("sft") != before


def test_without_a_lock_the_contents_count(layout):
    (layout.root / "dvc.lock").unlink()
    before = layout.fingerprint("sft")
    write(layout.root / "artifacts/pack/rows/0.txt", "two")
    assert layout.fingerprint("sft") != before


def test_two_stages_never_share_a_fingerprint(layout):
    same = {"a": {"cmd": "x", "params": ["seed"]}, "b": {"cmd": "x", "params": ["seed"]}}
    write(layout.root / "dvc.yaml", yaml.safe_dump({"stages": same}))
    assert layout.fingerprint("a") != layout.fingerprint("b")


@pytest.mark.parametrize(
    ("stage", "missing", "error", "words"),
    [
        ("sfd", None, ValueError, "no stage 'sfd'"),
        ("sft", "dvc.yaml", FileNotFoundError, "dvc.yaml"),
        ("sft", "params.yaml", FileNotFoundError, "params.yaml"),
        ("sft", "code/a.py", None, None),  # an empty folder is a dependency all the same
        ("sft", "artifacts/pack/groups/a.txt", FileNotFoundError, "groups/a.txt"),
    ],
)
def test_what_is_missing_is_named_in_one_line(layout, stage, missing, error, words):
    if missing:
        (layout.root / missing).unlink()
    if error is None:
        assert len(layout.fingerprint(stage)) == 64
        return
    with pytest.raises(error, match=words) as raised:
        layout.fingerprint(stage)
    assert "\n" not in str(raised.value)


def test_a_parameter_that_dvc_tracks_must_be_there(layout):
    write(layout.root / "params.yaml", "seed: 0\nppo: 3\n")
    with pytest.raises(ValueError, match=r"ppo\.temperature"):
        layout.fingerprint("sft")
    write(layout.root / "params.yaml", "seed: [0\n")
    with pytest.raises(ValueError, match=r"params\.yaml") as raised:
        layout.fingerprint("sft")
    assert "\n" not in str(raised.value)


def test_links_are_followed(tmp_path):
    for name in ("a/x/f", "b/f"):
        write(tmp_path / name, "one")
    (tmp_path / "b" / "f").unlink()
    (tmp_path / "b" / "f").symlink_to(tmp_path / "a" / "x" / "f")
    (tmp_path / "c").symlink_to(tmp_path / "a" / "x")
    (tmp_path / "d").mkdir()
    (tmp_path / "d" / "x").symlink_to(tmp_path / "a" / "x")
    assert content_hash(tmp_path / "d") == content_hash(tmp_path / "a"), "a linked folder inside a folder"
    assert content_hash(tmp_path / "b") == content_hash(tmp_path / "c") == content_hash(tmp_path / "a" / "x")
    assert content_hash(tmp_path / "a") != content_hash(tmp_path / "b"), "names count"


def test_here_takes_home_from_dvc(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("DVC_ROOT", raising=False)
    assert Layout.here() == Layout(tmp_path, tmp_path)
    monkeypatch.setenv("DVC_ROOT", str(tmp_path / "original"))
    assert Layout.here() == Layout(tmp_path, tmp_path / "original")


def test_scratch_stands_at_home_under_the_fingerprint(layout, tmp_path):
    layout = Layout(layout.root, tmp_path / "home")
    folder = layout.scratch("sft")
    assert folder.is_dir() and folder == tmp_path / "home" / "scratch" / "sft" / layout.fingerprint("sft")
    assert layout.artifact("sft", "model", "x") == layout.root / "artifacts" / "sft" / "model" / "x"


def test_the_stages_are_those_of_the_graph():
    assert tuple(yaml.safe_load((REPOSITORY / "dvc.yaml").read_text())["stages"]) == STAGES


def test_what_a_workspace_keeps_at_home_is_its_own(tmp_path, monkeypatch):
    """DVC's queue: several workspaces, one home, one name of stage."""
    home = tmp_path / "home"
    monkeypatch.delenv("DVC_EXP_NAME", raising=False)
    assert Layout(home, home).kept("reports", "ppo", "curve.png") == home / "reports/ppo/curve.png"
    monkeypatch.setenv("DVC_EXP_NAME", "gouty-toga")
    assert Layout(home, home).workspace.startswith("home-"), "run in place it is the same workspace as before"
    one, two = (Layout(tmp_path / name, home) for name in ("tmp1", "tmp2"))
    assert one.workspace.startswith("gouty-toga-") and one.workspace != two.workspace
    assert one.kept("reports", "ppo") == home / "reports" / "workspaces" / one.workspace / "ppo"
    assert one.refusal("ppo") == tmp_path / "tmp1" / "scratch" / "ppo" / "refusal.json"


@pytest.mark.parametrize("text", ["", "  \n", "[]", "- a", "stages: [a]", "stages: {a: }", "a: [", "\0", "3"])
def test_a_damaged_lock_is_named_with_what_mends_it(layout, text, monkeypatch):
    monkeypatch.setattr("tasks.run.layout.SECONDS_BETWEEN_TRIES", 0)
    (layout.root / "dvc.lock").write_text(text)
    with pytest.raises(ValueError, match=r"dvc\.lock is damaged: .*git checkout dvc\.lock") as raised:
        layout.fingerprint("sft")
    assert "\n" not in str(raised.value)


def test_a_lock_that_is_just_being_written_is_read_again(layout, monkeypatch):
    whole = (layout.root / "dvc.lock").read_text()
    (layout.root / "dvc.lock").write_text("")
    monkeypatch.setattr("tasks.run.layout.time.sleep", lambda _: (layout.root / "dvc.lock").write_text(whole))
    assert set(layout.locked()) == {"pack"}

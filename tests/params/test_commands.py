import hashlib
import json
import os
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from params.__main__ import PRESETS, main, presets
from params.inputs import Recorded
from params.load import read, read_preset

SAMPLE = read_preset(PRESETS / "sample.yaml")


@pytest.fixture
def project(tmp_path, monkeypatch) -> Path:
    """A repository's folder as git makes it: without the folders of links."""
    root = tmp_path / "project"
    root.mkdir()
    (root / "dvc.yaml").write_text("stages: {}\n")
    monkeypatch.chdir(root)
    return root


@pytest.fixture
def dumps(tmp_path) -> Path:
    folder = tmp_path / "dumps"
    (folder / "unix.example").mkdir(parents=True)
    wanted = ("art.example.7z", "zoo.example.Posts.xml.xz", "unix.example/Posts.xml", "so.example-Posts.7z")
    for name in (*wanted, "readme.txt", "unix.example/Users.xml", "so.example-Users.7z", ".hidden.7z"):
        (folder / name).write_text(name)
    return folder


@pytest.fixture
def model(tmp_path) -> Path:
    folder = tmp_path / "model"
    folder.mkdir()
    for name in ("config.json", "model.safetensors", "tokenizer.json", "pytorch_model.bin", "a.py"):
        (folder / name).write_text(name)
    return folder


def links(folder: str) -> dict[str, str]:
    """Name -> target of the links in the folder."""
    return {path.name: os.readlink(path) for path in Path(folder).iterdir() if path.is_symlink()}


def typed_before() -> list[str]:
    """The arguments of the command that params.yaml says it was written by."""
    head = Path("params.yaml").read_text().splitlines()[0]
    return shlex.split(head.partition("`")[2].rpartition("`")[0])[3:]


def state() -> dict[str, str]:
    """Everything that a command may touch."""
    paths = [path for path in Path.cwd().rglob("*") if not path.is_dir()]
    return {str(path): os.readlink(path) if path.is_symlink() else path.read_text() for path in paths}


def test_use_sample(project, capsys):
    assert main(["use", "sample"]) == 0
    assert capsys.readouterr().out == "params.yaml: preset sample\n"
    assert read() == SAMPLE
    assert main(["check"]) == 0
    assert capsys.readouterr().out == "params.yaml: ok\n"


def test_settings(project):
    assert main(["use", "sample", "sft.learning_rate=1e-5", "seed=7", "reward_eval.enforce=false"]) == 0
    params = read()
    assert (params.sft.learning_rate, params.seed, params.reward_eval.enforce) == (1e-5, 7, False)
    usual = {"seed": 0, "sft": SAMPLE.sft, "reward_eval": SAMPLE.reward_eval}
    assert params.model_copy(update=usual) == SAMPLE
    command = "python -m params use sample sft.learning_rate=1e-5 seed=7 reward_eval.enforce=false"
    assert Path("params.yaml").read_text().startswith(f"# Written by `{command}`.\n")


@pytest.mark.parametrize("preset", presets())
def test_presets_are_complete_runs(project, dumps, preset):
    assert main(["use", preset, f"data.source={dumps / 'art.example.7z'}"]) == 0
    assert read().data.source == ("art.example.7z",)
    assert main(["check"]) == 0
    assert (PRESETS / f"{preset}.yaml").read_text().startswith("# ")


def test_paths_become_links(project, dumps, monkeypatch):
    monkeypatch.chdir(dumps)
    relative = os.path.relpath(dumps / "unix.example", project)
    monkeypatch.chdir(project)
    value = f"{dumps / 'zoo.example.Posts.xml.xz'}, {relative}/Posts.xml"
    assert main(["use", "stack_exchange", f"data.source={value}"]) == 0
    assert read().data.source == ("unix.example.Posts.xml", "zoo.example.Posts.xml.xz")
    assert links("data/raw") == {
        "zoo.example.Posts.xml.xz": str(dumps / "zoo.example.Posts.xml.xz"),
        "unix.example.Posts.xml": str(dumps / "unix.example" / "Posts.xml"),
    }
    assert str(dumps) not in Path("params.yaml").read_text()


@pytest.mark.parametrize("value", ["art.example, zoo.example", "[art.example, 'zoo.example']"])
def test_sites_to_hold_out(project, dumps, value):
    usual = ["use", "stack_exchange", f"data.source={dumps}", "data.split_by=site"]
    assert main([*usual, f"data.eval_sites={value}"]) == 0
    assert (read().data.split_by, read().data.eval_sites) == ("site", ("art.example", "zoo.example"))
    head = Path("params.yaml").read_text().split("`")[1]
    assert "data.eval_sites=art.example,zoo.example" in head
    assert main(["use", "stack_exchange", f"data.source={dumps}", "data.eval_sites="]) == 0
    assert (read().data.split_by, read().data.eval_sites) == ("question", ())


def test_a_folder_means_the_dumps_in_it(project, dumps):
    assert main(["use", "stack_exchange", f"data.source={dumps}"]) == 0
    names = ["art.example.7z", "so.example-Posts.7z", "unix.example.Posts.xml", "zoo.example.Posts.xml.xz"]
    assert read().data.source == tuple(names)
    assert sorted(links("data/raw")) == names


def test_links_of_posts_come_with_them(project, dumps):
    for name in ("unix.example/PostLinks.xml", "so.example-PostLinks.7z", "lonely.example.PostLinks.xml"):
        (dumps / name).write_text(name)
    assert main(["use", "stack_exchange", f"data.source={dumps}"]) == 0
    extra = ["so.example-PostLinks.7z", "unix.example.PostLinks.xml"]
    names = ["art.example.7z", "so.example-Posts.7z", "unix.example.Posts.xml", "zoo.example.Posts.xml.xz"]
    assert read().data.source == tuple(sorted([*names, *extra]))
    assert main(["check"]) == 0


def test_preference_data_and_names_on_the_hub(project, dumps):
    names = ["mine.jsonl", "mine2.jsonl.gz", "mine3.parquet", "mine4.json"]
    for name in names:
        (dumps / name).write_text(name)
    hub = "hf://datasets/owner/name@v1"
    value = ",".join([hub, *(str(dumps / name) for name in names)])
    assert main(["use", "stack_exchange", f"data.source={value}"]) == 0
    assert read().data.source == (*names, hub)
    assert sorted(links("data/raw")) == names
    assert main(["use", "stack_exchange", f"data.source={hub}"]) == 0
    assert (read().data.source, links("data/raw")) == ((hub,), {})
    assert main(["check"]) == 0


def test_earlier_links_go_and_own_files_stay(project, dumps, model):
    (project / "data/raw").mkdir(parents=True)
    (project / "data/raw/mine.example.7z").write_text("mine")
    assert main(["use", "stack_exchange", f"data.source={dumps}", f"model.base={model}"]) == 0
    own = "data/raw/mine.example.7z,data/raw/art.example.7z"
    assert main(["use", "stack_exchange", f"data.source={own}"]) == 0
    assert read().data.source == ("art.example.7z", "mine.example.7z")
    assert os.readlink("data/raw/art.example.7z") == str(dumps / "art.example.7z")
    assert main(["check"]) == 0
    assert main(["use", "sample"]) == 0
    assert [path.name for path in sorted(Path("data/raw").iterdir())] == ["mine.example.7z"]
    assert Path("data/raw/mine.example.7z").read_text() == "mine"
    assert links("data/base") == {}


@pytest.mark.parametrize(
    ("key", "folder"),
    [
        ("model.base", "data/base"),
        ("reward.base", "data/reward_base"),
        ("reward.judge_base", "data/judge_base"),
    ],
)
def test_base_model_from_a_folder(project, model, key, folder):
    section, name = key.split(".")
    assert main(["use", "sample", f"{key}={model}"]) == 0
    assert getattr(getattr(read(), section), name) == folder
    wanted = ("config.json", "model.safetensors", "tokenizer.json")  # no pickles, no code
    assert links(folder) == {name: str(model / name) for name in wanted}
    assert main(["use", "sample", f"{key}={folder}", "seed=3"]) == 0
    assert links(folder) == {name: str(model / name) for name in wanted}
    assert main(["use", "sample", f"{key}=org/name"]) == 0
    assert (getattr(getattr(read(), section), name), links(folder)) == ("org/name", {})


def test_two_base_models(project, model):
    assert main(["use", "sample", f"model.base={model}", f"reward.base={model}"]) == 0
    assert links("data/base") == links("data/reward_base") != {}
    (model / "model.safetensors").unlink()
    assert main(["use", "sample", "model.base=org/name", "reward.base=org/name"]) == 0


@pytest.mark.parametrize("written", ["data/base", "./data/base/"])
def test_a_shard_that_is_not_here_stays_recorded(project, model, written):
    (model / "model-2.safetensors").write_text("another part")
    assert main(["use", "sample", f"model.base={model}"]) == 0
    record = Path("data/base.json").read_text()
    for name in ("model-2.safetensors", "config.json", "model.safetensors"):
        Path("data/base", name).unlink()
        assert main(["use", "sample", f"model.base={written}", "seed=3"]) == 0
        assert Path("data/base.json").read_text() == record


def test_what_dvc_has_is_told_when_it_is_of_earlier_files(project, dumps, capsys):
    first, second = (f"data.source={dumps}/{name}" for name in ("art.example.7z", "so.example-Posts.7z"))
    assert main(["use", "stack_exchange", first]) == 0
    Path("data/raw.dvc").write_text("outs: []")
    capsys.readouterr()
    assert main(["use", "stack_exchange", first]) == 0
    assert "raw.dvc" not in capsys.readouterr().out
    assert main(["use", "stack_exchange", second]) == 0
    assert (
        "data/raw.dvc still has the earlier ones: `dvc add --no-relink data/raw`" in capsys.readouterr().out
    )


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "usage: python -m params use <preset>"),
        (["use"], "usage: "),
        (["chek"], "usage: "),
        (["use", "sampel"], "no preset 'sampel'; there are adapters, sample, stack_exchange"),
        (["use", "../sample"], "no preset '../sample'"),
        (["use", "sample", "seed"], "'seed' is no setting; write key=value"),
        (["use", "sample", "seed=1\n2"], "seed: a line break is in the value"),
        (["use", "sample", "data.source=~nobody-here/a.7z"], "~nobody-here/a.7z does not exist"),
        (["use", "sample", "model.base=~nobody-here/a"], "~nobody-here/a does not exist"),
        (["use", "sample", "ppo.lamb=1"], "ppo.lamb: no such key; did you mean ppo.lam?"),
        (["use", "sample", "ppo.batch_size=100", "ppo.mini_batch_size=64"], "must be a multiple of"),
        (["use", "sample", "seed=1", "seed.x=1"], "seed.x: seed is a value, not a section"),
        (["use", "sample", "data.source=gone.7z"], "data.source: gone.7z does not exist"),
        (["use", "sample", "data.source=dvc.yaml"], "data.source: dvc.yaml is of no known type"),
        (["use", "sample", "data.source=data"], "data.source: folder data holds no dump"),
        (["use", "sample", "data.source=,"], "data.source is empty"),
        (["use", "stack_exchange"], "data.source is empty; name dump files: data.source=<path>"),
        (["use", "sample", "data.eval_sites=a,,b"], "data.eval_sites: a blank names no site"),
        (["use", "sample", "data.eval_sites=[a"], "data.eval_sites holds out [a, but"),
        (["use", "sample", "data.eval_sites=[a: b]"], "data.eval_sites: '[a: b]' is no list of names"),
        (["use", "sample", "model.base=./gone"], "model.base: folder ./gone does not exist"),
        (["use", "sample", "model.base=data"], "model.base: data has no weights (*.safetensors)"),
        (["use", "sample", "model.base=bare"], "model.base: bare has no config.json"),
        (["use", "sample", "reward.base=./gone"], "reward.base: folder ./gone does not exist"),
        (["use", "sample", "reward.base=bare"], "reward.base: bare has no config.json"),
        (["use", "sample", "data.source=x/Posts.xml,y/x/Posts.xml"], "would both be data/raw/x.Posts.xml"),
        (["use", "sample", "data.source=other/taken.7z"], "data/raw/taken.7z is a file of your own"),
    ],
)
def test_a_mistake_is_one_line_and_changes_nothing(project, dumps, model, capsys, arguments, message):
    own = ("x/Posts.xml", "y/x/Posts.xml", "bare/model.safetensors", "other/taken.7z", "data/raw/taken.7z")
    for name in own:
        Path(name).parent.mkdir(parents=True, exist_ok=True)
        Path(name).write_text(name)
    assert main(["use", "stack_exchange", f"data.source={dumps}", f"model.base={model}"]) == 0
    before = state()
    capsys.readouterr()
    assert main(arguments) == 1
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("error: ")
    assert message in err
    assert err.count("\n") == 1
    assert state() == before


def test_outside_of_a_repository(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main(["use", "sample"]) == 1
    assert "run this in the repository's folder" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_check_looks_at_the_files(project, dumps, model, capsys):
    """What is recorded and not here is told; another file than the recorded one is refused."""
    assert main(["use", "stack_exchange", f"data.source={dumps}", f"model.base={model}"]) == 0
    (dumps / "art.example.7z").unlink()
    (model / "model.safetensors").unlink()
    capsys.readouterr()
    assert main(["check"]) == 0
    told = capsys.readouterr().out
    assert told.startswith(
        "params.yaml: ok; data.source: data/raw/art.example.7z is not on this machine (recorded: "
    )
    assert (
        "; model.base: data/base/model.safetensors is not on this machine" in told and told.count("\n") == 1
    )
    (dumps / "art.example.7z").write_text("another")
    (model / "model.safetensors").write_text("model.safetensors")
    assert main(["check"]) == 1
    another = "data.source: data/raw/art.example.7z is not the file that data/raw.json records"
    assert another in capsys.readouterr().err
    assert main(["record"]) == 0
    assert capsys.readouterr().out == "data/raw.json: written\n"
    assert (main(["check"]), capsys.readouterr().out) == (0, "params.yaml: ok\n")
    assert (main(["record"]), capsys.readouterr().out) == (0, "every file is as recorded\n")


def test_of_a_key_given_twice_the_last_counts_and_that_is_said(project, capsys):
    assert main(["use", "sample", "seed=1", "seed=2"]) == 0
    assert "of keys given twice the last counts (seed=1: passed over)" in capsys.readouterr().out
    assert read().seed == 2


def test_every_file_is_recorded_as_dvc_would(project, dumps, model):
    assert main(["use", "stack_exchange", f"data.source={dumps}", f"reward.base={model}"]) == 0
    for folder, files in (("raw", 4), ("reward_base", 3), ("base", 0)):
        record = json.loads(Path(f"data/{folder}.json").read_text())
        assert len(record) == files
        for name, found in record.items():
            content = Path("data", folder, name).read_bytes()
            assert found == {"md5": hashlib.md5(content).hexdigest(), "size": len(content)}
    assert main(["use", "sample"]) == 0
    assert [Path(f"data/{name}.json").read_text() for name in ("raw", "base", "reward_base")] == ["{}\n"] * 3


def test_a_clone_without_the_files_keeps_what_is_recorded(project, dumps, model, capsys):
    """The line at the top of params.yaml can be typed there, with other numbers; the files may come later."""
    assert main(["use", "stack_exchange", f"data.source={dumps}", f"model.base={model}"]) == 0
    records = {name: Path(f"data/{name}.json").read_text() for name in ("raw", "base")}
    typed = typed_before()
    for folder in ("raw", "base"):
        shutil.rmtree(f"data/{folder}")
    assert main([*typed, "ppo.updates=7"]) == 0
    assert read().ppo.updates == 7
    assert {name: Path(f"data/{name}.json").read_text() for name in ("raw", "base")} == records
    assert main(["use", "stack_exchange", "data.source=art.example.7z"]) == 0
    assert list(json.loads(Path("data/raw.json").read_text())) == ["art.example.7z"]
    assert main(["use", "stack_exchange", f"data.source={dumps / 'art.example.7z'}"]) == 0
    assert links("data/raw") == {"art.example.7z": str(dumps / "art.example.7z")}


@pytest.mark.parametrize(
    ("file", "value", "name"),
    [
        ("a,b.7z", "{folder}/a,b.7z", "a,b.7z"),
        ("a, b.7z", "[ '{folder}/a, b.7z', {folder}/art.example.7z ]", "a, b.7z"),
        ("a b.Posts.xml", "{folder}/a b.Posts.xml", "a b.Posts.xml"),
        ("größe-日本.jsonl", "{folder}/größe-日本.jsonl,{folder}/art.example.7z", "größe-日本.jsonl"),
        ("caf\udce9.7z", "{folder}/caf\udce9.7z", "caf%E9.7z"),
        ("caf\udce9.7z", "{folder}", "caf%E9.7z"),
        ("[a].7z", "{folder}/[a].7z", "[a].7z"),
        ("~a.7z", "{folder}/~a.7z", "~a.7z"),
        ("'q\"$(x)#: .7z", "{folder}/'q\"$(x)#: .7z", "'q\"$(x)#: .7z"),
    ],
)
def test_names_of_any_kind(project, dumps, file, value, name):
    """Commas, blanks, other alphabets, bytes that are no text: linked by a name that YAML and git carry."""
    (dumps / file).write_text("a dump")
    assert main(["use", "stack_exchange", f"data.source={value.format(folder=dumps)}"]) == 0
    assert name in read().data.source and os.path.samefile(Path("data/raw", name), dumps / file)
    assert main(["check"]) == 0
    typed = typed_before()
    before = state()
    assert (main(typed), state()) == (0, before)


@pytest.mark.parametrize("call", ["os.fsync", "os.replace", "os.symlink"])
def test_nothing_changes_when_the_disk_is_full(project, dumps, monkeypatch, call):
    assert main(["use", "stack_exchange", f"data.source={dumps / 'art.example.7z'}"]) == 0
    before = state()
    real = getattr(os, call.partition(".")[2])
    calls = []

    def fail_once(*arguments):
        calls.append(arguments)
        if len(calls) == 1:
            raise OSError(28, "No space left on device")
        return real(*arguments)

    monkeypatch.setattr(call, fail_once)
    monkeypatch.setattr("params.inputs.measure", lambda path, home: Recorded("0" * 32, path.stat().st_size))
    assert main(["use", "stack_exchange", f"data.source={dumps}", "seed=1"]) == 1
    assert calls and state() == before


def test_as_a_command(project):
    def run(*arguments: str) -> tuple[int, str]:
        command = [sys.executable, "-m", "params", *arguments]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        return done.returncode, done.stdout + done.stderr

    assert run("use", "sample") == (0, "params.yaml: preset sample\n")
    assert run("check") == (0, "params.yaml: ok\n")
    Path("params.yaml").write_text("sede: 1\n")
    assert run("check") == (1, "error: params.yaml: sede: no such key; did you mean seed?\n")

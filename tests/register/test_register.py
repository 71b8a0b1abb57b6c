import hashlib
import json
import os
import shutil
import sqlite3
import subprocess
import sys
from pathlib import Path

import mlflow
import pytest
import yaml
from made_models import DATA, NAMES, judged, registry, write_lock

from params.schema import Params
from tasks.register import IDENTITY, folder_md5, holdings, main, models, promote, run, standing
from tasks.run import tracking
from tasks.run.layout import Layout


def verdict_of(layout, name="stackrl-policy", version="1"):
    tags = tracking.connect(layout).get_model_version(name, version).tags
    return {key: text for key, text in tags.items() if key.startswith("champion")}


def test_registering_twice_leaves_one_version_of_each(layout):
    judged(layout)
    assert standing(Params(), layout) is None
    result = run(Params(), layout)
    first = layout.artifact("register", "registered.json").read_text()
    assert json.loads(first) == {n: m * 16 + ".dir" for n, m in zip(NAMES, ("5f", "4e", "90"), strict=True)}
    assert result.metrics == {"models": 3.0, "champion": 1.0}
    again = standing(Params(), layout)
    assert again.metrics == result.metrics and again.note.endswith("up to date") and not result.note
    run(Params(), layout)
    versions, aliases = registry(layout)
    assert versions == {name: {1: md5} for name, md5 in json.loads(first).items()}
    assert aliases == {name: {"candidate": 1, "champion": 1} for name in NAMES}
    assert layout.artifact("register", "registered.json").read_text() == first
    assert "MLFLOW_TRACKING_URI" not in os.environ


def test_new_weights_are_a_second_version_and_the_champion_stays(layout):
    judged(layout)
    run(Params(), layout)
    write_lock(layout.root, ppo="91")
    run(Params(), layout)
    versions, aliases = registry(layout)
    assert versions["stackrl-policy"] == {1: "90" * 16 + ".dir", 2: "91" * 16 + ".dir"}
    assert aliases["stackrl-policy"] == {"candidate": 2, "champion": 1}
    assert aliases["stackrl-sft"] == aliases["stackrl-reward"] == {"candidate": 1, "champion": 1}
    write_lock(layout.root, ppo="90")
    run(Params(), layout)  # back to the first: no third version
    versions, aliases = registry(layout)
    assert list(versions["stackrl-policy"]) == [2, 1]
    assert aliases["stackrl-policy"] == {"candidate": 1, "champion": 1}


@pytest.mark.parametrize("is_known", [True, False])
def test_a_policy_that_is_not_worthy_is_no_champion_until_promoted(layout, is_known, capsys):
    if is_known:
        judged(layout, "the monitor found kl_nats", "no judge")
    assert run(Params(), layout).metrics["champion"] == 0.0
    assert registry(layout)[1] == {name: {"candidate": 1} for name in NAMES}
    reasons = "the monitor found kl_nats; no judge" if is_known else "policy_eval has given no verdict"
    assert verdict_of(layout) == {"champion": "no", "champion_reasons": reasons}
    assert main(["promote", "stackrl-policy", "1"]) == 0
    assert registry(layout)[1]["stackrl-policy"] == {"candidate": 1, "champion": 1}
    assert main(["promote", "stackrl-policy", "9"]) == 1
    assert "stackrl-policy 9" in capsys.readouterr().err.splitlines()[-1]
    with pytest.raises(ValueError, match="nobody 1"):
        promote(layout, "nobody", "1")


def test_a_version_says_what_it_was_made_from(layout):
    judged(layout)
    author = ["-c", "user.name=n", "-c", "user.email=e"]
    for words in (["init", "-q"], [*author, "commit", "-qm", "x", "--allow-empty"]):
        subprocess.run(["git", *words], check=True)
    run(Params(), layout)
    client = tracking.connect(layout)
    version = client.get_model_version_by_alias("stackrl-policy", "candidate")
    tags = version.tags
    assert tags[IDENTITY] == "90" * 16 + ".dir" and len(tags["mlflow.source.git.commit"]) == 40
    assert tags["stackrl.git.dirty"] == "true"  # params.yaml is not committed
    assert {f"dvc.{path}": md5 for path, md5 in DATA.items()}.items() <= tags.items()
    assert (
        tags["params.ppo.init_kl_coef"] == str(Params().ppo.init_kl_coef) and tags["params.model.base"] == ""
    )
    assert tags["reward_eval.accuracy"] == "0.85" and tags["policy_eval.win_rate_low"] == "0.6"
    assert "Question: " in version.description
    names = {item.path for item in client.list_artifacts(version.run_id)}
    assert {"params.yaml", "dvc.yaml", "dvc.lock"} <= names
    made_by = client.get_run(version.run_id)
    assert made_by.info.status == "FINISHED" and made_by.data.tags["stackrl.stage"] == "register"
    inputs = {one.dataset.name: one.dataset.digest for one in made_by.inputs.dataset_inputs}
    assert inputs == {Path(path).name: md5 for path, md5 in DATA.items()}


def test_another_verdict_on_the_same_weights_is_told_and_moves_no_alias(registered, caplog):
    """The tags follow policy_eval; a champion stays one until somebody moves it, with a warning."""
    assert verdict_of(registered) == {
        "champion": "yes", "champion_reasons": "the monitor found nothing; right",
    }  # fmt: skip
    assert verdict_of(registered, "stackrl-sft") == {}, "the verdict is the policy's"
    judged(registered, "the monitor found tokens")
    assert standing(Params(), registered) is None
    assert run(Params(), registered).metrics["champion"] == 0.0
    assert verdict_of(registered) == {"champion": "no", "champion_reasons": "the monitor found tokens"}
    assert registry(registered)[1] == {name: {"candidate": 1, "champion": 1} for name in NAMES}
    assert "stackrl-policy@champion stays version 1 by hand alone: the monitor found tokens" in caplog.text
    assert [list(each) for each in registry(registered)[0].values()] == [[1]] * 3
    assert standing(Params(), registered)


def test_a_card_that_is_no_json_is_one_line(registered):
    registered.artifact("policy_eval", "card.json").write_text("{")
    with pytest.raises(ValueError, match=r"policy_eval/card\.json: .*`dvc repro policy_eval`"):
        standing(Params(), registered)


def weights(layout):
    return sorted(layout.home.glob("mlartifacts/models/*/artifacts/model/model.safetensors"))


def lose_rows(layout):
    """A version, an alias, and an upload that came to no end."""
    client = tracking.connect(layout)
    client.delete_model_version("stackrl-reward", "1")
    client.delete_registered_model_alias("stackrl-sft", "candidate")
    with sqlite3.connect(layout.home / "mlflow.db") as file:
        file.execute("update model_versions set status = 'FAILED_REGISTRATION' where name = 'stackrl-policy'")


def lose_model(layout):
    tracking.connect(layout).delete_registered_model("stackrl-reward")


def lose_files(layout):
    """Two are removed, one is cut."""
    first, *others = weights(layout)
    first.write_bytes(first.read_bytes()[:-1])
    for file in others:
        file.unlink()


@pytest.mark.parametrize(
    ("lose", "anew"),
    [
        (lose_rows, {"reward", "policy"}),
        (lose_model, {"reward"}),
        (lose_files, {"sft", "reward", "policy"}),
    ],
)
def test_what_the_registry_lost_is_registered_anew(registered, lose, anew):
    before = set(weights(registered))
    lose(registered)
    assert standing(Params(), registered) is None
    run(Params(), registered)
    assert standing(Params(), registered)
    client, models_anew = tracking.connect(registered), set(weights(registered)) - before
    for name in NAMES:
        aliases = registry(registered)[1][name]
        assert aliases["candidate"] == aliases["champion"]
        version = client.get_model_version_by_alias(name, "candidate")
        place = holdings.local_folder(client.get_model_version_download_uri(name, version.version))
        assert (place / "model/model.safetensors" in models_anew) == (name.removeprefix("stackrl-") in anew)
        assert mlflow.pyfunc.load_model(str(place))


def test_a_deleted_experiment_is_restored_although_the_models_are_there(registered):
    client = tracking.connect(registered)
    client.delete_experiment(tracking.experiment(client, registered))
    assert standing(Params(), registered) is None
    run(Params(), registered)
    assert standing(Params(), registered)
    assert [list(each) for each in registry(registered)[0].values()] == [[1]] * 3


def test_both_ways_to_look_see_the_same(registered):
    write_lock(registered.root, ppo="91")
    run(Params(), registered)
    tracking.connect(registered).delete_model_version("stackrl-policy", "1")
    client, names = tracking.connect(registered), (*NAMES, "stackrl-nobody")
    found = holdings.in_file(registered.home / "mlflow.db", names)
    assert found == holdings.by_client(client, names)
    assert [len(found[name].versions) for name in names] == [1, 1, 1, 0]
    assert all(one.is_whole(client) for name in names for one in found[name].versions)


def test_looking_needs_neither_mlflow_nor_models(registered):
    """A second; importing MLflow alone takes two. And a folder that was not pulled is not needed."""
    for kind in ("sft", "reward", "ppo"):
        shutil.rmtree(registered.artifact(kind, "model"))
    code = (
        "import sys\nfor name in ('mlflow', 'torch', 'transformers'): sys.modules[name] = None\n"
        "from tasks.__main__ import main\nsys.exit(main(['register']))"
    )
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
    assert done.stdout == (
        "stackrl: register: models 3, champion 1; all registered before, up to date\n"
    ), done.stderr
    lose_files(registered)
    with pytest.raises(ValueError, match=r"artifacts/sft/model holds no model; `dvc pull` .*`dvc repro sft`"):
        run(Params(), registered)


def test_an_experiment_registers_and_takes_no_alias(layout, monkeypatch):
    judged(layout)
    monkeypatch.setenv("DVC_EXP_NAME", "leafy-moss")
    run(Params(), layout)
    assert registry(layout)[1] == {name: {} for name in NAMES} and standing(Params(), layout)
    version = tracking.connect(layout).get_model_version("stackrl-policy", "1")
    assert version.tags["dvc.exp"] == "leafy-moss"
    monkeypatch.delenv("DVC_EXP_NAME")
    assert standing(Params(), layout) is None  # applied and run plainly, the models are candidates
    run(Params(), layout)
    assert registry(layout)[1] == {name: {"candidate": 1, "champion": 1} for name in NAMES}


def test_other_numbers_are_another_version_of_the_same_weights(registered):
    colder = Params.model_validate({"ppo": {"temperature": 0.7}})
    assert standing(colder, registered) is None
    run(colder, registered)
    versions, aliases = registry(registered)
    assert list(versions["stackrl-policy"]) == [2, 1] and list(versions["stackrl-reward"]) == [1]
    assert aliases["stackrl-policy"] == {"candidate": 2, "champion": 1}


def test_an_alias_whose_files_are_gone_is_named_and_nothing_is_said_to_be_well(registered):
    """The champion's weights are not this run's: they cannot be logged anew."""
    lose_files(registered)
    write_lock(registered.root, ppo="91")
    line = r"stackrl-policy@champion is version 1, whose files are gone.*promote stackrl-policy 2"
    for _ in range(2):
        assert standing(Params(), registered) is None
        with pytest.raises(ValueError, match=line):
            run(Params(), registered)
    assert registry(registered)[1]["stackrl-policy"] == {"candidate": 2, "champion": 1}
    with pytest.raises(ValueError, match="files are gone"):
        promote(registered, "stackrl-policy", "1")
    promote(registered, "stackrl-policy", "2")
    assert standing(Params(), registered)


@pytest.mark.parametrize("is_copied", [False, True], ids=["moved", "copied"])
def test_a_folder_elsewhere_has_its_models_there(registered, tmp_path, monkeypatch, is_copied):
    before = sorted(registered.root.rglob("*"))
    new = tmp_path / "a b" / "c"
    new.parent.mkdir()
    (shutil.copytree if is_copied else shutil.move)(registered.root, new)
    monkeypatch.chdir(new)
    layout = Layout.here()
    assert standing(Params(), layout) is None
    run(Params(), layout)
    assert standing(Params(), layout) and [list(each) for each in registry(layout)[0].values()] == [[1]] * 3
    client = tracking.connect(layout)
    for name in NAMES:
        place = client.get_model_version_download_uri(name, "1")
        assert place.startswith(new.as_uri()) and "MLmodel" in holdings.sizes(place)
    with tracking.stage_run("register", {}, layout):
        assert client.get_run(tracking.active_run()).info.artifact_uri.startswith(new.as_uri())
    assert registered.root.exists() == is_copied
    if is_copied:
        assert sorted(registered.root.rglob("*")) == before
        shutil.rmtree(new / "mlartifacts")  # copied without them: logged anew
        run(Params(), layout)
        assert registry(layout)[1] == {name: {"candidate": 2, "champion": 2} for name in NAMES}


def test_what_the_environment_says_of_other_runs_changes_nothing(layout, monkeypatch):
    monkeypatch.setenv("MLFLOW_RUN_ID", "0" * 32)
    monkeypatch.setenv("MLFLOW_EXPERIMENT_ID", "77")
    run(Params(), layout)
    assert standing(Params(), layout) and os.environ["MLFLOW_RUN_ID"] == "0" * 32


def test_a_failure_in_the_middle_is_mended_by_the_next_run(layout, monkeypatch):
    calls, log = [], models.register

    def fail_at_the_second(*arguments):
        calls.append(arguments)
        if len(calls) == 2:
            raise OSError("killed")
        log(*arguments)

    with monkeypatch.context() as patch, pytest.raises(OSError, match="killed"):
        patch.setattr(models, "register", fail_at_the_second)
        run(Params(), layout)
    assert not layout.artifact("register", "registered.json").exists()
    run(Params(), layout)
    assert [list(versions) for versions in registry(layout)[0].values()] == [[1], [1], [1]]


def test_a_missing_model_is_named(layout):
    (layout.artifact("ppo", "model") / "config.json").unlink()
    with pytest.raises(ValueError, match="artifacts/ppo/model holds no model; `dvc pull`"):
        run(Params(), layout)


def test_outside_dvc_the_folder_has_the_md5_that_dvc_would_give_it(layout):
    for name, text in {"b.txt": "b\n", "a/c.txt": "c\n", "a.txt": ""}.items():
        (layout.root / "folder" / name).parent.mkdir(parents=True, exist_ok=True)
        (layout.root / "folder" / name).write_text(text)
    subprocess.run(["git", "init", "-q"], check=True)
    for words in (["init", "-q"], ["add", "-q", "folder"]):
        subprocess.run([sys.executable, "-m", "dvc", *words], check=True)
    expected = yaml.safe_load((layout.root / "folder.dvc").read_text())["outs"][0]["md5"]
    assert folder_md5(layout.root / "folder") == expected
    (layout.root / "dvc.lock").unlink()
    run(Params(), layout)
    found = json.loads(layout.artifact("register", "registered.json").read_text())
    assert found["stackrl-sft"] == folder_md5(layout.artifact("sft", "model"))
    assert len({hashlib.md5(md5.encode()).hexdigest() for md5 in found.values()}) == 3

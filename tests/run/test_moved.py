"""MLflow's file of a folder that was moved or copied."""

import shutil
import sqlite3

import pytest

from tasks.run import moved, tracking
from tasks.run.layout import Layout


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A store with one run, at its first place."""
    home = tmp_path_factory.mktemp("first") / "home"
    layout = Layout(home, home)
    client = tracking.connect(layout)
    client.create_run(tracking.experiment(client, layout))
    return home


def places(home):
    client = tracking.connect(Layout(home, home))
    found = client.get_experiment_by_name(tracking.EXPERIMENT)
    (run,) = client.search_runs([found.experiment_id])
    return found.artifact_location, run.info.artifact_uri


@pytest.fixture
def home(made, tmp_path, monkeypatch):
    """The same, copied to another place."""
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    return shutil.copytree(made, tmp_path / "another home")


def test_a_copy_names_itself_and_the_original_stays(made, home, caplog):
    before = (made / "mlflow.db").read_bytes()
    assert moved.old_places(home / "mlflow.db", home) == [f"{made.as_uri()}/mlartifacts"]
    experiment, run = places(home)
    assert experiment == f"{home.as_uri()}/mlartifacts" and run.startswith(f"{experiment}/")
    assert "this folder stood at" in caplog.text and made.as_uri() in caplog.text
    assert moved.follow(home / "mlflow.db", home) == [] and places(made)[0].startswith(made.as_uri())
    assert (made / "mlflow.db").read_bytes() == before


def test_a_name_that_only_begins_alike_is_another_folder(home):
    old = f"{home.parent.as_uri()}/gone/mlartifacts"
    with sqlite3.connect(home / "mlflow.db") as file:
        file.execute("update experiments set artifact_location = ? where name = 'stackrl'", (old,))
        file.execute("update runs set artifact_uri = ?", (f"{old}-2/x",))
    assert moved.follow(home / "mlflow.db", home) == [old]
    assert places(home)[1] == f"{old}-2/x"


@pytest.mark.parametrize("place", ["s3://bucket/mlartifacts", "/somewhere/chosen", "mlflow-artifacts:/1"])
def test_a_place_that_somebody_chose_is_left_alone(home, place):
    with sqlite3.connect(home / "mlflow.db") as file:
        file.execute("update experiments set artifact_location = ?", (place,))
    assert moved.follow(home / "mlflow.db", home) == []


def test_a_shared_folder_of_artifacts_is_left_alone(home, tmp_path):
    """It is there, and no store beside it: nobody moved anything."""
    chosen = tmp_path / "disk" / "mlartifacts"
    chosen.mkdir(parents=True)
    with sqlite3.connect(home / "mlflow.db") as file:
        file.execute("update experiments set artifact_location = ?", (chosen.as_uri(),))
    assert moved.follow(home / "mlflow.db", home) == []


def test_no_store_and_no_database_are_mlflows_to_tell(tmp_path):
    assert moved.follow(tmp_path / "mlflow.db", tmp_path) == []
    (tmp_path / "mlflow.db").write_text("not a database")
    assert moved.follow(tmp_path / "mlflow.db", tmp_path) == []

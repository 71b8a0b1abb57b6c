"""The story's calls are dvc.yaml's graph; what a person types is checked; and it runs."""

from __future__ import annotations

import importlib

import cloudpickle
import pytest
import yaml
from dvc.repo import Repo
from pydantic import ValidationError
from toy import REPOSITORY

from flows import graph, rlhf, road, steps
from flows.road import Options
from tasks.run.layout import STAGES


class Recorder:
    """Stands in for the road: a handle is the stage's name."""

    verdict = None

    def __init__(self, options: Options) -> None:
        self.edges: dict[str, set[str]] = {}
        Recorder.last = self

    def __enter__(self):
        return self

    def __exit__(self, *error) -> None:
        pass

    def __call__(self, stage: str, *after: str) -> str:
        assert stage not in self.edges and set(after) <= set(self.edges), "called before what it waits for"
        self.edges[stage] = set(after)
        return stage


@pytest.fixture(scope="module")
def real() -> dict[str, set[str]]:
    """The edges as DVC itself sees them."""
    with Repo(str(REPOSITORY)) as repo:
        edges = repo.index.graph
        return {stage.addressing: {one.addressing for one in edges.successors(stage)} for stage in edges}


def test_the_calls_and_edges_are_those_of_the_graph(monkeypatch, real):
    monkeypatch.setattr(rlhf, "Road", Recorder)
    rlhf.rlhf.fn()
    assert Recorder.last.edges == real and list(real) and tuple(Recorder.last.edges) == STAGES


def test_our_reading_of_the_graph_is_dvcs(real):
    assert graph.upstream(yaml.safe_load((REPOSITORY / "dvc.yaml").read_text())["stages"]) == real


def test_a_file_inside_an_out_and_a_folder_of_outs_are_edges():
    stages = {
        "a": {"outs": ["x/one", {"x/two": {"cache": False}}]},
        "b": {"deps": ["x/one/part.txt"], "metrics": [{"m.json": {"cache": False}}]},
        "c": {"deps": ["x", "m.json"]},
        "d": {"deps": ["x/oneness"]},
    }
    assert graph.upstream(stages) == {"a": set(), "b": {"a"}, "c": {"a", "b"}, "d": set()}


def test_a_target_needs_what_is_before_it_and_nothing_else(real):
    assert graph.needed(real, "reward") == {"data", "pack", "sft", "reward"}
    assert graph.needed(real, "register") == set(STAGES)


def test_the_form_refuses_what_cannot_be():
    assert Options().target == "register"
    for bad in ({"target": "pop"}, {"overrides": ["seed=1"]}, {"force": "perhaps"}):
        with pytest.raises(ValidationError):
            Options(**bad)


def test_the_flow_can_be_served():
    """Serving pickles the flow's module by value (no locks) and resolves its annotations (no strings)."""
    cloudpickle.register_pickle_by_value(rlhf)
    try:
        assert cloudpickle.dumps(rlhf.rlhf)
    finally:
        cloudpickle.unregister_pickle_by_value(rlhf)
    assert not any("annotations" in vars(module) for module in (rlhf, road, steps))


def test_overrides_without_a_preset_are_one_line(capsys):
    assert rlhf.main(["seed=1"]) == 1
    assert "need a preset" in capsys.readouterr().err


def test_prefects_server_can_be_imported():
    """A newer fastapi breaks exactly this, while everything else looks well."""
    assert importlib.import_module("prefect.server.api.server").create_app


def test_a_flow_runs_its_stages_and_says_so(served, server):
    done = served.run("flows.rlhf", "--target", "pack")
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.splitlines()[-1] == "stackrl: rlhf: data Ran, pack Ran"
    run = server.flow_runs()[0]
    assert run["state_type"] == "COMPLETED"
    server.expect(run["id"], data="Ran", pack="Ran")
    logs = server.ask("/logs/filter", {"logs": {"flow_run_id": {"any_": [run["id"]]}}, "limit": 200})
    assert any(log["message"] == "stackrl: pack: accuracy 0.75" for log in logs)
    assert not any("git add" in log["message"] for log in logs)
    tables = server.ask("/artifacts/filter", {"artifacts": {"flow_run_id": {"any_": [run["id"]]}}})
    assert any(table["key"] == "pack-metrics" and "| accuracy | 0.75 |" in table["data"] for table in tables)


def test_a_wrong_preset_is_one_line_and_runs_nothing(served):
    before = (served.root / "params.yaml").read_text()
    done = served.run("flows.rlhf", "--preset", "sampel")
    assert done.returncode == 1 and "Traceback" not in done.stderr
    assert "sampel" in done.stderr.splitlines()[-1]
    assert served.attempts("data") == 0 and (served.root / "params.yaml").read_text() == before

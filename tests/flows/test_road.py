"""The whole road on the toy, with a real server, dvc and processes: what runs again, is retried, and ends."""

from __future__ import annotations

import signal

import pytest
import yaml
from mlflow import MlflowClient
from toy import REPOSITORY, Server, Toy, end_group, is_alive, until

from tasks.run.layout import STAGES

pytestmark = pytest.mark.slow


def last_run(server: Server) -> dict:
    return server.flow_runs()[0]


def test_only_what_changed_runs_again_and_what_was_is_restored(served, server):
    assert served.run("flows.rlhf").returncode == 0
    server.expect(last_run(server)["id"], **dict.fromkeys(STAGES, "Ran"))
    assert served.run("flows.rlhf").returncode == 0
    server.expect(last_run(server)["id"], **dict.fromkeys(STAGES, "Unchanged"))

    late = ("ppo", "policy_eval", "register")
    served.change("ppo", 2)
    assert served.run("flows.rlhf").returncode == 0
    expected = {stage: "Ran" if stage in late else "Unchanged" for stage in STAGES}
    server.expect(last_run(server)["id"], **expected)
    served.change("ppo", 1)
    assert served.run("flows.rlhf", "--target", "policy_eval").returncode == 0
    del expected["register"]
    server.expect(last_run(server)["id"], **{**expected, "ppo": "Restored", "policy_eval": "Restored"})
    assert served.attempts("ppo") == 2 and served.attempts("sft") == 1

    assert served.run("flows.rlhf", "--target", "data", "--force").returncode == 0
    server.expect(last_run(server)["id"], data="Ran")


def test_a_failure_is_retried_as_meta_says_and_then_ends_the_flow(served, server):
    served.behave("pack", "fail-once a hiccup")
    served.behave("sft", "fail no room for the answer")
    done = served.run("flows.rlhf")
    assert done.returncode == 1
    assert done.stderr.splitlines()[-1] == "stackrl: rlhf: sft: no room for the answer"
    run = last_run(server)
    assert run["state_type"] == "FAILED" and run["state"]["message"] == "sft: no room for the answer"
    server.expect(run["id"], data="Ran", pack="Ran", sft="Failed", **dict.fromkeys(STAGES[3:], "NotReady"))
    assert [served.attempts(stage) for stage in STAGES[:4]] == [1, 2, 2, 0]


def test_a_refusal_is_never_retried(served, server):
    served.behave("pack", "refuse accuracy 0.61 is below 0.8")
    done = served.run("flows.rlhf", "--target", "sft")
    assert done.returncode == 1
    assert "Traceback" not in done.stdout + done.stderr
    assert done.stderr.splitlines()[-1] == "stackrl: rlhf: pack: accuracy 0.61 is below 0.8"
    server.expect(last_run(server)["id"], data="Ran", pack="Refused", sft="NotReady")
    assert served.attempts("pack") == 1
    served.behave("pack", "fail another reason")  # a stale refusal is not believed
    assert "another reason" in served.run("flows.rlhf", "--target", "sft").stderr.splitlines()[-1]


def test_a_stage_that_takes_too_long_is_ended_and_retried(served, server):
    path = served.root / "dvc.yaml"
    pipeline = yaml.safe_load(path.read_text())
    pipeline["stages"]["data"]["meta"]["timeout_minutes"] = 0.05
    path.write_text(yaml.safe_dump(pipeline, sort_keys=False))
    served.behave("data", "train")
    done = served.run("flows.rlhf", "--target", "data")
    assert done.returncode == 1 and "limit of 0.05 minutes" in done.stderr.splitlines()[-1]
    assert served.attempts("data") == 2 and not is_alive(served.trainer("data"))


def test_cancelling_ends_the_trainer_and_is_not_retried(served, server):
    served.behave("sft", "train")
    flow = served.start("flows.rlhf")
    trainer = served.trainer("sft", flow)
    run = last_run(server)["id"]
    server.ask(f"/flow_runs/{run}/set_state", {"state": {"type": "CANCELLING", "name": "Cancelling"}})
    until(lambda: not is_alive(trainer), "the trainer to end", served.root / "toy.log")
    assert flow.wait(180) == 1
    assert server.ask(f"/flow_runs/{run}")["state_type"] == "CANCELLED"
    until(lambda: server.stages(run).get("sft") == "Cancelled", "the server to hear of it")
    assert served.attempts("sft") == 1
    assert (served.root / "stopped-sft").exists(), "the trainer had time to save"
    served.behave("sft", "work")
    assert served.run("flows.rlhf", "--target", "sft").returncode == 0
    server.expect(last_run(server)["id"], data="Unchanged", pack="Unchanged", sft="Ran")


@pytest.mark.parametrize(
    ("number", "status"), [(signal.SIGKILL, -9), (signal.SIGINT, 130), (signal.SIGTERM, -15)]
)
def test_a_flow_that_ends_leaves_no_orphan(served, server, number, status):
    served.behave("data", "train")
    flow = served.start("flows.rlhf")
    trainer = served.trainer("data", flow)
    flow.send_signal(number)
    assert flow.wait(180) == status
    until(lambda: not is_alive(trainer), "the trainer to end", served.root / "toy.log")
    assert served.attempts("data") == 1
    served.behave("data", "work")  # a killed dvc holds its files until init has reaped it
    until(lambda: served.run("dvc", "repro", "data").returncode == 0, "dvc to run again")


def test_a_skipped_stage_is_linked_to_the_run_that_made_it(served, server):
    served.behave("data", "record")
    pages, parents = [], []
    for _ in range(2):
        assert served.run("flows.rlhf", "--target", "data").returncode == 0
        run = last_run(server)["id"]
        artifacts = server.ask("/artifacts/filter", {"artifacts": {"flow_run_id": {"any_": [run]}}})
        pages += [one["data"] for one in artifacts if one["key"] == "data-run"]
        client = MlflowClient(f"sqlite:///{served.root / 'mlflow.db'}")
        found = client.search_runs([client.get_experiment_by_name("stackrl").experiment_id])
        (made,) = [one.info.run_id for one in found if one.info.run_name == "data"]
        parent = next(one for one in found if one.data.tags.get("prefect.flow_run_id") == run)
        parents.append(parent)
        assert parent.info.status == "FINISHED" and parent.info.run_name == "rlhf"
    assert len(pages) == 2 and len(set(pages)) == 1 and made in pages[0]
    child = next(one for one in found if one.info.run_id == made)
    assert child.data.tags["mlflow.parentRunId"] == parents[0].info.run_id


def test_of_two_flows_in_a_folder_one_waits_for_the_other(served, server):
    served.behave("data", "wait")
    first = served.start("flows.rlhf", "--target", "pack")
    until(lambda: served.attempts("data") == 1, "the first flow", served.root / "toy.log")
    second = served.start("flows.rlhf", "--target", "pack")
    waits = f"waits for process {first.pid} ("
    until(lambda: waits in (served.root / "toy.log").read_text(), "the second flow", served.root / "toy.log")
    (served.root / "go-data").touch()
    assert (first.wait(120), second.wait(120)) == (0, 0)
    assert [served.attempts(stage) for stage in ("data", "pack")] == [1, 1]
    server.expect(last_run(server)["id"], data="Unchanged", pack="Unchanged")


def test_a_flow_beside_a_repro_waits_for_it(served, server):
    served.behave("data", "wait")
    other = served.start("dvc", "repro", "data")
    log = served.root / "toy.log"
    until(lambda: served.attempts("data") == 1, "dvc", log)
    flow = served.start("flows.rlhf", "--target", "data")
    until(lambda: f"stackrl: data: waits for process {other.pid} (" in log.read_text(), "the flow", log)
    (served.root / "go-data").touch()
    assert (other.wait(120), flow.wait(120)) == (0, 0) and served.attempts("data") == 1
    assert "manually remove" not in log.read_text()
    server.expect(last_run(server)["id"], data="Unchanged")


def test_what_a_killed_dvc_left_is_mended_and_said(served):
    lock = served.root / ".dvc" / "tmp" / "rwlock"
    lock.write_text("")
    done = served.run("flows.rlhf", "--target", "data")
    assert done.returncode == 0 and "rwlock: unreadable, removed" in done.stdout + done.stderr
    (served.root / "dvc.lock").write_text("")
    done = served.run("flows.rlhf", "--target", "data")
    assert done.returncode == 1 and "Traceback" not in done.stderr
    assert "dvc.lock is damaged" in done.stderr.splitlines()[-1]


def test_kill_9_leaves_no_orphan_where_no_shell_is_set(served):
    """As under cron or systemd: dvc then takes /bin/sh, which may stand between dvc and the trainer."""
    served.environment.pop("SHELL", None)
    served.behave("data", "train")
    flow = served.start("flows.rlhf")
    trainer = served.trainer("data", flow)
    flow.kill()
    flow.wait()
    until(lambda: not is_alive(trainer), "the trainer to end", served.root / "toy.log")


def test_what_fails_leaves_the_lock_and_dvc_brings_the_earlier_result_back(toy):
    assert toy.run("dvc", "repro", "pack").returncode == 0
    lock, out = toy.root / "dvc.lock", toy.root / "artifacts" / "data" / "out.txt"
    before = lock.read_bytes(), out.read_bytes()
    toy.change("data", 2)
    toy.behave("data", "fail row 3 is no row")
    assert toy.run("dvc", "repro", "pack").returncode != 0
    assert lock.read_bytes() == before[0] and not out.exists() and toy.attempts("pack") == 1
    assert toy.run("dvc", "checkout", "data").returncode == 0
    assert out.read_bytes() == before[1]


def test_a_flow_needs_no_server_to_be_started(toy):
    done = toy.run("flows.rlhf", "--target", "data")
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == "stackrl: rlhf: data Ran"


@pytest.fixture
def deployed(served: Toy, server: Server) -> str:
    """The repository's own prefect.yaml, deployed from the toy; the deployment's id."""
    for name in ("flows", "prefect.yaml"):
        (served.root / name).symlink_to(REPOSITORY / name)
    served.run("prefect", "work-pool", "create", "local", "--type", "process")
    done = served.run("prefect", "--no-prompt", "deploy", "--all")
    assert done.returncode == 0, done.stdout + done.stderr
    return server.ask("/deployments/name/rlhf/nightly")["id"]


def test_a_deployment_is_picked_up_scheduled_and_cancelled(served, server, deployed):
    deployment = server.ask(f"/deployments/{deployed}")
    assert [schedule["active"] for schedule in deployment["schedules"]] == [False]
    assert deployment["global_concurrency_limit"]["limit"] == 1
    form = deployment["parameter_openapi_schema"]["definitions"]["Options"]["properties"]
    assert tuple(form["target"]["enum"]) == STAGES and form["force"]["type"] == "boolean"

    soon = [{"schedule": {"interval": 3600}, "active": True}]
    server.ask(f"/deployments/{deployed}/schedules", soon)
    mine = {"deployments": {"id": {"any_": [deployed]}}}
    until(lambda: server.flow_runs(**mine), "the scheduler to insert a run")
    assert {run["state_name"] for run in server.flow_runs(**mine)} == {"Scheduled"}

    worker = served.start("prefect", "worker", "start", "--pool", "local")
    try:
        order = {"parameters": {"options": {"target": "data"}}}
        run = server.ask(f"/deployments/{deployed}/create_flow_run", order)["id"]
        final = ("COMPLETED", "FAILED", "CRASHED", "CANCELLED")
        state = lambda one: server.ask(f"/flow_runs/{one}")["state_type"]  # noqa: E731
        until(lambda: state(run) in final, "the worker", served.root / "toy.log")
        assert state(run) == "COMPLETED"
        server.expect(run, data="Ran")

        served.behave("pack", "train")
        run = server.ask(f"/deployments/{deployed}/create_flow_run", {})["id"]
        trainer = served.trainer("pack", worker)
        server.ask(f"/flow_runs/{run}/set_state", {"state": {"type": "CANCELLING", "name": "Cancelling"}})
        until(lambda: not is_alive(trainer), "the trainer to end", served.root / "toy.log")
        until(lambda: state(run) in final, "the run to end", served.root / "toy.log")
        assert state(run) == "CANCELLED" and served.attempts("pack") == 1
    finally:
        end_group(worker)

"""The pipeline as a person runs it, on a shrunken sample: real files, real dvc, real Prefect, real MLflow."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml

from tasks.register.stage import NOTHING_TO_DO
from tasks.run.layout import STAGES

REPOSITORY = Path(__file__).resolve().parents[1]
TINY = """
    data.sample.questions=400 data.split.sft=0.3 data.split.reward=0.3
    data.split.rl=0.2 data.split.eval=0.2
    model.config.hidden_size=32 model.config.intermediate_size=64 model.config.num_hidden_layers=2
    model.config.vocab_size=400 sft.epochs=1 reward.epochs=1 reward_eval.enforce=false
    ppo.updates=4 ppo.batch_size=16 ppo.mini_batch_size=8 ppo.response_tokens=12
    policy_eval.prompts=16 policy_eval.samples_per_prompt=2
    machine.threads=1 machine.checkpoint_updates=1 machine.checkpoint_steps=5
""".split()
QUIET = {
    "DO_NOT_TRACK": "true",
    "DVC_NO_ANALYTICS": "1",
    "HF_HUB_OFFLINE": "1",
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "OMP_WAIT_POLICY": "passive",
    "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
}
AUTHOR = ["-c", "user.name=tests", "-c", "user.email=tests@example.org"]
REGISTRY = """
import json, mlflow
from tasks.run.layout import Layout
from tasks.run.tracking import tracking_uri

client = mlflow.MlflowClient(tracking_uri(Layout.here()))
runs = client.search_runs([client.get_experiment_by_name("stackrl").experiment_id], max_results=500)
sft = next(run for run in runs if run.data.tags.get("stackrl.stage") == "sft")
flow = [run.data.tags for run in runs if "stackrl.made_by.sft" in run.data.tags][-1]  # the oldest
made_by = {key.rpartition(".")[2]: value for key, value in flow.items() if key.startswith("stackrl.made_by.")}
models = {model.name: model for model in client.search_registered_models()}
print(json.dumps({
    "stages": [run.data.tags["stackrl.stage"] for run in runs if "stackrl.stage" in run.data.tags],
    "runs": [run.info.run_id for run in runs], "made_by": made_by,
    "params": sft.data.params, "metrics": sft.data.metrics,
    "versions": {
        name: [version.tags["stackrl.md5"] for version in client.search_model_versions(f"name='{name}'")]
        for name in models
    },
    "aliases": list(client.get_registered_model("stackrl-policy").aliases),
}))
"""

pytestmark = pytest.mark.slow


class Clone:
    """A copy of the repository with tiny numbers, and the environment a fresh shell would have."""

    def __init__(self, root: Path, origin: Path | None = None) -> None:
        """Without an origin nothing has run before; with one its commits are cloned, dvc.lock among them."""
        self.root = root
        ours = ("PREFECT_", "MLFLOW_", "DVC_", "STACKRL_")
        clean = {key: value for key, value in os.environ.items() if not key.startswith(ours)}
        path = os.pathsep.join([str(Path(sys.executable).parent), clean.get("PATH", "")])
        own = {"PATH": path, "PYTHONPATH": str(root), "PREFECT_HOME": str(root / ".prefect")}
        self.environment = clean | QUIET | own
        if origin:
            subprocess.run(["git", "clone", "-q", origin, root], check=True)
            return
        listed = subprocess.check_output(
            ["git", "ls-files", "-co", "--exclude-standard"], cwd=REPOSITORY, text=True
        )
        for name in listed.splitlines():
            if (REPOSITORY / name).is_file() and not name.startswith("artifacts/") and name != "dvc.lock":
                (root / name).parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(REPOSITORY / name, root / name)
        self.run("git", "init", "-q")
        self.run("python", "-m", "params", "use", "sample", *TINY)
        self.commit()

    def commit(self) -> None:
        """All of it."""
        self.run("git", "add", "-A")
        self.run("git", *AUTHOR, "commit", "-qm", "as it stands")

    def run(self, *command: str, status: int = 0) -> str:
        """Run to the end; everything it printed."""
        done = subprocess.run(
            command, cwd=self.root, env=self.environment, timeout=900, text=True,
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        )  # fmt: skip
        assert done.returncode == status, f"{command}: {done.returncode}\n{done.stdout[-5000:]}"
        return done.stdout

    def ran(self) -> list[str]:
        """The stages that `dvc repro` ran now; not register where it only asked."""
        printed = self.run("dvc", "repro")
        ran = [stage for stage in STAGES if f"Running stage '{stage}'" in printed]
        return [stage for stage in ran if stage != "register" or f"; {NOTHING_TO_DO}" not in printed]

    def lock(self) -> dict:
        """dvc.lock."""
        return yaml.safe_load((self.root / "dvc.lock").read_text())["stages"]

    def reset(self) -> None:
        """Back to the numbers of the first run; DVC has its results."""
        self.run("python", "-m", "params", "use", "sample", *TINY)
        self.run("dvc", "repro")

    def change(self, key: str, value: object) -> None:
        """Edit one number of params.yaml."""
        self.run("python", "-m", "params", "use", "sample", *TINY, f"{key}={value}")


@pytest.fixture(scope="module")
def clone(tmp_path_factory) -> Clone:
    """A clone in which the main job has run once."""
    clone = Clone(tmp_path_factory.mktemp("clone"))
    assert clone.ran() == list(STAGES)
    clone.commit()
    return clone


def outs(lock: dict) -> dict[str, str]:
    return {out["path"]: out["md5"] for stage in lock.values() for out in stage.get("outs", [])}


def test_the_second_run_does_nothing_and_status_is_clean(clone):
    assert clone.ran() == []
    assert json.loads(clone.run("dvc", "status", "--json")) == {"register": ["always changed"]}
    assert clone.run("git", "status", "--porcelain") == ""
    assert json.loads((clone.root / "artifacts/register/registered.json").read_text())


LOAD = """
import mlflow
mlflow.set_tracking_uri("sqlite:///mlflow.db")
load = lambda kind: mlflow.pyfunc.load_model(f"models:/stackrl-{kind}@candidate")
sft, policy, reward = map(load, ("sft", "policy", "reward"))
pair = {"question": ["What is 1 + 2?"], "answer": ["It is 3."]}
print("LOADED", sft.predict(pair["question"]), policy.predict(pair["question"]), reward.predict(pair))
"""


def test_a_clone_with_the_lock_trains_nothing_and_registers_what_it_pulls(clone, tmp_path):
    """A newcomer's first command, where everything that ran is in git and in a DVC remote."""
    remote = ["dvc", "remote", "add", "--local", "--default", "there", str(tmp_path / "remote")]
    clone.run(*remote)
    clone.run("dvc", "push")
    other = Clone(tmp_path / "other", clone.root)
    other.run(*remote)
    other.run("dvc", "pull")
    for _ in range(2):
        assert other.ran() == ["register"]
        assert "LOADED" in other.run("python", "-c", LOAD)
        assert other.ran() == [] and other.run("git", "status", "--porcelain") == ""
        (other.root / "mlflow.db").unlink()
    for kind in ("sft", "reward", "ppo"):
        shutil.rmtree(other.root / "artifacts" / kind / "model")
    printed = other.run("python", "-m", "tasks", "register", status=1)
    assert "dvc pull" in printed and "dvc repro sft" in printed and "Traceback" not in printed
    assert other.run("git", "status", "--porcelain") == ""


def test_two_fresh_runs_leave_the_same_hashes(clone, tmp_path):
    """One knows the lock of the other, and pulls nothing.

    Also: a run killed in the middle of ppo and started again ends with the hashes of one that was not.
    """
    other = Clone(tmp_path / "other", clone.root)
    other.run("dvc", "repro", "reward_eval")
    with (tmp_path / "killed.log").open("wb") as log:
        process = subprocess.Popen(
            ["dvc", "repro", "ppo"],
            cwd=other.root,
            env=other.environment,
            stdout=log,
            stderr=log,
            start_new_session=True,
        )
    try:
        deadline = time.monotonic() + 120
        while not list(other.root.glob("scratch/ppo/*/*/manifest.json")):
            assert process.poll() is None, "ppo ended before it wrote a checkpoint"
            assert time.monotonic() < deadline
            time.sleep(0.05)
    finally:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
    assert other.ran() == ["ppo", "policy_eval", "register"]
    assert outs(other.lock()) == outs(clone.lock())


def test_one_number_reruns_only_what_depends_on_it(clone):
    before = clone.lock()
    clone.change("ppo.init_kl_coef", 0.25)
    assert clone.ran() == ["ppo", "policy_eval", "register"]
    clone.change("pack.prompt_tokens", 60)
    ran = clone.ran()
    assert ran[0] == "pack" and "sft" not in ran and "reward" not in ran
    assert clone.lock()["sft"] == before["sft"]
    clone.reset()
    assert outs(clone.lock()) == outs(before)


def test_a_comment_in_ppo_retrains_neither_sft_nor_reward(clone):
    file = clone.root / "tasks/ppo/losses.py"
    text = file.read_text()
    file.write_text(text + "# a comment\n")
    planned = clone.run("dvc", "repro", "--dry")
    file.write_text(text)
    assert "Running stage 'ppo'" in planned
    assert "Running stage 'sft'" not in planned and "Running stage 'reward'" not in planned


def test_a_changed_dump_reruns_everything(clone):
    record = clone.root / "data/raw.json"
    record.write_text('{"unix.example.7z": {"md5": "0cc175b9c0f1b6a831c399e269772661", "size": 1}}\n')
    planned = clone.run("dvc", "repro", "--dry")
    record.write_text("{}\n")
    assert "Running stage 'data'" in planned
    clone.change("data.sample.questions", 420)
    assert clone.ran() == list(STAGES)
    clone.reset()
    assert clone.ran() == []


def test_the_flow_finds_everything_unchanged_and_runs_what_is_forced(clone):
    printed = clone.run("python", "-m", "flows.rlhf")
    assert printed.count("Unchanged") >= len(STAGES)
    clone.change("ppo.updates", 3)
    printed = clone.run("python", "-m", "flows.rlhf")
    assert "ppo" in printed and "Ran" in printed
    clone.reset()


def test_mlflow_knows_every_stage_and_the_three_models(clone):
    found = json.loads(clone.run("python", "-c", REGISTRY).splitlines()[-1])
    assert set(STAGES) <= set(found["stages"])
    # the first flow skipped every stage, and says whose result it has
    assert found["made_by"].keys() == set(STAGES)
    assert all(value.removeprefix("Unchanged: ") in found["runs"] for value in found["made_by"].values())
    assert found["params"]["sft.epochs"] == "1.0" and "sft/loss" in found["metrics"]
    assert set(found["versions"]) == {"stackrl-sft", "stackrl-reward", "stackrl-policy"}
    for kind, stage in (("sft", "sft"), ("reward", "reward"), ("policy", "ppo")):
        registered = found["versions"][f"stackrl-{kind}"]
        assert len(registered) == len(set(registered)), "the same weights registered twice are one version"
        assert outs(clone.lock())[f"artifacts/{stage}/model"] in registered
    assert "candidate" in found["aliases"]


def test_the_whole_pipeline_by_adapters(clone, tmp_path):
    """The SFT model of a first run as base; ends with a registered policy that is plain and merged."""
    other = Clone(tmp_path / "other")
    base = tmp_path / "base"
    shutil.copytree(clone.root / "artifacts/sft/model", base)
    numbers = [number for number in TINY if not number.startswith("model.")]
    other.run("python", "-m", "params", "use", "adapters", f"model.base={base}", *numbers)
    assert other.ran() == list(STAGES)
    for stage in ("sft", "reward", "ppo"):
        folder = other.root / "artifacts" / stage / "model"
        assert (folder / "model.safetensors").is_file() and not (folder / "adapter_config.json").exists()
    assert (other.root / "artifacts/reward/model/adapter/adapter_config.json").is_file()
    registered = json.loads((other.root / "artifacts/register/registered.json").read_text())
    assert registered["stackrl-policy"] == outs(other.lock())["artifacts/ppo/model"]


@pytest.mark.parametrize(
    ("key", "value", "word"),
    [("sft.learning_rate", "-1", "sft.learning_rate"), ("ppo.lern", "1", "ppo.lern")],
)
def test_a_wrong_parameter_is_one_line(clone, key, value, word):
    before = (clone.root / "params.yaml").read_bytes()
    printed = clone.run("python", "-m", "params", "use", "sample", f"{key}={value}", status=1)
    assert word in printed and "Traceback" not in printed
    assert (clone.root / "params.yaml").read_bytes() == before


def test_bad_input_leaves_lock_cache_and_earlier_result(clone):
    lock = (clone.root / "dvc.lock").read_bytes()
    result = (clone.root / "artifacts/data/sft.parquet").read_bytes()
    bad = clone.root / "broken.Posts.xml"
    bad.write_text('<?xml version="1.0"?>\n<posts>\n  <row Id="1" PostTypeId="1" Title="t" Body="b"')
    clone.run("python", "-m", "params", "use", "stack_exchange", f"data.source={bad}")
    printed = clone.run("python", "-m", "tasks", "data", status=1)  # directly: the earlier result stays
    assert "broken.Posts.xml" in printed and "Traceback" not in printed
    assert (clone.root / "artifacts/data/sft.parquet").read_bytes() == result
    assert "broken.Posts.xml" in clone.run("dvc", "repro", status=255)
    assert (clone.root / "artifacts/data/sft.parquet").read_bytes() == result  # what `data` writes persists
    assert (clone.root / "dvc.lock").read_bytes() == lock
    clone.run("python", "-m", "params", "use", "sample", *TINY)
    clone.run("dvc", "checkout")
    assert (clone.root / "artifacts/data/sft.parquet").read_bytes() == result
    assert clone.ran() == []

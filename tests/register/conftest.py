"""A folder with models, one whose models are registered, and an environment without our package."""

import os
import shutil
import subprocess
import sys
import sysconfig

import pytest
import yaml
from made_models import judged, write_lock, write_model

from params.schema import Params
from tasks.register import run
from tasks.run import moved, tracking
from tasks.run.files import write_json
from tasks.run.layout import Layout


@pytest.fixture(scope="session")
def template(tmp_path_factory):
    root = tmp_path_factory.mktemp("template")
    for seed, stage in enumerate(("sft", "reward", "ppo")):
        write_model(root / f"artifacts/{stage}/model", stage, seed)
    (root / "dvc.yaml").write_text("stages: {register: {cmd: x, deps: [], params: [register], outs: []}}\n")
    (root / "params.yaml").write_text(yaml.safe_dump(Params().model_dump(mode="json")))
    write_json(root / "artifacts/reward_eval/metrics.json", {"accuracy": 0.85})
    write_lock(root)
    tracking.connect(Layout(root, root))  # an empty store
    return root


@pytest.fixture
def layout(tmp_path, monkeypatch, template):
    for name in ("MLFLOW_TRACKING_URI", "RANK", "DVC_ROOT", "DVC_EXP_NAME", tracking.PARENT_VARIABLE):
        monkeypatch.delenv(name, raising=False)
    root = tmp_path / "repository"
    subprocess.run(["cp", "-r", template, root], check=True)
    monkeypatch.chdir(root)
    return Layout.here()


@pytest.fixture(scope="session")
def finished(tmp_path_factory, template):
    """A folder whose models are registered, the policy a champion; copied by each test that needs one."""
    root = tmp_path_factory.mktemp("finished") / "repository"
    subprocess.run(["cp", "-r", template, root], check=True)
    layout = Layout(root, root)
    judged(layout)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(root)
        patch.delenv("DVC_EXP_NAME", raising=False)
        run(Params(), layout)
    return root


@pytest.fixture
def registered(layout, finished):
    """The same, moved to where the test stands."""
    shutil.rmtree(layout.root)
    subprocess.run(["cp", "-r", finished, layout.root], check=True)
    os.chdir(layout.root)
    moved.follow(layout.home / "mlflow.db", layout.home)
    return layout


@pytest.fixture(scope="session")
def stranger(tmp_path_factory):
    """A Python that has what this one has, but for what stands in its .pth files: our package among it."""
    folder = tmp_path_factory.mktemp("stranger")
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", folder], check=True)
    python = folder / "bin" / "python"
    code = "import sysconfig; print(sysconfig.get_path('purelib'))"
    packages = subprocess.check_output([python, "-c", code], text=True).strip()
    with open(f"{packages}/theirs.pth", "w") as file:  # lines of .pth files found there are not followed
        file.write("\n".join(dict.fromkeys(sysconfig.get_path(name) for name in ("purelib", "platlib"))))
    ours = ("PYTHONPATH", "MLFLOW_", "DVC_", "STACKRL_")
    environment = {key: value for key, value in os.environ.items() if not key.startswith(ours)}
    quiet = {"HF_HUB_OFFLINE": "1", "MLFLOW_DISABLE_TELEMETRY": "true", "DO_NOT_TRACK": "true"}
    environment |= quiet | {"PATH": f"{python.parent}{os.pathsep}{os.environ['PATH']}"}

    def run_python(*words, **keys):
        return subprocess.Popen([python, *words], cwd=folder, env=environment, text=True, **keys)

    found = run_python("-c", "import torch, tasks", stderr=subprocess.PIPE)
    assert "No module named 'tasks'" in found.communicate()[1]
    return run_python

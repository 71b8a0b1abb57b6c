"""`python -m tasks` where processes really run: bare containers, schedulers, pipes, odd folders. It works."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from params.schema import Params

REPOSITORY = Path(__file__).parents[1]
STAGE = """
import getpass, os, tempfile
from pathlib import Path
from tasks.run.curve import Curve, plot
from tasks.run.files import staged
from tasks.run.layout import StageResult

def run(params, layout):
    print("… äöü", Path.home(), getpass.getuser(), flush=True)
    with tempfile.TemporaryFile() as file:
        file.write(b"x")
    if "IMPORTS" in os.environ:
        from transformers import AutoModelForCausalLM  # looks for a home
    curve = Curve(("loss",), [{"step": 1, "loss": 1.0}])
    plot(layout.kept("reports", "sft", "loss.png"), curve, ["loss"], "…")
    with staged(layout.artifact("sft", "model")) as path:
        path.mkdir()
        (path / "config.json").write_text("{}")
    return StageResult({"ranks": float(os.environ.get("WORLD_SIZE", 1))})
"""
NO_USER = "import pwd\ndef none(*_): raise KeyError('uid not found: 12345')\npwd.getpwuid = none\n"
BARE = {"HOME": None, "USER": None, "LOGNAME": None, "LNAME": None, "USERNAME": None}
SURROUNDINGS = {
    "a container's unknown user": ("work", {**BARE, "TMPDIR": "/nowhere", "IMPORTS": "1"}, ""),
    "an ASCII terminal, no asserts": (
        "work",
        {
            "PYTHONIOENCODING": "ascii",
            "LC_ALL": "C",
            "LANG": None,
            "PYTHONOPTIMIZE": "1",
            "PYTHONHASHSEED": "7",
        },
        "",
    ),
    "a scheduler's job": (
        "work",
        {
            "RANK": "3",
            "WORLD_SIZE": "4",
            "LOCAL_RANK": "3",
            "MASTER_ADDR": "node1",
            "MASTER_PORT": "1",
            "OMPI_COMM_WORLD_SIZE": "4",
            "ACCELERATE_USE_FSDP": "true",
            "OMP_NUM_THREADS": "2,4",
            "CUDA_VISIBLE_DEVICES": "",
            "MPLBACKEND": "TkAgg",
            "MLFLOW_RUN_ID": "of another",
        },
        "",
    ),
    "an odd and long folder, closed streams": ("w ö'rk #%41 " + 12 * "/a long name ", {}, "<&- >&- 2>&-"),
    "a reader who left, no git": ("work", {"PATH": "/bin-of-nobody", "HOME": "/proc"}, "2>&1 | /bin/true"),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", SURROUNDINGS)
def test_a_stage_works(tmp_path, name):
    folder, more, redirect = SURROUNDINGS[name]
    root = tmp_path / folder
    (root / "tasks").mkdir(parents=True)
    (root / "tasks/__init__.py").write_text(f"__path__.append({str(REPOSITORY / 'tasks')!r})\n")
    (root / "tasks/sft.py").write_text(STAGE)
    (root / "dvc.yaml").write_text(yaml.safe_dump({"stages": {"sft": {"cmd": "x", "params": ["seed"]}}}))
    (root / "params.yaml").write_text(yaml.safe_dump(Params().model_dump(mode="json")))
    _ = more.keys() & BARE.keys() and "USER" in more and (root / "sitecustomize.py").write_text(NO_USER)
    ours = ("STACKRL_", "DVC_", "MLFLOW_", "PYTHON")
    clean = {key: value for key, value in os.environ.items() if not key.startswith(ours)}
    clean |= {"PYTHONPATH": f"{root}:{REPOSITORY}", **more}
    done = subprocess.run(
        ["/bin/bash", "-c", f"{sys.executable} -m tasks sft {redirect}"],
        cwd=root,
        env={key: value for key, value in clean.items() if value is not None},
        input="",
        capture_output=True,
        text=True,
        errors="replace",
    )
    assert done.returncode == 0 and "Traceback" not in done.stderr, done.stderr[-2000:]
    assert (root / "artifacts/sft/metrics.json").read_text() == '{\n  "ranks": 1.0\n}\n'
    assert (root / "artifacts/sft/model/config.json").exists() and (root / "mlflow.db").exists()
    assert not redirect or not done.stdout
    assert ("nothing was launched" in done.stderr) == (name == "a scheduler's job")

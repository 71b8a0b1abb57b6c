"""Who may know whom: flows -> tasks -> params; stages meet on disk. And what nobody may call."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator

import pytest
from import_graph import FILES, at_import, imports, name_of

from tasks.run.layout import STAGES

MLFLOW_ROOMS = ("tasks.run.tracking", "tasks.register")
STOREYS = ("run", "lm", "training rl")  # of tasks; above them the stages, which never import one another
FLOORS = ("model", "attention adapters numerics", "logprobs", "heads sampling")  # of tasks.lm, its rooms
TRAVELS = "tasks.register.serving"  # runs inside a registered model, where nothing of ours is
FORBIDDEN_NAMES = {"pickle", "cPickle", "dill", "cloudpickle", "joblib", "shelve", "marshal"}
FORBIDDEN_CALLS = {"torch.load", "yaml.load", "yaml.unsafe_load", "yaml.full_load", "numpy.load", "np.load"}


def is_in(name: str, room: str) -> bool:
    return name == room or name.startswith(f"{room}.")


def stage_of(name: str) -> str | None:
    """The stage a module belongs to; None for training, lm, run and __main__."""
    parts = name.split(".")
    return parts[1] if len(parts) > 1 and parts[0] == "tasks" and parts[1] in STAGES else None


def storey_of(name: str) -> int:
    """The storey of tasks on which a module stands."""
    part = f"{name}.".split(".")[1]
    return next((i for i, parts in enumerate(STOREYS) if part in parts.split()), len(STOREYS))


def floor_of(name: str) -> int:
    """The floor of tasks.lm on which a module stands; its face stands above them all."""
    room = f"{name}.".split(".")[2]
    return next((i for i, rooms in enumerate(FLOORS) if room in rooms.split()), len(FLOORS))


def leads_up(name: str, target: str) -> bool:
    """Whether a module of tasks.lm imports of a room that is not below its own."""
    is_same = name.split(".")[2:3] == target.split(".")[2:3]
    return is_in(name, "tasks.lm") and not is_same and floor_of(target) >= floor_of(name)


def broken_arrows(name: str, tree: ast.Module) -> list[str]:
    """What a module of that name imports and may not."""
    heavy = ("mlflow", "torch", "transformers") if is_in(name, "params") else ("mlflow",)
    at_once = [target for target in imports(at_import(tree)) if target.split(".")[0] in heavy]
    if is_in(name, TRAVELS):
        at_once = []
    wrong = [target for target in imports(ast.walk(tree)) if not may_import(name, target)]
    return [f"{name} imports {target}" for target in (*wrong, *at_once)]


def may_import(name: str, target: str) -> bool:
    if is_in(name, TRAVELS):
        return target.split(".")[0] not in ("tasks", "params", "flows", "prefect", "dvc")
    if is_in(target, TRAVELS):
        return False
    if is_in(target, "prefect"):
        return is_in(name, "flows")
    if is_in(target, "mlflow"):
        return any(is_in(name, room) for room in MLFLOW_ROOMS)
    if is_in(target, "dvc") or is_in(target, "tests"):
        return False
    if is_in(target, "flows"):
        return is_in(name, "flows")
    if is_in(target, "tasks.lm") and name != "tasks.lm":  # whose face is for others' code
        if floor_of(target) == len(FLOORS) or leads_up(name, target):
            return False
    if is_in(target, "tasks"):
        if is_in(name, "flows") or name == "tasks.__main__":
            return True
        is_own = name.split(".")[1:2] == target.split(".")[1:2]
        return is_in(name, "tasks") and (is_own or storey_of(target) < storey_of(name))
    if is_in(target, "params"):
        return is_in(name, "params") or stage_of(name) is not None or name == "tasks.__main__"
    return True


def forbidden(name: str, tree: ast.Module) -> Iterator[str]:
    """Calls and modules that run code found in a file, or write where a file says."""
    for target in imports(ast.walk(tree)):
        if target.split(".")[0] in FORBIDDEN_NAMES:
            yield f"{name} imports {target}"
    for node in ast.walk(tree):
        if not isinstance(node, ast.Call):
            continue
        called = ast.unparse(node.func)
        if called in FORBIDDEN_CALLS or called.endswith(".extractall") or called in ("eval", "exec"):
            yield f"{name}:{node.lineno} calls {called}"
        for keyword in node.keywords:
            is_false = isinstance(keyword.value, ast.Constant) and not keyword.value.value
            if keyword.arg in ("trust_remote_code", "allow_pickle", "shell") and not is_false:
                yield f"{name}:{node.lineno} passes {keyword.arg}"


@pytest.mark.parametrize("path", FILES, ids=name_of)
def test_arrows_and_forbidden_calls(path):
    tree = ast.parse(path.read_text(encoding="utf-8"))
    assert broken_arrows(name_of(path), tree) == []
    assert list(forbidden(name_of(path), tree)) == []


def test_every_room_was_looked_at():
    assert {name_of(path).split(".")[0] for path in FILES} == {"flows", "params", "tasks"}
    assert {"tasks.__main__", "tasks.run.layout", "flows.rlhf", "params.schema"} <= set(map(name_of, FILES))


@pytest.mark.parametrize(
    ("name", "line"),
    [
        ("tasks.sft", "from tasks.reward import run"),
        ("tasks.ppo.trainer", "import tasks.pack.rows"),
        ("tasks.ppo.trainer", "def f():\n    from tasks import sft"),
        ("tasks.lm.attention.forest", "from params.schema import Params"),
        ("tasks.run.tracking", "import params"),
        ("tasks.lm.attention.forest", "from tasks.sft import run"),
        ("tasks.run.tracking", "from tasks.training.rows import read_rows"),
        ("tasks.lm.numerics.optimizer", "from tasks.training.optimizer import ADAM"),
        ("tasks.training.rows", "from tasks.sft.records import PackedRow"),
        ("tasks.training.rows", "from tasks.rl.rollout import Rollout"),
        ("tasks.training.rows", "from params.schema import Params"),
        ("tasks.rl.rollout", "from tasks.training.rows import read_rows"),
        ("tasks.lm.model.kinds", "from tasks.lm.attention.forest import plant"),
        ("tasks.lm.attention.forest", "def f():\n    from tasks.lm.adapters import lora"),
        ("tasks.lm.heads.scores", "from tasks.lm.sampling.generation import generate"),
        ("tasks.lm.logprobs.roads", "from tasks.lm import create_reference_model"),
        ("tasks.ppo.stage", "from tasks.lm import create_reference_model"),
        ("params.schema", "from tasks.run.layout import Layout"),
        ("params.schema", "from tasks.lm.model.template import CLEAN"),
        ("tasks.run.tracking", "from tasks.lm.model.template import CLEAN"),
        ("params.schema", "import torch"),
        ("tasks.sft", "from flows import graph"),
        ("tasks.sft", "import prefect"),
        ("tasks.sft", "def f():\n    import mlflow"),
        ("flows.report", "def f():\n    import mlflow"),
        ("tasks.run.tracking", "import mlflow"),
        ("tasks.run.tracking", "if True:\n    import mlflow"),
        ("tasks.run.tracking", "class Run:\n    import mlflow"),
        ("tasks.register", "from mlflow import MlflowClient"),
        ("tasks.register.models", "from tasks.register.serving import answer"),
        ("tasks.register.serving.answer", "from tasks.lm.model.template import prompt_text"),
        ("flows.graph", "from dvc.repo import Repo"),
        ("flows.graph", "from params.load import read"),
        ("flows.steps", "import importlib\nimportlib.import_module('mlflow')"),
    ],
)
def test_a_wrong_arrow_is_seen(name, line):
    assert broken_arrows(name, ast.parse(line))


@pytest.mark.parametrize(
    ("name", "line"),
    [
        ("tasks.ppo.trainer", "from tasks.ppo.losses import policy_loss\nfrom tasks.lm.model import hub"),
        ("tasks.sft", "from params.schema import Params\nfrom tasks.run.layout import Layout"),
        ("tasks.training.optimizer", "from tasks.lm.numerics import optimizer\nfrom tasks.run import ranks"),
        ("tasks.sft.trainer", "from tasks.training.rows import read_rows"),
        ("tasks.lm", "from tasks.lm.heads.reference import create_reference_model"),
        ("tasks.lm.heads.scores", "from tasks.lm.heads.reference import create_reference_model"),
        ("tasks.lm.sampling.generation", "from tasks.lm.logprobs.roads import take_road"),
        ("tasks.run.tracking", "def f():\n    import mlflow"),
        ("tasks.register", "def f():\n    from mlflow import MlflowClient"),
        ("tasks.register.serving.answer", "import mlflow\nimport torch"),
        ("tasks.run.tracking", "class Run:\n    def f(self):\n        import mlflow"),
        ("tasks.run.tracking", "if TYPE_CHECKING:\n    from mlflow import MlflowClient"),
        ("flows.steps", "import prefect\nfrom tasks.run import tracking"),
        ("flows.steps", "import importlib\nimportlib.import_module('tasks.register')"),
    ],
)
def test_a_right_arrow_passes(name, line):
    assert broken_arrows(name, ast.parse(line)) == []


@pytest.mark.parametrize(
    "line",
    [
        "import pickle",
        "torch.load(path)",
        "yaml.load(text, Loader)",
        "archive.extractall(path)",
        "load(name, trust_remote_code=True)",
        "load(name, trust_remote_code=trust)",
        "np.load(path, allow_pickle=True)",
        "subprocess.run(text, shell=True)",
        "eval(text)",
    ],
)
def test_a_forbidden_call_is_seen(line):
    assert list(forbidden("x", ast.parse(line)))


def test_what_only_looks_forbidden_passes():
    line = "model.eval(); load(name, trust_remote_code=False); yaml.safe_load(text); json.load(file)"
    assert not list(forbidden("x", ast.parse(line)))


@pytest.mark.slow
def test_everything_below_flows_imports_without_prefect_mlflow_and_dvc():
    modules = [name_of(path) for path in FILES if not is_in(name_of(path), "flows")]
    modules = [name for name in modules if not (name.endswith("__main__") or is_in(name, TRAVELS))]
    script = (
        "import importlib, sys\n"
        "for name in ('prefect', 'mlflow', 'dvc'): sys.modules[name] = None\n"
        "for name in sys.argv[1:]: importlib.import_module(name)\n"
    )
    done = subprocess.run([sys.executable, "-c", script, *modules], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr

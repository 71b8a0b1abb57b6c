"""The graph says what the code does: nothing imports itself by a detour, a stage depends on what it runs."""

from __future__ import annotations

import ast
import shutil
from pathlib import Path

import pytest
import yaml
from import_graph import MODULES, REPOSITORY, circles, imported, reached, tree_of

from tasks.run.layout import STAGES, Layout

ALLOWED_CIRCLES = [
    {f"tasks.ppo.{name}" for name in ("first_step", "looks", "loop", "preflight", "rounding", "trainer")},
]
# Of tasks/run, which surrounds a stage, what decides numbers in outs and metrics.
MEASURES = ("tasks/run/monitor", "tasks/run/text_rule.py", "tasks/run/stated.py", "tasks/run/intervals.py")


def is_silent(module: str) -> bool:
    """Whether importing a package runs nothing: it has but a docstring, or is tasks.lm, which is lazy."""
    body = tree_of(module).body
    is_empty = all(isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) for node in body)
    return module == "tasks.lm" or (MODULES[module].name == "__init__.py" and is_empty)


def within(path: str, place: str) -> bool:
    """Whether a file is that place or stands in it."""
    return path == place or path.startswith(f"{place}/")


def is_measured(path: str) -> bool:
    """Whether a change of this file may change a result, and not only how a stage is run."""
    decides = any(within(path, place) for place in MEASURES)
    return within(path, "tasks") and (decides or not within(path, "tasks/run"))


def code_of(stage: str) -> set[str]:
    """Files under tasks/ that a stage runs, those that only surround it excepted."""
    return files_of(reached(name for name in MODULES if within(name.replace(".", "/"), f"tasks/{stage}")))


def files_of(modules: set[str]) -> set[str]:
    """Their files, but for those that decide nothing."""
    paths = {MODULES[name].relative_to(REPOSITORY).as_posix() for name in modules if not is_silent(name)}
    return {path for path in paths if is_measured(path)}


def stated_for(stage: str) -> set[str]:
    """Code dependencies of a stage in dvc.yaml."""
    stages = yaml.safe_load((REPOSITORY / "dvc.yaml").read_text(encoding="utf-8"))["stages"]
    return {path for path in stages[stage]["deps"] if within(path, "tasks")}


def differences(code: set[str], stated: set[str]) -> tuple[set[str], set[str]]:
    """Files that are run and not stated; places that are stated and of which nothing is run."""
    missing = {path for path in code if not any(within(path, place) for place in stated)}
    needless = {place for place in stated if not any(within(path, place) for path in code)}
    return missing, needless


def test_nothing_imports_itself_by_a_detour():
    graph = {name: sorted(imported(name)) for name in sorted(MODULES)}
    assert sorted(map(sorted, circles(graph))) == sorted(map(sorted, ALLOWED_CIRCLES))


def test_a_circle_is_seen():
    graph = {"a": ["b"], "b": ["c", "d"], "c": ["a"], "d": ["e"], "e": ["d"], "f": ["a", "e"]}
    assert sorted(map(sorted, circles(graph))) == [["a", "b", "c"], ["d", "e"]]


@pytest.mark.parametrize("stage", STAGES)
def test_a_stage_depends_on_the_code_that_it_runs(stage):
    assert differences(code_of(stage), stated_for(stage)) == (set(), set())


@pytest.mark.parametrize("stage", STAGES)
def test_a_dependency_is_there_and_no_wider_than_a_room(stage):
    stated = stated_for(stage)
    assert all((REPOSITORY / path).exists() for path in stated)
    assert not {"tasks", "tasks/lm", "tasks/run"} & stated


def test_a_dependency_that_is_missing_or_needless_is_seen():
    code, stated = {"tasks/sft/stage.py", "tasks/lm/attention/forest.py"}, {"tasks/sft", "tasks/data"}
    assert differences(code, stated) == ({"tasks/lm/attention/forest.py"}, {"tasks/data"})
    assert differences(code, {"tasks/sft", "tasks/lm"}) == (set(), set())


def test_every_folder_of_code_is_a_package():
    """Setuptools leaves out, in silence, a folder without __init__.py, and all that stands in it."""
    folders = {path.parent for path in MODULES.values()}
    assert [folder for folder in folders if not (folder / "__init__.py").exists()] == []


def test_files_are_read_from_this_tree():
    assert Path(MODULES["tasks.run.layout"]) == REPOSITORY / "tasks/run/layout.py"
    assert {"tasks.run", "tasks.run.layout"} <= reached({"tasks.run.locks"})
    assert "tasks.run.ranks" in imported("tasks.run.launch")


@pytest.fixture
def copied(tmp_path) -> Layout:
    """The graph with its code, and something in the place of every other dependency."""
    for name in ("dvc.yaml", "params.yaml"):
        shutil.copy(REPOSITORY / name, tmp_path)
    shutil.copytree(REPOSITORY / "tasks", tmp_path / "tasks", ignore=shutil.ignore_patterns("__pycache__"))
    layout = Layout(tmp_path, tmp_path)
    for stage in layout.stages().values():
        for path in (tmp_path / dep for dep in stage["deps"] if not within(dep, "tasks")):
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text("something")
    return layout


@pytest.mark.parametrize(
    ("file", "old", "new", "stages"),
    [
        ("training/arguments.py", "cosine", "linear", {"sft", "reward"}),
        ("training/microbatches.py", "import", "import  ", {"sft", "reward"}),
        ("lm/sampling/generation.py", "def generate", "# \ndef generate", {*STAGES[-3:]}),
        ("lm/model/template.py", "Answer:", "Reply:", {*STAGES} - {"data"}),
        ("run/tracking.py", "import", "import  ", set()),
    ],
)  # fmt: skip
def test_a_changed_line_is_seen_by_the_stages_that_run_it_and_no_others(copied, file, old, new, stages):
    before = {stage: copied.fingerprint(stage) for stage in STAGES}
    path = copied.root / "tasks" / file
    text = path.read_text(encoding="utf-8")
    assert old in text
    path.write_text(text.replace(old, new, 1), encoding="utf-8")
    assert {stage for stage in STAGES if copied.fingerprint(stage) != before[stage]} == stages

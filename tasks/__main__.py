"""Run one stage: `python -m tasks ppo`. DVC and Prefect walk this road too; there is no other."""

from __future__ import annotations

import argparse
import importlib
import json
import os
import sys
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

from params.inputs import prepare
from params.load import read
from params.schema import Params
from tasks.run import launch, streams, tracking, user
from tasks.run.files import remove, write_json
from tasks.run.layout import STAGES, Layout, Refusal, StageResult
from tasks.run.lifetime import Stopped, stop_on_signals, tie_to_parent
from tasks.run.locks import Busy, scratch_lock, stage_lock

NO_TELEMETRY = {
    "DO_NOT_TRACK": "true",
    "DVC_NO_ANALYTICS": "1",
    "HF_HUB_DISABLE_TELEMETRY": "1",
    "MLFLOW_DISABLE_TELEMETRY": "true",
}
GENTLE = {  # set before torch and transformers are loaded
    "GOMP_SPINCOUNT": "3000",  # a thread that waits spins briefly: fast alone, bearable on a shared core
    "TQDM_DISABLE": "1",  # the stages say where they are themselves
    "TRANSFORMERS_VERBOSITY": "error",  # a fresh score head and long texts are meant
    "TOKENIZERS_PARALLELISM": "false",  # the same tokenizer on every machine, no warning after a fork
}
DISK_FULL = ("No space left on device", "database or disk is full")
HEADLINE_METRICS = 6  # metrics in the closing line; the rest stands in metrics.json


def execute(stage: str, layout: Layout | None = None) -> StageResult:
    """Run `stage` where `layout` says: parameters, lock, then the stage itself, here or in several processes.

    What the stage kept for resuming is removed once it is done.

    Raises:
        ValueError: params.yaml is wrong, another process runs this stage, or its input does not do.
        Refusal: the stage declined; scratch/<stage>/refusal.json of the workspace says why.
    """
    layout = layout or Layout.here()
    params = read(layout.root / "params.yaml")
    if launch.is_rank():
        return run(stage, params, layout)
    machine = params.machine
    wait = partial(_say_that_it_waits, stage)
    with stage_lock(layout, stage) as own, scratch_lock(layout, stage, wait) as shared:
        remove(layout.refusal(stage))
        deps = {Path(dep) for dep in layout.stages().get(stage, {}).get("deps", [])}
        prepare(params, layout.root, layout.home, deps, reads=stage != "register")
        scratch = layout.scratch(stage)
        try:
            if machine.launch_file and stage in launch.TRAINING:
                launch.launch(stage, machine.launch_file, machine.processes, layout, (own, shared))
                metrics = json.loads(layout.artifact(stage, "metrics.json").read_text(encoding="utf-8"))
                result = StageResult(metrics)
            else:
                result = run(stage, params, layout)
        except Refusal as refusal:
            write_json(layout.refusal(stage), {"stage": stage, "reason": str(refusal)})
            raise
        remove(scratch)
    return result


def _say_that_it_waits(stage: str, holder: str) -> None:
    print(f"stackrl: {stage}: waits for process {holder}, which computes the same elsewhere", file=sys.stderr)


def run(stage: str, params: Params, layout: Layout) -> StageResult:
    """The stage itself in its MLflow run, and metrics.json; of several processes the first writes both.

    A stage that DVC always runs may have a `standing(params, layout)`: its result where nothing is to be
    done, else None. No run is opened for it.
    """
    module = importlib.import_module(f"tasks.{stage}")
    if hasattr(module, "standing") and (result := module.standing(params, layout)) is not None:
        write_json(layout.artifact(stage, "metrics.json"), result.metrics)
        return result
    logged = dict(dotted(params.model_dump(mode="json"), [*layout.tracked(stage), "machine"]))
    with tracking.stage_run(stage, logged, layout):
        result = module.run(params, layout)
        write_json(layout.artifact(stage, "metrics.json"), result.metrics)
        tracking.log_metrics(result.metrics)
    return result


def dotted(values: dict[str, Any], wanted: list[str], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """The leaves of nested `values` under dotted names: those that `wanted` names, itself or by a section."""
    for key, value in values.items():
        name = prefix + key
        if isinstance(value, dict):
            yield from dotted(value, wanted, f"{name}.")
        elif any(name == one or name.startswith(f"{one}.") for one in wanted):
            yield name, value


def reason(error: Exception) -> str | None:
    """The one line a user needs, or None where only a traceback helps."""
    text = " ".join(str(error).split())
    if any(words in text for words in DISK_FULL):
        return f"the disk is full: {text}"
    if isinstance(error, OSError) and error.filename:
        return f"{error.filename}: {error.strerror}"
    return text if isinstance(error, ValueError | OSError) else None


def hint(stage: str, error: Exception) -> str:
    """How to get the earlier result back, where DVC has removed outs before it ran the stage."""
    try:
        layout = Layout.here()  # what another process runs or DVC will remove is nothing to bring back
        may_be = "DVC_STAGE" in os.environ and layout.root == layout.home and not isinstance(error, Busy)
        outs = layout.locked().get(stage, {}).get("outs", []) if may_be else []
        is_lost = not all((layout.root / out["path"]).exists() for out in outs)
    except (ValueError, OSError):  # the line is about dvc.lock itself, or there are worse things
        is_lost = False
    return f" (`dvc checkout {stage}` brings the earlier result back)" if is_lost else ""


def main(arguments: list[str] | None = None) -> int:
    """Command line; the exit status: 0 done, 1 the user can mend it, 130 and 143 stopped."""
    parser = argparse.ArgumentParser(prog="python -m tasks", description=__doc__)
    parser.add_argument("stage", choices=STAGES)
    stage = parser.parse_args(arguments).stage
    for name, value in (NO_TELEMETRY | GENTLE).items():
        os.environ.setdefault(name, value)
    is_rank = launch.is_rank()
    if not is_rank and (names := launch.leave_out_strangers()):
        why = "set, but nothing was launched: left out (machine.launch asks for several processes)"
        print(f"stackrl: {stage}: {', '.join(names)}: {why}", file=sys.stderr)
    try:
        with stop_on_signals():
            if is_rank:
                launch.become_rank()
            elif "DVC_STAGE" in os.environ:  # by hand, `nohup python -m tasks … &` may outlive its shell
                tie_to_parent()
            result = execute(stage)
    except Stopped as stopped:
        if not launch.leave_word(stopped, None):
            again = "run it again to go on from the last checkpoint"
            print(f"stackrl: {stage}: {stopped}; {again}", file=sys.stderr)
        return stopped.status
    except Exception as error:
        line = reason(error)
        if launch.leave_word(error, None if os.environ.get("STACKRL_TRACEBACK") else line):
            return 1
        if line is None or os.environ.get("STACKRL_TRACEBACK"):
            raise
        print(f"stackrl: {stage}: {line}{hint(stage, error)}", file=sys.stderr)
        return 1
    if not is_rank:
        headline = [f"{name} {value:.5g}" for name, value in result.metrics.items()][:HEADLINE_METRICS]
        note = f"; {result.note}" if result.note else ""
        print(f"stackrl: {stage}: {', '.join(headline) or 'done'}{note}", flush=True)
    return 0


def leave(status: int) -> None:
    """End the process; a rank at once, for a process group that lost a member may wait at exit for ever."""
    if not launch.is_rank():
        sys.exit(status)
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


if __name__ == "__main__":
    streams.settle()
    user.settle()
    leave(main())

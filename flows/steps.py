"""One stage as a Prefect task: `dvc repro --single-item <stage>`; DVC decides whether anything is to do."""

import json
import os
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from prefect import task
from prefect.cache_policies import NO_CACHE
from prefect.client.schemas.objects import State, TaskRun
from prefect.logging import get_run_logger
from prefect.states import Cancelled, Completed, Failed
from prefect.tasks import Task

from flows import busy, process, report
from tasks.run import tracking
from tasks.run.layout import Layout
from tasks.run.locks import is_dvc

OF_DVC = "ERROR: failed to reproduce"
DVC_ADVICE = (  # for a person who called dvc; the last is about a lock that is held
    *("To track the changes", "git add", "To enable auto staging", "dvc config", "Use `dvc push`"),
    "If there are no processes with such PIDs",
)
REFUSED = "Refused"  # name of the state of a stage that declined to run; trying again cannot help


@dataclass(frozen=True, slots=True)
class Order:
    """What a task needs to know to run its stage.

    Attributes:
        layout: where the pipeline stands.
        stage: the stage's word.
        is_forced: run it even if nothing changed.
        seconds: limit of one attempt; None for no limit.
        parent: MLflow run of the whole flow.
    """

    layout: Layout
    stage: str
    is_forced: bool
    seconds: float | None
    parent: str


def may_retry(step: Task, run: TaskRun, state: State) -> bool:
    """Whether a failed stage gets another attempt: not when it declined, nor when the flow is ending."""
    return state.name != REFUSED and not process.STOPPING.is_set()


@task(retry_condition_fn=may_retry, cache_policy=NO_CACHE, persist_result=False)
def run_stage(order: Order) -> State:
    """One attempt at a stage. Its state is Ran, Unchanged, Restored, Failed, Refused or Cancelled."""
    if process.STOPPING.is_set():
        return Cancelled(message="the flow was ended before it")
    order.layout.refusal(order.stage).unlink(missing_ok=True)
    state = judge(order, attempt(order, get_run_logger().info))
    if state.is_completed():
        report.publish(order.layout, order.stage, state.name, order.parent)
    return state


def attempt(order: Order, say: Callable[[str], None]) -> process.Ended:
    """Call dvc, and again where another dvc was at work on these files, as soon as that has ended.

    Args:
        order: what to run.
        say: takes each line: dvc's and the stage's, what was mended before, and whom it waits for.
    """
    root = order.layout.root
    show = lambda line: None if line.lstrip().startswith(DVC_ADVICE) else say(line)  # noqa: E731
    was_gone = False
    while True:
        if mended := busy.mend(root):
            say(f"stackrl: {mended}")
        ended = process.follow(command(order), root, environment(order), show, order.seconds)
        others = busy.blockers(ended.lines) if ended.status else []
        is_gone = not any(map(is_dvc, others))  # has just ended, or left its entry: one more attempt
        if not others or (is_gone and was_gone) or process.STOPPING.is_set():
            return ended
        if not is_gone:
            say(f"stackrl: {order.stage}: waits for {busy.names(others)}, which works in this folder")
            busy.wait_for(others)
        was_gone = is_gone


def command(order: Order) -> list[str]:
    """The dvc call; without --wait-for-lock dvc gives up after 3 s, even on a stage that is just trained."""
    dvc = [sys.executable, "-m", "dvc", "--wait-for-lock", "repro", "--single-item", order.stage]
    return [*dvc, "--force"] if order.is_forced else dvc


def environment(order: Order) -> dict[str, str]:
    """Ours, with the parent run, no buffering, and this Python as `python`: a worker's PATH may be bare."""
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", os.defpath)])
    return {**os.environ, "PATH": path, "PYTHONUNBUFFERED": "1", tracking.PARENT_VARIABLE: order.parent}


def judge(order: Order, ended: process.Ended) -> State:
    """The state that says how an attempt went; a refusal is read from the file that the stage left."""
    if ended.status == 0:
        text = "\n".join(ended.lines)
        is_same = "didn't change, skipping" in text or said_nothing_to_do(order.stage, ended)
        is_cached = "is cached - skipping run" in text
        return Completed(name="Unchanged" if is_same else "Restored" if is_cached else "Ran")
    if process.STOPPING.is_set():
        return Cancelled(message="ended with the flow")
    if ended.is_overdue:
        return Failed(message=f"ran into its limit of {order.seconds / 60:g} minutes (dvc.yaml: meta)")
    refusal = order.layout.refusal(order.stage)
    if refusal.exists():
        return Failed(name=REFUSED, message=json.loads(refusal.read_text(encoding="utf-8"))["reason"])
    if hopeless := busy.in_our_words(ended.lines):
        return Failed(name=REFUSED, message=hopeless)
    return Failed(message=complaint(order.stage, ended))


def said_nothing_to_do(stage: str, ended: process.Ended) -> bool:
    """Whether a stage that DVC always runs found its work done."""
    own = [line for line in ended.lines if line.startswith(f"stackrl: {stage}: ")]
    return bool(own) and own[-1].endswith("up to date")


def complaint(stage: str, ended: process.Ended) -> str:
    """The line that says why: the stage's own closing line, else dvc's reason, else the last before dvc's."""
    own = f"stackrl: {stage}: "
    said = [line.removeprefix(own) for line in ended.lines if line.startswith(own)]
    others = [line for line in ended.lines if not (line.startswith(OF_DVC) and "exited with" in line)]
    reasons = [line.removeprefix("ERROR: ") for line in others if line.startswith("ERROR: ")]
    return (said or reasons or others or [f"dvc ended with status {ended.status}"])[-1]

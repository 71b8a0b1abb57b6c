"""The road along which a flow calls its stages: what to run, in which order, and how it ended.

Retries and time limits stand in dvc.yaml, under `meta`.
"""

import contextvars
import subprocess
import sys
import threading
from contextlib import ExitStack
from types import TracebackType
from typing import Literal, Self
from uuid import UUID

from prefect.client.orchestration import get_client
from prefect.client.schemas.objects import State
from prefect.context import FlowRunContext
from prefect.futures import PrefectFuture
from prefect.logging import get_logger, get_run_logger
from prefect.states import Cancelled, Completed, Failed
from pydantic import BaseModel, Field, model_validator

from flows import graph, process
from flows.steps import Order, run_stage
from tasks.run import tracking
from tasks.run.layout import STAGES, Layout
from tasks.run.locks import held

SECONDS_BETWEEN_LOOKS = 1.0  # at the server, for a wish to cancel
RETRY_DELAY_SECONDS = 5


class Options(BaseModel):
    """What to run; the form in the Prefect UI."""

    preset: str | None = Field(None, description="write params.yaml from it first; none: as it stands")
    overrides: list[str] = Field([], description="with a preset: key=value, e.g. ppo.init_kl_coef=0.05")
    target: Literal[STAGES] = Field("register", description="the last stage to run")
    force: bool = Field(False, description="run every stage, changed or not")

    @model_validator(mode="after")
    def _overrides_need_a_preset(self) -> Self:
        if self.overrides and not self.preset:
            raise ValueError("overrides need a preset, because params.yaml is written whole")
        return self


class Road:
    """`with Road(options) as step: data = step("data"); pack = step("pack", data)`; then `step.verdict`.

    Leaving the block waits for the stages; an exception in it (Ctrl-C, SIGTERM) ends the one that runs.
    """

    def __init__(self, options: Options) -> None:
        self.options, self.layout = options, Layout.here()
        self.stages: dict[str, dict] = {}
        self.needed: set[str] = set()
        self.futures: dict[str, PrefectFuture] = {}
        self.verdict: State = Completed(message="nothing to do")
        self.parent, self.is_cancelled, self.is_over = "", False, threading.Event()
        self.alone = ExitStack()  # holds the lock of this folder: a flow may rewrite params.yaml

    def __enter__(self) -> Self:
        process.start_anew()
        try:
            place = self.layout.root / "scratch" / "flow.lock"
            self.alone.enter_context(held(place, self._say_that_it_waits))
            self._set_out()
        except (ValueError, OSError) as error:
            self.verdict = Failed(message=" ".join(str(error).split()))
        return self

    def _say_that_it_waits(self, holder: str) -> None:
        get_run_logger().info("waits for process %s, a flow in this folder", holder)

    def _set_out(self) -> None:
        """Write params.yaml if asked to, read the graph, open the parent run; one line if it cannot be."""
        if self.options.preset:
            use_preset(self.layout, self.options.preset, self.options.overrides)
        self.stages = self.layout.stages()
        self.layout.locked()  # for its ValueError, before anything runs
        tracking.preflight()
        run = FlowRunContext.get().flow_run
        self.parent = tracking.parent_run("rlhf", {"prefect.flow_run_id": str(run.id)})
        self.needed = graph.needed(graph.upstream(self.stages), self.options.target)
        follow = contextvars.copy_context().run
        threading.Thread(target=follow, args=(self._watch, run.id), daemon=True).start()

    def __call__(self, stage: str, *after: PrefectFuture | None) -> PrefectFuture | None:
        """Submit `stage` to run after others; None when the target does not need it."""
        if stage not in self.needed:
            return None
        meta = self.stages[stage].get("meta", {})
        step = run_stage.with_options(
            name=stage,
            description=self.stages[stage].get("desc"),
            retries=meta.get("retries", 0),
            retry_delay_seconds=meta.get("retry_delay_seconds", RETRY_DELAY_SECONDS),
        )
        minutes = meta.get("timeout_minutes")
        order = Order(self.layout, stage, self.options.force, minutes and 60 * minutes, self.parent)
        self.futures[stage] = step.submit(order, wait_for=[one for one in after if one])
        return self.futures[stage]

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        status = "KILLED"
        try:
            if kind is None:
                self._wait()
                status = "FINISHED" if self.verdict.is_completed() else "FAILED"
        finally:
            self.is_over.set()
            if status == "KILLED":
                process.stop_all()
            self._end_parent("KILLED" if self.is_cancelled else status)
            self.alone.close()

    def _wait(self) -> None:
        for future in self.futures.values():
            future.wait()
        states = {stage: future.state for stage, future in self.futures.items()}
        undone = next((stage for stage, state in states.items() if not state.is_completed()), None)
        if self.is_cancelled:
            self.verdict = Cancelled(message="cancelled")
        elif undone:
            self.verdict = Failed(message=f"{undone}: {states[undone].message}")
        elif states:
            names = (f"{stage} {state.name}" for stage, state in states.items())
            self.verdict = Completed(message=", ".join(names))

    def _end_parent(self, status: str) -> None:
        try:
            if self.parent:
                tracking.end_parent(self.parent, status)
        except Exception as error:  # the stages are done; that MLflow went away meanwhile undoes nothing
            get_logger(__name__).warning("MLflow: the parent run stays open: %s", error)

    def _watch(self, run: UUID) -> None:
        """End the running stage when someone cancels the flow; without a worker nobody else would."""
        with get_client(sync_client=True) as client:
            while not self.is_over.wait(SECONDS_BETWEEN_LOOKS):
                try:
                    state = client.read_flow_run(run).state
                except Exception as error:  # the server may be away for a while; the training is not to mind
                    get_logger(__name__).debug("cannot ask the server: %s", error)
                    continue
                if state and (state.is_cancelling() or state.is_cancelled()):
                    self.is_cancelled = True
                    process.stop_all()
                    return


def use_preset(layout: Layout, preset: str, overrides: list[str]) -> None:
    """Write params.yaml; ValueError with the command's own line when it declines."""
    call = [sys.executable, "-m", "params", "use", preset, *overrides]
    done = subprocess.run(call, cwd=layout.root, capture_output=True, text=True)
    if done.returncode:
        raise ValueError(done.stderr.strip().removeprefix("error: "))

"""What tests do to a training: kill it, look at its gradients, run it in two processes, shard it."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

from accelerate import PartialState
from accelerate.utils import DistributedType
from transformers import TrainerCallback

TESTS = Path(__file__).parent


class Killed(BaseException):
    pass


class KillAt(TrainerCallback):
    def __init__(self, step):
        self.step = step

    def on_step_end(self, args, state, control, **_):
        if state.global_step == self.step:
            raise Killed


class FirstGradients(TrainerCallback):
    def on_pre_optimizer_step(self, args, state, control, model=None, **_):
        if state.global_step == 0:
            self.found = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


def run_in_two(program: str, folder: Path, *arguments: object, beside: str) -> None:
    """A program in two data-parallel processes; it may import what stands beside the file `beside`."""
    (folder / "rank.py").write_text(program)
    path = f"{Path(beside).parent}:{TESTS}:{TESTS.parent}"
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    subprocess.run(
        [*launch, folder / "rank.py", *map(str, arguments)], check=True, timeout=300,
        env={**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip


def shard_on_cpus() -> None:
    """accelerate shards on GPUs alone, and on CPUs leaves FSDP off in silence: say that these are some."""
    PartialState._shared_state["distributed_type"] = DistributedType.MULTI_GPU

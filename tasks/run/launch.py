"""A stage in several processes: `accelerate launch` in a group of its own, and what its ranks leave as word.

The launcher's own output (torch prints pages about a rank that failed) goes to a file. Rank 0 speaks where
the stage would speak alone; what other ranks say goes to that file too. A rank that ends badly leaves a JSON
file that says why, so that the user reads the cause once.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
import traceback
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path

from tasks.run import ranks
from tasks.run.files import remove, write_json
from tasks.run.layout import Layout, Refusal, read_yaml
from tasks.run.lifetime import SECONDS_TO_STOP, Stopped, as_rank, die_with_parent

FOLDER_VARIABLE = "STACKRL_LAUNCH"  # where ranks leave word; set: this process is a rank
LAUNCHER_VARIABLE = "STACKRL_LAUNCHER"  # the process that waits for them
TRAINING = ("sft", "reward", "ppo")  # the other stages run alone, whatever machine.launch says
SHARDED = ("FSDP", "DEEPSPEED")  # accelerate's distributed types that leave no process whole weights
OF_A_LAUNCH = (
    *("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "GROUP_RANK", "ROLE_RANK", "ROLE_WORLD_SIZE"),
    *("MASTER_ADDR", "MASTER_PORT", "PMI_RANK", "PMI_SIZE", "OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_SIZE"),
    *("OMPI_COMM_WORLD_LOCAL_RANK", "MV2_COMM_WORLD_RANK", "MV2_COMM_WORLD_SIZE"),
    "MV2_COMM_WORLD_LOCAL_RANK",
)
OF_ACCELERATE = ("ACCELERATE_", "FSDP_", "TORCHELASTIC_")
SECONDS_BETWEEN_LOOKS = 0.05
LINES_SHOWN = 20


class RankError(ValueError):
    """A rank met an error that is not the user's; its traceback has been shown."""


@dataclass(frozen=True, slots=True)
class LastWord:
    """How a rank ended: ``LastWord(1, "line", "sft: no row", 12.5)``.

    Attributes:
        rank: which.
        kind: `line` or `refusal` (for the user), `traceback`, or `stopped`.
        text: what it is about; for `stopped` the signal's number.
        at: seconds of the clock: the first to end is the cause, the others its consequence.
    """

    rank: int
    kind: str
    text: str
    at: float


def is_rank() -> bool:
    """Whether this process was started by a launcher, ours or `torchrun`.

    A RANK alone says nothing: schedulers set it for every job. Nor does dvc start ranks.
    """
    is_torchrun = {"RANK", "TORCHELASTIC_RUN_ID"} <= os.environ.keys() and "DVC_STAGE" not in os.environ
    return FOLDER_VARIABLE in os.environ or is_torchrun


def leave_out_strangers() -> list[str]:
    """Take what another program's launch left out of the environment; its names.

    torch, transformers and accelerate would wait for processes that are not there, or compute otherwise.
    """
    found = sorted(name for name in os.environ if name in OF_A_LAUNCH or name.startswith(OF_ACCELERATE))
    for name in found:
        del os.environ[name]
    return found


def check_serves(stage: str, file: Path) -> None:
    """Raises ValueError where a launch file cannot serve `stage`: one that shards weights, for ppo."""
    kind = str(read_yaml(file).get("distributed_type", "NO")).upper()
    if stage == "ppo" and kind in SHARDED:
        raise ValueError(
            f"machine.launch is {file.stem}, which shards weights; ppo samples with whole weights on every "
            "GPU: set machine.launch to ddp for it"
        )


def launch(stage: str, file: Path, processes: int, layout: Layout, locks: Sequence[int] = ()) -> None:
    """Run `stage` in the processes that `file` describes, and wait for their end.

    SIGINT and SIGTERM are handed on; no rank outlives this process.

    Args:
        stage: one of TRAINING.
        file: of params/accelerate.
        processes: how many; 0: as many as the file says.
        layout: where the stage stands.
        locks: file descriptors of the stage's locks, held until the launcher has ended however this one does.

    Raises:
        ValueError: what a rank said to the user, or a failed launch.
        Refusal: the stage declined.
        Stopped: a rank was told to stop by somebody else.
    """
    check_serves(stage, file)
    folder = layout.kept("scratch", f"{stage}.launch")
    remove(folder)
    folder.mkdir(parents=True)
    command = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", str(file)]
    command += ["--num_processes", str(processes)] if processes else []
    with (folder / "launcher.log").open("wb") as log:
        process = subprocess.Popen(
            [*command, "-m", "tasks", stage],
            env={**os.environ, FOLDER_VARIABLE: str(folder), LAUNCHER_VARIABLE: str(os.getpid())},
            cwd=layout.root,
            stdin=subprocess.DEVNULL,
            stdout=2,  # rank 0 speaks there
            stderr=log,
            start_new_session=True,
            preexec_fn=die_with_parent,
            pass_fds=tuple(locks),
        )
        status = _wait(process, folder)
    if status:
        _raise(status, folder, processes or int(read_yaml(file)["num_processes"]))
    remove(folder)


def _wait(process: subprocess.Popen, folder: Path) -> int:
    """The launcher's exit status, once nothing of its group is left; what ends this process ends that too."""
    try:
        status = process.wait()
        _end(process.pid, signal.SIGTERM)  # nothing is left after a good end
        return status
    except BaseException as error:
        is_ctrl_c = getattr(error, "status", None) == 130
        _end(process.pid, signal.SIGINT if is_ctrl_c else signal.SIGTERM, process)
        remove(folder)
        raise


def _end(group: int, number: int, leader: subprocess.Popen | None = None) -> None:
    """Tell a group to end and wait for it; what has not ended in time is killed."""
    try:
        os.killpg(group, number)
        deadline = time.monotonic() + SECONDS_TO_STOP
        while time.monotonic() < deadline:
            if leader:
                leader.poll()  # a zombie of ours would count as left
            os.killpg(group, 0)
            time.sleep(SECONDS_BETWEEN_LOOKS)
        os.killpg(group, signal.SIGKILL)
    except ProcessLookupError:
        pass
    except BaseException:  # a second Ctrl-C
        with suppress(ProcessLookupError):
            os.killpg(group, signal.SIGKILL)
        raise


def _raise(status: int, folder: Path, processes: int) -> None:
    word = _cause(folder, processes)
    if word is None:
        said = (folder / "launcher.log").read_text(encoding="utf-8", errors="replace").splitlines()
        print(*said[-LINES_SHOWN:], sep="\n", file=sys.stderr)
        raise RankError(
            f"accelerate launch ended with status {status}, and a rank without a word (out of memory?); "
            f"all it said: {folder / 'launcher.log'}"
        )
    if word.kind == "stopped":
        raise Stopped(int(word.text))
    if word.kind == "refusal":
        raise Refusal(word.text)
    if word.kind == "line":
        raise ValueError(word.text)
    print(word.text, file=sys.stderr)
    raise RankError(f"rank {word.rank}: {word.text.strip().splitlines()[-1]}; the other ranks: {folder}")


def _cause(folder: Path, processes: int) -> LastWord | None:
    """What is for the user before tracebacks, those before `stopped`; of these the first.

    None where a rank said nothing and the others were stopped because of it.
    """
    kinds = ("refusal", "line", "traceback", "stopped")
    words = [LastWord(**json.loads(path.read_text(encoding="utf-8"))) for path in folder.glob("rank-*.json")]
    cause = min(words, key=lambda word: (kinds.index(word.kind), word.at), default=None)
    return None if cause and cause.kind == "stopped" and len(words) < processes else cause


# ---- in a rank


def become_rank() -> None:
    """Live no longer than what started it. Rank 0 speaks to the user, the others into the launcher's file."""
    as_rank(int(os.environ.get(LAUNCHER_VARIABLE) or 0) or None)
    if FOLDER_VARIABLE in os.environ:
        os.dup2(1, 2) if ranks.is_first() else os.dup2(2, 1)


def leave_word(error: BaseException, line: str | None) -> bool:
    """Tell the launcher how this rank ends; whether there is one to tell.

    Args:
        error: what ends it.
        line: the one line for the user, where there is one.
    """
    if not (folder := os.environ.get(FOLDER_VARIABLE)):
        return False
    if isinstance(error, Stopped):
        kind, text = "stopped", str(error.status - 128)
    elif isinstance(error, Refusal):
        kind, text = "refusal", str(error)
    elif line is not None:
        kind, text = "line", line
    else:
        kind, text = "traceback", "".join(traceback.format_exception(error))
    word = LastWord(ranks.rank(), kind, text, time.time())
    write_json(Path(folder) / f"rank-{word.rank}.json", asdict(word), by_every_rank=True)
    return True

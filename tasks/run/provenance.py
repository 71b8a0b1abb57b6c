"""What a run is tagged with: commit, versions, the `dvc repro` that it is part of; never a secret."""

from __future__ import annotations

import logging
import os
import re
import subprocess
import sys
from hashlib import sha256
from importlib import metadata
from pathlib import Path

_log = logging.getLogger(__name__)
VERSIONS = ("torch", "transformers", "dvc", "mlflow")


def git_tags(root: Path) -> dict[str, str]:
    """Commit, and whether the tree differs from it; what the pipeline itself writes does not count.

    None where there is no git or no repository; where there is one that git declines (no commit yet, another
    user's), the log says so.
    """

    def git(*words: str) -> str | None:
        command = ["git", "-C", str(root), *words]
        done = subprocess.run(command, capture_output=True, text=True, errors="replace", check=False)
        if done.returncode and any((one / ".git").exists() for one in (root, *root.parents)):
            _log.warning("git: the MLflow run carries no commit: %s", done.stderr.partition("\n")[0])
        return None if done.returncode else done.stdout.strip()

    try:
        commit = git("rev-parse", "--verify", "HEAD")
        changes = commit and git("status", "--porcelain", "--", ".", ":!dvc.lock", ":!artifacts")
    except OSError:  # no git here
        commit = changes = None
    if commit is None:
        return {}
    return {"mlflow.source.git.commit": commit, "stackrl.git.dirty": str(bool(changes)).lower()}


def version_tags() -> dict[str, str]:
    """Versions of python and of the packages that shape a result."""
    packages = {f"stackrl.version.{name}": _version(name) for name in VERSIONS}
    return {"stackrl.version.python": sys.version.split()[0], **packages}


def execution() -> str:
    """One id for all stages of one `dvc repro`: of the dvc process above this one, else of this one."""
    pid = os.getpid()
    try:
        while pid > 0 and not _is_dvc(pid):
            pid = int(_stat(pid)[1])
        pid = pid or os.getpid()
        return sha256(f"{pid}/{_stat(pid)[19]}".encode()).hexdigest()[:16]
    except OSError:  # no /proc here
        return sha256(f"{os.getppid()}".encode()).hexdigest()[:16]


def _is_dvc(pid: int) -> bool:
    words = Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")
    return any(os.path.basename(word) == b"dvc" for word in words)


def _stat(pid: int) -> list[str]:
    """Fields of /proc/<pid>/stat from the state on: [1] is the parent, [19] the start in clock ticks."""
    return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()


def _version(name: str) -> str:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return "none"


def without_secrets(uri: str) -> str:
    """`uri` without its user and password."""
    return re.sub(r"//[^/@\s]*@", "//", uri)


def one_line(error: Exception) -> str:
    """What went wrong, in 200 characters without passwords."""
    return without_secrets(" ".join(str(error).split()) or type(error).__name__)[:200]

"""A user without a name or a home, as containers run them under any number: libraries ask for both."""

from __future__ import annotations

import getpass
import os
from pathlib import Path


def settle() -> None:
    """Give this process and its children a HOME (scratch/home, where it stands) and a USER if it has none.

    Call it before transformers, MLflow, Prefect or dvc look: they end in a traceback without.
    """
    try:
        Path.home()
    except RuntimeError:
        os.environ["HOME"] = str(Path.cwd() / "scratch" / "home")
    try:
        getpass.getuser()
    except (KeyError, OSError):
        os.environ["USER"] = f"user{os.getuid()}"

"""A command whose standard streams are closed, left by their reader, full, or know only ASCII."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

COMMAND = """
import os, sys
from tasks.run.streams import settle
settle()
first = open(sys.argv[1], "w+")
os.fstat(0), os.fstat(1), os.fstat(2)
for _ in range(3):
    print("…ü" * 40_000, flush=True)
    print("…ü" * 40_000, file=sys.stderr, flush=True)
assert sys.stdin.read() == "" and first.fileno() > 2, first.fileno()
import subprocess
subprocess.run([sys.executable, "-c", "print('child')"], check=True)
open(sys.argv[1], "a").write("done")
"""


@pytest.mark.parametrize(
    "redirect", ["<&-", ">&-", "2>&-", "<&- >&- 2>&-", ">/dev/full", "| true", "2>&1 | true"]
)
@pytest.mark.parametrize("more", [{}, {"PYTHONIOENCODING": "ascii"}], ids=["utf-8", "ascii"])
def test_a_command_goes_on(tmp_path, redirect, more):
    (tmp_path / "command.py").write_text(COMMAND)
    line = f"{sys.executable} command.py out {redirect}"
    done = subprocess.run(
        ["bash", "-c", f"set -o pipefail; {line}"],
        cwd=tmp_path,
        env={**os.environ, **more},
        input="",
        capture_output=True,
        text=True,
    )
    text = (tmp_path / "out").read_text() if (tmp_path / "out").exists() else ""
    assert text == "done", done.stderr[-500:]
    assert "UnicodeEncodeError" not in done.stderr and "BrokenPipe" not in done.stderr

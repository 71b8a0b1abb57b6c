"""The line that tells where a long stage is; time is a clock the test turns."""

from __future__ import annotations

import io
from types import SimpleNamespace

import pytest

from tasks.run import progress
from tasks.run.progress import Progress


class Screen(io.StringIO):
    def __init__(self, is_terminal: bool) -> None:
        super().__init__()
        self.is_terminal = is_terminal

    def isatty(self) -> bool:
        return self.is_terminal


@pytest.fixture
def clock(monkeypatch):
    now = [100.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: now[0])
    return now


@pytest.fixture(params=[False, True], ids=["log", "terminal"])
def screen(request, monkeypatch):
    screen = Screen(request.param)
    monkeypatch.setattr(progress, "sys", SimpleNamespace(stderr=screen))
    return screen


def test_the_line_by_hand(clock):
    """120 steps in 8 s: 15 a second, so that the other 480 take 32 s; 329,600 tokens in 8 s."""
    bar = Progress("sft", 600)
    clock[0] += 8
    bar.update(120, 329_600, loss=1.2341)
    assert bar.line() == "sft 120/600 20 % · 41,200 tokens/s · 0:32 left · loss 1.234"
    assert bar.rate == 41_200


def test_a_resumed_run_counts_its_own_steps_for_the_time_left(clock):
    bar = Progress("ppo", 60, done=40)
    assert bar.line() == "ppo 40/60 66 % · 0:00 left"
    clock[0] += 50
    bar.update(50)
    assert bar.line() == "ppo 50/60 83 % · 0:50 left"


def test_units_add_up_and_values_stay(clock):
    bar = Progress("pack", 3, unit="rows")
    for done in (1, 2):
        clock[0] += 100
        bar.update(done, 5000, **({"fill": 0.5} if done == 1 else {}))
    assert bar.line() == "pack 2/3 66 % · 50 rows/s · 1:40 left · fill 0.500"


def test_a_log_gets_a_line_every_few_seconds_and_the_last(clock, screen):
    with Progress("sft", 22) as bar:
        for step in range(1, 23):
            clock[0] += 1
            bar.update(step)
    seen = screen.getvalue()
    if screen.is_terminal:
        assert seen.count("\r") == 21 and seen.count("\n") == 1 and seen.endswith("0:00 left\n")
    else:
        steps = [line.split()[1] for line in seen.splitlines()]
        assert steps == ["5/22", "10/22", "15/22", "20/22", "22/22"] and "\r" not in seen


def test_a_broken_bar_leaves_the_terminal_on_a_new_line(clock, screen):
    with pytest.raises(KeyboardInterrupt), Progress("sft", 20) as bar:
        clock[0] += 9
        bar.update(3)
        raise KeyboardInterrupt
    assert screen.getvalue().endswith("left\r\n" if screen.is_terminal else "left\n")


def test_nothing_to_do_is_no_error(clock):
    assert Progress("sft", 0).line() == "sft 0/0 0 % · 0:00 left"

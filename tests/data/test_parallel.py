import os
import signal
import time

import pytest

from tasks.data.parallel import Crew


def work(number: int) -> tuple[int, int]:
    time.sleep(0.02 * (number % 3))  # later ones end earlier
    if number < 0:
        raise ValueError(f"number {number}")
    return number, os.getpid()


def fall(number: int) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


@pytest.mark.parametrize(("processes", "start"), [(1, True), (2, False), (2, True)])
def test_results_in_order(processes, start):
    with Crew(processes) as crew:
        if start:
            crew.start()
        found = list(crew.map(work, range(12)))
    assert [number for number, _ in found] == list(range(12))
    others = {process for _, process in found} - {os.getpid()}
    assert len(others) <= 2 and bool(others) == (processes == 2 and start)


def test_a_producer_that_pushes_gets_them_in_order_while_it_does():
    with Crew(2) as crew:
        crew.start()
        found = []
        queue = crew.queue(work, found.append)
        for number in range(12):
            queue.put(number)
        assert 0 < len(found) < 12
        queue.close()
    assert [number for number, _ in found] == list(range(12))


@pytest.mark.parametrize("start", [False, True])
def test_an_error_comes_in_its_turn(start):
    with Crew(2) as crew:
        if start:
            crew.start()
        numbers = crew.map(work, [1, 2, -3, 4])
        assert [next(numbers)[0], next(numbers)[0]] == [1, 2]
        with pytest.raises(ValueError, match="number -3"):
            next(numbers)


def test_a_killed_process_is_an_error_for_users():
    with Crew(2) as crew:
        crew.start()
        with pytest.raises(ChildProcessError, match=r"was killed, .*machine\.threads"):
            list(crew.map(fall, range(4)))

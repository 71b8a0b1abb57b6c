"""A function over many items on several cores, results in the order of the items."""

from __future__ import annotations

import signal
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from typing import TypeVar

from tasks.run.lifetime import tie_to_parent

A, B = TypeVar("A"), TypeVar("B")


def ordered_map(function: Callable[[A], B], items: Iterable[A], processes: int) -> Iterator[B]:
    """`map`, in `processes` other processes where these are more than one; few items wait at any time.

    Args:
        function: of a module, so that another process can import it.
        items: small enough to be sent.
        processes: 1: in this one.
    """
    if processes == 1:
        yield from map(function, items)
        return
    # spawn: a forked child of a process with threads may hang
    with ProcessPoolExecutor(processes, get_context("spawn"), initializer=_start) as pool:
        running: deque = deque()
        try:
            for item in items:
                running.append(pool.submit(function, item))
                if len(running) > 2 * processes:
                    yield running.popleft().result()
            while running:
                yield running.popleft().result()
        finally:
            pool.shutdown(wait=True, cancel_futures=True)


def _start() -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches all; the parent ends its children
    tie_to_parent()

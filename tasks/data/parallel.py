"""A function over many items on several cores, results in the order of the items."""

from __future__ import annotations

import ctypes
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from multiprocessing import get_context
from typing import Generic, TypeVar

import pyarrow as pa

from tasks.run.lifetime import as_worker

M_ARENA_MAX = -8  # malloc.h
A, B = TypeVar("A"), TypeVar("B")


class Crew:
    """Other processes, once they are worth their start; until then this one does the work. A context.

    Args:
        processes: how many; 1: only this one, ever.
    """

    def __init__(self, processes: int) -> None:
        spare_memory()
        self._processes = processes
        self._pool: ProcessPoolExecutor | None = None

    def __enter__(self) -> Crew:
        return self

    def __exit__(self, *error: object) -> None:
        if self._pool:
            self._pool.shutdown(wait=True, cancel_futures=True)

    def start(self) -> None:
        """From now on, others work; again does nothing."""
        if self._processes > 1 and not self._pool:
            # spawn: a forked child of a process with threads may hang
            self._pool = ProcessPoolExecutor(self._processes, get_context("spawn"), initializer=_begin)

    def map(self, function: Callable[[A], B], items: Iterable[A]) -> Iterator[B]:
        """`map`, in order; few items wait at any time. The function is a module's, the items can be sent."""
        found: deque[B] = deque()
        queue = self.queue(function, found.append)
        for item in items:
            queue.put(item)
            while found:
                yield found.popleft()
        while len(queue):
            queue.take_until(len(queue) - 1)
            yield found.popleft()

    def queue(self, function: Callable[[A], B], take: Callable[[B], object]) -> Queue[A, B]:
        """`map` for a producer that pushes: `take` gets the results, in order, while it does."""
        return Queue(self, function, take)

    def submit(self, function: Callable[[A], B], item: A) -> Future[B]:
        """The result, soon; whatever the function raises is in it."""
        if self._pool:
            return self._pool.submit(function, item)
        future: Future[B] = Future()
        try:
            future.set_result(function(item))
        except Exception as error:
            future.set_exception(error)
        return future

    @property
    def most_waiting(self) -> int:
        """How many items may be on their way."""
        return 2 * self._processes if self._pool else 0


class Queue(Generic[A, B]):
    """Items in, results out in the same order."""

    def __init__(self, crew: Crew, function: Callable[[A], B], take: Callable[[B], object]) -> None:
        self._crew, self._function, self._take = crew, function, take
        self._running: deque[Future[B]] = deque()

    def put(self, item: A) -> None:
        """Waits, while many are on their way, for the first of them."""
        self._running.append(self._crew.submit(self._function, item))
        self.take_until(self._crew.most_waiting)

    def close(self) -> None:
        """Wait for all."""
        self.take_until(0)

    def __len__(self) -> int:
        """How many items are on their way."""
        return len(self._running)

    def take_until(self, most: int) -> None:
        """Wait until no more than so many are on their way.

        Raises:
            ChildProcessError: a process was killed.
        """
        while len(self._running) > most:
            try:
                result = self._running.popleft().result()
            except BrokenProcessPool:
                raise ChildProcessError(
                    "a process of the data stage was killed, most likely for want of memory; a smaller "
                    "machine.threads needs less"
                ) from None
            self._take(result)


def spare_memory() -> None:
    """Arrow and all threads take memory from one place: pools of their own would keep a third more."""
    pa.set_memory_pool(pa.system_memory_pool())
    libc = ctypes.CDLL(None)
    if hasattr(libc, "mallopt"):
        libc.mallopt(M_ARENA_MAX, 1)


def _begin() -> None:
    spare_memory()
    pa.set_cpu_count(1)  # there is one such process for each core
    as_worker()

"""Processes that work side by side for hours."""

from __future__ import annotations

import multiprocessing
from collections import deque
from collections.abc import Callable
from concurrent.futures import BrokenExecutor, Executor, Future, ProcessPoolExecutor
from dataclasses import dataclass
from functools import partial
from typing import Any


@dataclass
class _Worker:
    """A process and what it does now."""

    executor: ProcessPoolExecutor
    limit: int
    taken: int = 0
    at_work: Future[Any] | None = None

    @property
    def is_busy(self) -> bool:
        return self.at_work is not None and not self.at_work.done()

    @property
    def is_spent(self) -> bool:
        """It has done its share, or has died."""
        died = self.at_work is not None and isinstance(self.at_work.exception(), BrokenExecutor)
        return died or self.taken >= self.limit


class Workers(Executor):
    """Processes that do one thing at a time and are replaced after some; one that dies takes only its own work along.

    ``ProcessPoolExecutor(max_tasks_per_child=...)`` replaces its processes too, and hangs when all of them end at once
    (python/cpython#115634). Work is handed out by the calling thread alone, so nothing begins after Ctrl-C.

    Args:
        count: How many.
        limit: Calls that one takes before another takes its place.
        begin: What each does first.
    """

    def __init__(self, count: int, limit: int, begin: Callable[[], None] | None = None) -> None:
        self._queue: deque[tuple[Future[Any], Callable[[], Any]]] = deque()
        self._limit, self._begin = limit, begin
        self._workers = [self._new() for _ in range(count)]

    def submit(self, function: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Future[Any]:
        """Queue a call."""
        future: Future[Any] = Future()
        self._queue.append((future, partial(function, *args, **kwargs)))
        self.hand_out()
        return future

    def hand_out(self) -> None:
        """Give what waits to whoever is free."""
        for k, worker in enumerate(self._workers):
            if not self._queue or worker.is_busy:
                continue
            if worker.is_spent:
                worker.executor.shutdown(wait=False)
                worker = self._workers[k] = self._new()
            future, call = self._queue.popleft()
            worker.taken += 1
            worker.at_work = worker.executor.submit(call)
            worker.at_work.add_done_callback(partial(_pass_on, future))

    def _new(self) -> _Worker:
        context = multiprocessing.get_context("spawn")
        return _Worker(ProcessPoolExecutor(1, mp_context=context, initializer=self._begin), self._limit)

    def shutdown(self, wait: bool = True, *, cancel_futures: bool = False) -> None:
        """End the processes once they have done what they do; what waits is dropped."""
        for future, _ in self._queue:
            future.cancel()
        self._queue.clear()
        for worker in self._workers:
            worker.executor.shutdown(wait=wait, cancel_futures=cancel_futures)


def _pass_on(future: Future[Any], done: Future[Any]) -> None:
    if (error := done.exception()) is not None:
        future.set_exception(error)
    else:
        future.set_result(done.result())

"""The processes that cells run in: replaced after some, and independent of each other's death."""

import os
from concurrent.futures import wait
from concurrent.futures.process import BrokenProcessPool

from craft_opt.bridge.report.workers import Workers


def work(number):
    if number == 2:
        os._exit(1)
    return number, os.getpid()


def test_workers_are_replaced_and_one_that_dies_takes_only_its_own_work_along():
    with Workers(2, limit=2) as workers:
        futures = [workers.submit(work, number) for number in range(6)]
        while not all(future.done() for future in futures):
            wait(futures, timeout=0.2)
            workers.hand_out()
        assert isinstance(futures.pop(2).exception(), BrokenProcessPool)
        found = dict(future.result() for future in futures)
        assert sorted(found) == [0, 1, 3, 4, 5]
        processes = list(found.values())
        assert max(processes.count(process) for process in processes) <= 2
        # Whoever ends last has nobody waiting for a process that nobody starts.
        assert workers.submit(work, 7).result(timeout=120)[0] == 7


def test_what_waits_is_dropped_at_the_end():
    workers = Workers(1, limit=2)
    first, second = workers.submit(work, 0), workers.submit(work, 1)
    workers.shutdown()
    assert first.result()[0] == 0
    assert second.cancelled()

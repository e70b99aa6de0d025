"""Independent jobs on several processes, where one that fails or dies takes no other's result with it."""

import multiprocessing
import sys
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from typing import Generic, NamedTuple, TypeVar

J = TypeVar("J")
R = TypeVar("R")


class Outcome(NamedTuple, Generic[J, R]):
    """What came of all jobs."""

    results: dict[J, R]
    failures: dict[J, str]  # what each that has no result died of


def run_jobs(
    jobs: Sequence[J], work: Callable[[J], R], processes: int, told: Callable[[J, R], None] = lambda _job, _result: None
) -> Outcome[J, R]:
    """Run jobs, longest first where the caller knows them.

    Args:
        jobs: hashable, each once.
        work: does one; importable by a new process, as its arguments and results are sent there and back.
        processes: how many at once; 1 runs them here.
        told: is called after each that succeeds.
    """
    done: Outcome[J, R] = Outcome({}, {})
    if processes == 1:
        for job in jobs:
            _note(job, lambda job=job: work(job), done, told)
        return done
    _run_at_once(jobs, work, processes, done, told)
    # a process that dies takes the other processes' jobs with it, and nobody knows whose fault it was: now each alone
    for job in jobs:
        if job not in done.results and job not in done.failures:
            _run_at_once([job], work, 1, done, told)
            if job not in done.results:
                done.failures.setdefault(job, "its process died")
    return done


def _run_at_once(
    jobs: Sequence[J], work: Callable[[J], R], processes: int, done: Outcome[J, R], told: Callable[[J, R], None]
) -> None:
    # spawn: a fork would copy torch's threads as they stand, locks included
    executor = ProcessPoolExecutor(processes, mp_context=multiprocessing.get_context("spawn"))
    try:
        futures: dict[Future[R], J] = {executor.submit(work, job): job for job in jobs}
        for future in as_completed(futures):
            if not isinstance(future.exception(), BrokenProcessPool):
                _note(futures[future], future.result, done, told)
        executor.shutdown()
    except BaseException:
        executor.shutdown(wait=False, cancel_futures=True)
        for child in multiprocessing.active_children():
            child.terminate()
        raise


def _note(job: J, get: Callable[[], R], done: Outcome[J, R], told: Callable[[J, R], None]) -> None:
    try:
        result = get()
    except Exception as error:  # noqa: BLE001  # a run of half an hour must not be lost to one job
        done.failures[job] = f"{type(error).__name__}: {error}"
        print(f"{job}: {done.failures[job]}", file=sys.stderr)
        return
    done.results[job] = result
    told(job, result)

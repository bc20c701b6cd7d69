"""Jobs in processes of their own, one thread each: a small model gains more from a second training beside it than from a second
thread, and its numbers do not depend on how many cores a machine has."""

from __future__ import annotations

import multiprocessing
import os
import threading
import traceback
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from multiprocessing.connection import Connection, wait
from pathlib import Path

import torch

LOOK_EVERY = 0.5  # seconds between two calls of on_wait
# glibc gives freed blocks of a megabyte back to the system at once, and taking them anew is 6 % of a small model's training step;
# read when a process starts, and by no other allocator
KEEP_FREED_MEMORY = {
    "MALLOC_MMAP_MAX_": "0",
    "MALLOC_TRIM_THRESHOLD_": str(2**32),
    "MALLOC_TOP_PAD_": str(2**28),
}


def run_apart(
    function: Callable,
    jobs: Iterable[tuple],
    *,
    num_workers: int,
    log: Path,
    on_wait: Callable[[list[tuple]], None],
) -> Iterator[tuple[tuple, object]]:
    """(job, function(*job)) of each job as it ends, num_workers at a time in the jobs' order.

    function and jobs must be importable and picklable. log: file that takes what the processes write to standard error.
    on_wait(the jobs that are running) is called about twice a second. The processes end when this one does, however that comes.
    Raises a job's ValueError as it is, and RuntimeError for anything else that ends one; the others are then stopped.
    """
    waiting = deque(jobs)
    context = multiprocessing.get_context("spawn")  # a fork would copy the state of torch's threads
    busy: dict[Connection, tuple] = {}
    processes = []
    try:
        for _ in range(min(num_workers, len(waiting))):
            here, there = context.Pipe()
            processes.append(context.Process(target=_serve, args=(function, there, str(log)), daemon=True))
            with _environment(KEEP_FREED_MEMORY):
                processes[-1].start()
            there.close()  # so that its end is seen here
            busy[here] = waiting.popleft()
            here.send(busy[here])
        while busy:
            for connection in wait(list(busy), LOOK_EVERY):
                job = busy.pop(connection)
                result = _receive(connection, job, log)
                if waiting:
                    busy[connection] = waiting.popleft()
                connection.send(busy.get(connection))  # None: no more
                yield job, result
            on_wait(list(busy.values()))
    except BaseException:
        for process in processes:
            process.kill()
        raise
    finally:
        for process in processes:
            process.join()


@contextmanager
def _environment(variables: dict[str, str]) -> Iterator[None]:
    """With these environment variables, but for those that are set already."""
    added = {name: value for name, value in variables.items() if name not in os.environ}
    os.environ.update(added)
    try:
        yield
    finally:
        for name in added:
            del os.environ[name]


def _receive(connection: Connection, job: tuple, log: Path):
    try:
        error, result = connection.recv()
    except EOFError:
        raise RuntimeError(
            f"the process of {job[0]} ended without a word; it may have run out of memory: pass fewer --workers. Its last words "
            f"are in {log}"
        ) from None
    if isinstance(error, ValueError):
        raise error
    if error:
        raise RuntimeError(f"{job[0]} failed:\n{error}")
    return result


def _serve(function: Callable, connection: Connection, log: str) -> None:
    """A process: do what comes down the pipe, one job after another."""
    threading.Thread(target=_end_with_the_parent, daemon=True).start()
    with open(log, "ab", buffering=0) as file:
        os.dup2(file.fileno(), 2)  # progress bars of several processes would overwrite each other
    torch.set_num_threads(1)
    while (job := connection.recv()) is not None:
        try:
            answer = None, function(*job)
        except ValueError as error:
            answer = ValueError(str(error)), None
        except Exception:  # told to the parent, which ends
            answer = traceback.format_exc(), None
        connection.send(answer)


def _end_with_the_parent() -> None:
    multiprocessing.parent_process().join()
    os._exit(1)

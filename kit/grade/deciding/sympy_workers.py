"""Ask sympy in worker processes whether two expressions are equal, and kill a worker at the deadline.

The parent sends trees (kit/grade/trees.py) as one line of JSON and waits on a queue with a timeout. A worker
that does not answer in time is killed, and its successor starts at once in the background. The parent keeps
the time, so this works in any thread and on any system. A worker is a plain `python -c` process that runs
sympy_worker.py: multiprocessing's spawn would run the caller's script again if that has no `__main__` guard.
Workers start with the first question. An idle one ends when its standard input closes, that is, when the
parent ends for any reason.
"""

from __future__ import annotations

import atexit
import json
import os
import queue
import subprocess
import sys
import threading
import time
from contextlib import suppress
from pathlib import Path

from kit.grade.limits import Undecided
from kit.grade.trees import Node, to_json

MAX_WORKERS = 2  # each takes about 70 MiB; a third thread waits, within its deadline
START_UP = 60.0  # seconds that importing sympy may take on a busy machine before the worker is given up

# the caller's folder ("") must not be searched: it may hold a sympy.py or a random.py
_SERVE = (
    "import sys; sys.path[:] = [sys.argv[1], *filter(None, sys.path)]; "
    "from kit.grade.deciding.sympy_worker import serve; serve()"
)


class Worker:
    """One worker process, and the thread that reads its answers."""

    def __init__(self):
        self.started = time.monotonic()
        self.answers: queue.SimpleQueue = queue.SimpleQueue()
        self.ready = False
        self.process = subprocess.Popen(
            [sys.executable or "python", "-c", _SERVE, str(Path(__file__).resolve().parents[3])],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            env={**os.environ, "PYTHONIOENCODING": "ascii", "OMP_NUM_THREADS": "1"},
        )
        threading.Thread(target=self._read, daemon=True, name="kit-grade-worker").start()

    def _read(self) -> None:
        with self.process.stdout as lines:
            for line in lines:
                self.answers.put(json.loads(line))
        self.answers.put(None)  # the process has ended

    def wait_ready(self, deadline_at: float) -> bool:
        """Whether the worker has imported sympy by the deadline."""
        if not self.ready:
            try:
                self.ready = self.answers.get(timeout=max(0.0, deadline_at - time.monotonic())) == "ready"
            except queue.Empty:
                return False
        return self.ready

    def ask(self, question: dict, deadline_at: float) -> dict | None:
        """Return the answer, or None if the process ended. Raises queue.Empty at the deadline."""
        try:
            self.process.stdin.write(json.dumps(question).encode() + b"\n")
            self.process.stdin.flush()
        except BrokenPipeError:
            return None
        return self.answers.get(timeout=max(0.0, deadline_at - time.monotonic()))

    def kill(self) -> None:
        """End the process and close its pipe."""
        self.process.kill()
        self.process.wait()
        with suppress(BrokenPipeError):  # it did not read the last question
            self.process.stdin.close()


class Pool:
    """At most MAX_WORKERS workers, which start when first needed; one thread at a time uses each."""

    def __init__(self):
        self.condition = threading.Condition()
        self.idle: list[Worker] = []
        self.all: set[Worker] = set()

    def borrow(self, deadline_at: float) -> Worker:
        """Return an idle worker, or a new one if there may be more. Raises Undecided at the deadline."""
        with self.condition:
            while True:
                while self.idle:
                    worker = self.idle.pop()
                    if worker.process.poll() is None:
                        return worker
                    worker.kill()  # it ended while it was idle: close its pipe
                    self.all.discard(worker)
                if len(self.all) < MAX_WORKERS:
                    self._start()
                elif not self.condition.wait(max(0.0, deadline_at - time.monotonic())):
                    raise Undecided("deadline: every worker is busy")

    def give_back(self, worker: Worker, usable: bool) -> None:
        """Let other threads use the worker; if it is not usable, kill it and start another."""
        with self.condition:
            self.condition.notify()
            if usable:
                self.idle.append(worker)
                return
            worker.kill()
            self.all.discard(worker)
            self._start()  # its successor imports sympy while the parent continues

    def _start(self) -> None:
        worker = Worker()
        self.all.add(worker)
        self.idle.append(worker)

    def close(self) -> None:
        """Kill all workers."""
        with self.condition:
            for worker in self.all:
                worker.kill()
            self.all.clear()
            self.idle.clear()


_pool: Pool | None = None
_pool_lock = threading.Lock()


def pool() -> Pool:
    """Return the pool of this process."""
    global _pool
    with _pool_lock:
        if _pool is None:
            _pool = Pool()
            atexit.register(_pool.close)
        return _pool


def _forget() -> None:
    """Give a forked child a pool of its own: two processes on one pipe would take each other's answers."""
    global _pool, _pool_lock
    if _pool is not None:
        atexit.unregister(_pool.close)
    _pool, _pool_lock = None, threading.Lock()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget)


def start_worker(seconds: float = START_UP) -> bool:
    """Start a worker, wait until it has imported sympy, and return whether it has.

    Then no question spends its deadline on that import.
    """
    deadline_at = time.monotonic() + seconds
    worker = pool().borrow(deadline_at)
    ready = worker.wait_ready(deadline_at)
    pool().give_back(worker, ready or worker.process.poll() is None)
    return ready


def prove(a: Node, b: Node, deadline_at: float) -> bool:
    """Whether two expressions are equal by sympy. Raises Undecided, with the reason, if it cannot tell."""
    if time.monotonic() >= deadline_at:
        raise Undecided("deadline")
    try:
        answer = _ask(pool(), {"a": to_json(a), "b": to_json(b)}, deadline_at)
    except OSError as error:
        raise Undecided(f"no worker could be started: {error}") from error
    except queue.Empty:
        raise Undecided("deadline") from None
    if answer is None:
        raise Undecided("the worker ran into its limits")
    if answer["equal"] is None:
        raise Undecided(answer["reason"])
    return answer["equal"]


def _ask(workers: Pool, question: dict, deadline_at: float) -> dict | None:
    """Return a worker's answer, or None if it ended. Raises Undecided if none is ready by the deadline."""
    worker = workers.borrow(deadline_at)
    usable = False
    try:
        if not worker.wait_ready(deadline_at):
            usable = worker.process.poll() is None and time.monotonic() - worker.started < START_UP
            raise Undecided(
                "deadline: the worker is still starting" if usable else "the worker could not start"
            )
        answer = worker.ask({**question, "seconds": deadline_at - time.monotonic()}, deadline_at)
        usable = answer is not None and not answer.get("exhausted", False)
        return answer
    finally:
        workers.give_back(worker, usable)

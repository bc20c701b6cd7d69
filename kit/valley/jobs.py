"""Run a study's jobs, each in a process of its own: several at once, one per core or one per card.

Several processes, on any machines, may do so in one study at once; kit/valley/claims.py says which of them
runs what. Each stays until all jobs have ended, so that the jobs of a machine that dies are taken over.

A run that fails costs nothing but itself. Its error and the last lines of its log go to the journal, the
others go on, and what needs it is not started. Resuming keeps the runs that are done and starts the others
again with --resume, so that they go on inside their folders.

Importing torch and transformers takes seconds, longer than a small run of the toy. If the runs share a CPU,
one clean process imports the recipes once and is forked for every run; it never computes, so a fork loses no
threads. On a card every run starts from scratch: seconds do not matter there, and CUDA does not survive a
fork.
"""

from __future__ import annotations

import importlib
import multiprocessing
import os
import re
import shlex
import signal
import sys
import threading
import time
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from multiprocessing import connection, forkserver
from pathlib import Path

from kit.command import start
from kit.config import as_flag
from kit.journal import NUMBER, Journal, Kind
from kit.progress import Progress
from kit.run import numbered
from kit.valley.claims import JOURNAL, PROCESSES, Claims

LOG = "log.txt"
DONE, FAILED = "done", "failed"
# a job that is tried again ends again, so its name is not a key: its last row counts
OUTCOME = Kind(
    "outcome", {"job": str, "status": str, "seconds": NUMBER, "error": str, "tail": list, "log": str}
)
TAIL = 12  # lines of the log that are kept with a failure
LOOK_EVERY = 1.0  # seconds between two looks at how far the runs are, here and elsewhere
END_WITHIN = 900.0  # seconds for a run to finish a step and write a checkpoint, before it is killed
ORPHANED = 75  # exit status of a run whose study is gone; nobody is left to read it
# what a traceback ends with
MESSAGE = re.compile(r"^(?:[A-Za-z_][\w.]*(?:Error|Exception|Exit|Interrupt)\b|error:)")
# glibc returns freed blocks of a megabyte to the system at once; mapping them again is 6 % of a small model's
# training step. Read when a process starts, by no other allocator.
KEEP_FREED_MEMORY = {
    "MALLOC_MMAP_MAX_": "0",
    "MALLOC_TRIM_THRESHOLD_": str(2**32),
    "MALLOC_TOP_PAD_": str(2**28),
}
# what recipes import only when they load a model
PRELOADED = ("kit.models.load_any", "transformers.models.llama.modeling_llama")


@dataclass(frozen=True)
class Job:
    """A run of a recipe."""

    name: str
    recipe: str  # module with Config, main, SMOKE and, if it has any, PRESETS
    settings: Mapping[str, object]  # of the recipe
    folder: Path  # its run folder
    needs: tuple[str, ...] = ()  # names of the jobs that must be done first
    flags: tuple[str, ...] = ()  # further flags, as typed; they come after the settings
    problem: str = ""  # why it cannot be run at all; "" = it can

    def command(self) -> list[str]:
        """Return the flags of the recipe."""
        resume = ["--resume"] if (self.folder / "config.json").is_file() else []
        flags = [as_flag(name, value, "=") for name, value in self.settings.items()]
        return [*flags, *self.flags, f"--out={self.folder}", *resume]

    def obstacle(self, state: Mapping[str, str]) -> str:
        """Return why it can never start; "" = it can, at the latest when its needs are done."""
        broken = [name for name in self.needs if state.get(name) == FAILED]
        return self.problem or (f"it needs {', '.join(broken)}, which failed" if broken else "")


@dataclass(frozen=True)
class Outcome:
    """How a job ended; a line of the journal."""

    job: str
    status: str  # DONE or FAILED
    seconds: float = 0.0  # wall time of this attempt
    error: str = ""
    tail: tuple[str, ...] = ()  # last lines of its log
    log: str = ""


def read_outcomes(path: Path, *, tried: Collection[Path] = ()) -> dict[str, Outcome]:
    """Read the last outcome of every job that has ended, by name, from the journals of all processes.

    tried: folders of journals whose failures do not count.
    """
    found: dict[str, Outcome] = {}
    for folder in (path, *numbered(path / PROCESSES)):
        for row in Journal(folder / JOURNAL, OUTCOME).read():
            outcome = Outcome(**{name: row[name] for name in OUTCOME.fields} | {"tail": tuple(row["tail"])})
            before = found.get(outcome.job)
            # what is done is not started again, but another process may have tried it while it was running
            if not (before and before.status == DONE) and not (outcome.status == FAILED and folder in tried):
                found[outcome.job] = outcome
    return found


@dataclass(frozen=True)
class Worker:
    """What one run at a time computes on: one core of a CPU, or one card and all cores."""

    on_card: bool = False
    card: str = ""  # as CUDA_VISIBLE_DEVICES takes it; "" = the first that CUDA shows


def workers_of(device: str, gpus: str, workers: int) -> list[Worker]:
    """Return one worker per card in `gpus`, or, on a CPU, `workers` of them.

    gpus: numbers with commas between them; "" = one worker. workers: 0 = one per core. A small model gains
    more from a second run beside it than from a second thread, and its numbers do not depend on how many
    cores there are. Raises ValueError for a setting of the other device.
    """
    if device == "cuda":
        if workers:
            raise ValueError(
                f"workers is {workers} but device is cuda, where cards are counted instead; pass --gpus 0,1"
            )
        return [Worker(True, card.strip()) for card in gpus.split(",")]
    if gpus:
        raise ValueError(f"gpus is {gpus!r} but device is {device}; pass --device cuda, or --workers instead")
    return [Worker()] * (workers or os.cpu_count() or 1)


def run_jobs(jobs: Sequence[Job], path: Path, workers: Sequence[Worker], claims: Claims) -> Iterator[Outcome]:
    """Run every job that is neither done nor run by another process, and yield each outcome as it comes.

    path: the study's folder. Jobs start in their order; one whose needs are still running waits. What failed
    is tried again if the process that saw it had ended before this one began. The runs end when this
    generator or this process does, however that comes.
    """
    journal, tried = Journal(claims.folder / JOURNAL, OUTCOME), {path, *claims.ended}
    elsewhere = {name for job in jobs for name in job.needs} - {job.name for job in jobs}

    def ended_so_far() -> dict[str, str]:
        found = {name: outcome.status for name, outcome in read_outcomes(path, tried=tried).items()}
        return dict.fromkeys(elsewhere, FAILED) | found  # nothing here will run those

    state, idle, running = ended_so_far(), list(workers), []
    context = _context([job for job in jobs if job.name not in state], workers)
    with Progress("study", "runs", len(jobs), sum(job.name in state for job in jobs)) as progress:
        try:
            while waiting := [job for job in jobs if job.name not in state]:
                started = {run.job.name for run in running}
                waiting = [job for job in waiting if job.name not in started]
                blocked = {job.name: why for job in waiting if (why := job.obstacle(state))}
                ended = [Outcome(name, FAILED, error=f"not started: {why}") for name, why in blocked.items()]

                for job in waiting:
                    ready = job.name not in blocked and all(state.get(name) == DONE for name in job.needs)
                    if idle and ready and claims.take(job.folder) and job.name not in ended_so_far():
                        running.append(_Running(job, idle.pop(0), context))

                if running and not ended:
                    connection.wait([run.process.sentinel for run in running], LOOK_EVERY)
                elif not ended:
                    time.sleep(LOOK_EVERY)
                for run in [run for run in running if not run.process.is_alive()]:
                    running.remove(run)
                    idle.append(run.worker)
                    ended.append(run.outcome())
                for run in [run for run in running if claims.is_lost(run.job.folder)]:
                    running.remove(run)
                    idle.append(run.worker)
                    run.process.kill()
                    run.process.join()

                for outcome in ended:
                    journal.append(asdict(outcome))
                state = ended_so_far()
                left = sum(job.name not in state for job in jobs)
                progress.text = ", ".join(map(str, running)) or ("others still run" if left else "")
                while progress.done < len(jobs) - left:
                    progress.update()
                yield from ended
        finally:
            _end(running)


def _end(running: Sequence[_Running]) -> None:
    """End runs early: ask them to save what they have, and kill them at another Ctrl-C."""
    try:
        if (begun := [run for run in running if run.has_begun]) and os.name == "posix":
            count = "1 run saves" if len(begun) == 1 else f"{len(begun)} runs save"
            print(f"\n{count} what is done; Ctrl-C again stops at once", file=sys.stderr)
            for run in begun:
                with suppress(ProcessLookupError):  # it has ended in the meantime
                    os.kill(run.process.pid, signal.SIGINT)
            for run in begun:
                run.process.join(END_WITHIN)
    finally:
        for run in running:
            run.process.kill()
            run.process.join()


def _context(jobs: Sequence[Job], workers: Sequence[Worker]):
    """Return how processes start: forked from one that has imported the jobs' recipes, or from scratch."""
    if sys.platform != "linux" or any(worker.on_card for worker in workers):
        return multiprocessing.get_context("spawn")
    context = multiprocessing.get_context("forkserver")
    if jobs:
        context.set_forkserver_preload([*PRELOADED, *sorted({job.recipe for job in jobs})])
        folders = os.pathsep.join(filter(None, sys.path))
        with _environment({**KEEP_FREED_MEMORY, **os.environ, "PYTHONPATH": folders}):
            forkserver.ensure_running()
    return context


@contextmanager
def _environment(variables: Mapping[str, str]) -> Iterator[None]:
    """Replace the environment variables for as long as the context lasts."""
    before = dict(os.environ)
    os.environ.update(variables)
    try:
        yield
    finally:
        os.environ.clear()
        os.environ.update(before)


class _Running:
    """A process that has been started."""

    def __init__(self, job: Job, worker: Worker, context):
        self.job, self.worker, self.start = job, worker, time.perf_counter()
        job.folder.mkdir(parents=True, exist_ok=True)
        self.log = job.folder / LOG
        self.log.touch()  # a process may end before it opens its log
        self.log_start = self.log.stat().st_size  # of this attempt
        card = {"CUDA_VISIBLE_DEVICES": worker.card} if worker.card else {}
        with _environment(card):  # inherited by a process that starts from scratch, passed on to a forked one
            here = (dict(os.environ), os.getcwd(), worker.on_card)
            arguments = (job.recipe, job.command(), self.log.resolve(), *here)
            self.process = context.Process(target=_run, args=arguments)
            self.process.start()

    def __str__(self) -> str:
        metrics = self.job.folder / "metrics.jsonl"
        steps = metrics.read_bytes().count(b"\n") if metrics.is_file() else 0
        return f"{self.job.name} step {steps}" if steps else self.job.name

    @property
    def has_begun(self) -> bool:
        """Whether its log has begun. Before, the process may ignore SIGINT, and has nothing to save."""
        return self.log.stat().st_size > self.log_start

    def outcome(self) -> Outcome:
        seconds, status = round(time.perf_counter() - self.start, 1), self.process.exitcode
        if status == 0:
            return Outcome(self.job.name, DONE, seconds, log=str(self.log))
        with self.log.open("rb") as log:
            log.seek(self.log_start)
            lines = log.read().decode("utf-8", errors="replace").splitlines()
        error, tail = reason(status, lines), tuple(lines[-TAIL:])
        return Outcome(self.job.name, FAILED, seconds, error, tail, str(self.log))


def _run(
    recipe: str, flags: list[str], log: Path, environment: dict[str, str], folder: str, on_card: bool
) -> None:
    """Run a recipe in this process, which has just been started. flags: as on its command line."""
    if os.name == "posix":
        os.setpgrp()  # Ctrl-C on a terminal is for the study, which then asks its runs to end
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background job starts without it
    threading.Thread(target=_end_with_the_parent, daemon=True).start()
    with log.open("ab") as file:
        for descriptor in (1, 2):
            os.dup2(file.fileno(), descriptor)
    os.environ.clear()
    os.environ.update(environment)  # before CUDA looks at it
    os.chdir(folder)
    if not on_card:
        import torch  # not above: the parent and a process on a card need it only in the recipe

        torch.set_num_threads(1)

    print(f"python -m {shlex.join([recipe, *flags])}", flush=True)
    module = importlib.import_module(recipe)
    start(module.main, module.Config, flags, smoke=module.SMOKE, presets=getattr(module, "PRESETS", None))


def _end_with_the_parent() -> None:
    """Wait for the end of the process that started this one, then leave at once, as a kill would."""
    multiprocessing.parent_process().join()
    os._exit(ORPHANED)


def reason(status: int, lines: Sequence[str]) -> str:
    """Return why a process failed: the message its log ends with, or the signal that ended it."""
    if status < 0:
        out_of_memory = ", as Linux does when memory runs out" if status == -9 else ""
        return f"ended by {signal.Signals(-status).name}{out_of_memory}"
    start = next((i for i in reversed(range(len(lines))) if MESSAGE.match(lines[i])), None)
    last = lines[-3:] if start is None else lines[start:]
    message = " ".join(line.strip() for line in last if line.strip())
    return message.removeprefix("error: ") or f"it ended with status {status} and printed nothing"

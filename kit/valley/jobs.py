"""The runs of a sweep, as processes: one after another, or several at once, one a GPU.

A run that fails is written down with its error and the last lines of its log, and the others go on; what needs it is passed over.
Which runs are done stands in a journal, so that a sweep that is killed goes on: done runs are kept, a run that was broken off or
failed is started again with --resume and goes on inside its folder.
"""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from tqdm import tqdm

from kit.run import Journal

JOURNAL, LOG = "jobs.jsonl", "log.txt"
DONE, FAILED = "done", "failed"
TAIL = 12  # lines of the log that go with a failure
LOOK_EVERY = 0.2  # seconds between two looks at the processes
MESSAGE = re.compile(
    r"^(?:[A-Za-z_][\w.]*(?:Error|Exception|Exit|Interrupt)\b|error:)"
)  # what a traceback ends with


@dataclass(frozen=True)
class Job:
    """A run of a recipe."""

    name: str
    recipe: Path
    settings: Mapping[str, object]  # of the recipe, as flags
    folder: Path  # its run folder
    needs: tuple[str, ...] = ()  # names of jobs that must be done first
    flags: tuple[str, ...] = ()  # further flags, as typed; they come after the settings
    problem: str = ""  # why it cannot be run at all; "" = it can

    def command(self) -> list[str]:
        resume = ["--resume"] if (self.folder / "config.json").is_file() else []
        flags = [*(as_flag(name, value) for name, value in self.settings.items()), *self.flags]
        return [
            sys.executable,
            "-m",
            "kit.valley.sweep_child",
            str(self.recipe),
            *flags,
            f"--out={self.folder}",
            *resume,
        ]

    def obstacle(self, state: Mapping[str, str]) -> str:
        """Why it is not to be started; "" = nothing is in its way but what is still running."""
        broken = [name for name in self.needs if state.get(name) == FAILED]
        return self.problem or (f"it needs {', '.join(broken)}, which failed" if broken else "")


def as_flag(name: str, value: object) -> str:
    """One word of a command line, whatever the value holds."""
    return f"--{'' if value else 'no_'}{name}" if isinstance(value, bool) else f"--{name}={value}"


@dataclass(frozen=True)
class Outcome:
    """How a job ended; a line of the journal."""

    job: str
    status: str  # DONE or FAILED
    seconds: float = 0.0  # wall time of this attempt
    error: str = ""
    tail: tuple[str, ...] = ()  # last lines of its log
    log: str = ""


def read_outcomes(path: Path) -> dict[str, Outcome]:
    """The last outcome of every job that has ended, by name."""
    rows = Journal(path / JOURNAL).read()
    return {row["job"]: Outcome(**row | {"tail": tuple(row["tail"])}) for row in rows}


def places(device: str, gpus: str, workers: int) -> list[dict[str, str]]:
    """Environment variables of the processes that run at once: one a GPU, or `workers` that share the CPU's cores.

    gpus: numbers with commas between them, as CUDA_VISIBLE_DEVICES takes them; "" = one process on what CUDA shows.
    Raises ValueError for what belongs to the other device.
    """
    if device == "cuda":
        if workers != 1:
            raise ValueError(
                f"workers is {workers} but device is cuda, where processes are counted by cards; pass --gpus 0,1"
            )
        return [{"CUDA_VISIBLE_DEVICES": name.strip()} for name in gpus.split(",")] if gpus else [{}]
    if gpus:
        raise ValueError(f"gpus is {gpus!r} but device is {device}; pass --device cuda, or --workers instead")
    if workers < 1:
        raise ValueError(f"workers is {workers} but at least one process must run; pass --workers 1")
    threads = {} if workers == 1 or "OMP_NUM_THREADS" in os.environ else {
        "OMP_NUM_THREADS": str(max(1, (os.cpu_count() or 1) // workers))}  # fmt: skip
    return [threads] * workers


def run_jobs(jobs: Sequence[Job], path: Path, slots: Sequence[Mapping[str, str]]) -> Iterator[Outcome]:
    """Run every job that is not done yet; gives each outcome as it comes.

    path: folder of the journal. slots: environment variables of the processes that run at once, from `places`. Jobs start in
    their order, those whose needs are not done waiting. Whatever ends this generator ends the processes.
    """
    journal = Journal(path / JOURNAL)
    state = {name: outcome.status for name, outcome in read_outcomes(path).items() if outcome.status == DONE}
    waiting = [job for job in jobs if job.name not in state]
    free, running = list(range(len(slots))), []
    with tqdm(
        total=len(jobs), initial=len(jobs) - len(waiting), desc="runs", unit=" runs", disable=None
    ) as bar:
        try:
            while waiting or running:
                ended = [
                    Outcome(job.name, FAILED, error=f"not started: {why}")
                    for job in waiting
                    if (why := job.obstacle(state))
                ]
                waiting = [job for job in waiting if not job.obstacle(state)]
                while free and (
                    job := next((j for j in waiting if all(state.get(n) == DONE for n in j.needs)), None)
                ):
                    waiting.remove(job)
                    running.append(_Running(job, free.pop(0), slots))
                    bar.set_postfix_str(", ".join(process.job.name for process in running))
                for process in [process for process in running if process.child.poll() is not None]:
                    running.remove(process)
                    free.append(process.slot)
                    ended.append(process.outcome())
                for outcome in ended:
                    state[outcome.job] = outcome.status
                    journal.append(asdict(outcome))
                    bar.update()
                    yield outcome
                if not ended:
                    time.sleep(LOOK_EVERY)
        finally:
            for process in running:
                process.stop()


class _Running:
    """A process that has been started."""

    def __init__(self, job: Job, slot: int, slots: Sequence[Mapping[str, str]]):
        self.job, self.slot, self.start = job, slot, time.perf_counter()
        job.folder.mkdir(parents=True, exist_ok=True)
        self.log = job.folder / LOG
        self.log_start = self.log.stat().st_size if self.log.exists() else 0  # of this attempt
        with self.log.open("ab") as log:
            self.child = subprocess.Popen(
                job.command(),
                env={**os.environ, **slots[slot]},
                stdin=subprocess.PIPE,
                stdout=log,
                stderr=subprocess.STDOUT,
            )

    def outcome(self) -> Outcome:
        self.child.stdin.close()
        seconds = round(time.perf_counter() - self.start, 1)
        with self.log.open("rb") as log:
            log.seek(self.log_start)
            lines = log.read().decode("utf-8", errors="replace").splitlines()
        if self.child.returncode == 0:
            return Outcome(self.job.name, DONE, seconds, log=str(self.log))
        return Outcome(
            self.job.name,
            FAILED,
            seconds,
            reason(self.child.returncode, lines),
            tuple(lines[-TAIL:]),
            str(self.log),
        )

    def stop(self) -> None:
        self.child.stdin.close()  # the run sees its end and goes
        self.child.terminate()
        self.child.wait()


def reason(status: int, lines: Sequence[str]) -> str:
    """The reason a process failed: the message its log ends with, or the signal that ended it."""
    if status < 0:
        return f"ended by {signal.Signals(-status).name}" + (
            ", as Linux does when memory runs out" if status == -9 else ""
        )
    start = next((i for i in reversed(range(len(lines))) if MESSAGE.match(lines[i])), None)
    said = lines[start:] if start is not None else lines[-3:]
    return (
        " ".join(line.strip() for line in said if line.strip())
        or f"it ended with status {status} and said nothing"
    )

"""Which process runs which job of a study, if several work on it: on one machine, or on many with one disk.

Each process has a numbered folder, `processes/003`, with its name, its outcomes, a lock, and the file
`alive`, which it replaces every 30 seconds and removes when it ends. Before a process starts a job it claims
it: it creates the file `claim-1` in the job's folder and writes its number into it. Of all that try to create
a file, the operating system lets one. A claim is void once its process has ended, and the job can then be
claimed again, as `claim-2`. No claim is ever removed, so of all that see a void claim one creates the next.

A process that dies leaves `alive` behind. If it ran on this machine, its lock is free. If it ran on another,
it counts as dead once `alive` has not changed for a lease, by the clock of the process that waits: the clocks
of two machines are never compared. A job whose own folder is still locked is not claimed, since a run may
outlive the process that started it, for instance if that is suspended.

What remains is a machine that is suspended or cut off for longer than a lease, while the shared disk gives
its locks to others. Once it is back, its process sees the next claim, after a second or, on NFS, up to a
minute, and kills its run. Until then both runs may write.
"""

from __future__ import annotations

import errno
import json
import platform
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from kit.disk import write_whole
from kit.lock import LOCK, hold, is_held, release, works_in
from kit.run import make_next_folder, numbered

PROCESSES, ALIVE, CLAIM, JOURNAL = "processes", "alive", "claim-", "jobs.jsonl"
# Seconds. NFS shows what another machine has written up to a minute late. It frees the locks of a dead one
# after 90 seconds, or twice that if the server has just been started. As a cell takes hours, this is short.
LEASE = 300.0
BEATS = 10  # per lease


class Claims:
    """The claims of this process on the jobs of a study. Made by `claiming`."""

    def __init__(self, study: Path, lease: float):
        self.processes, self.lease, self.num_beats = study / PROCESSES, lease, 0
        self.own: dict[Path, int] = {}  # folder of a job -> number of the claim
        self.seen: dict[Path, tuple[bytes, float]] = {}  # file -> its content, and since when it is the same
        others = numbered(self.processes)
        self.folder = make_next_folder(self.processes)
        hold(self.folder)
        self.beat()
        # processes that had ended before this one began: what failed for them is tried again. One without a
        # journal may be about to begin.
        self.ended = {folder for folder in others if (folder / JOURNAL).exists() and self._had_ended(folder)}

    def beat(self) -> None:
        """Show other processes that this one is alive."""
        self.num_beats += 1
        content = {"machine": platform.node(), "beat": self.num_beats}
        write_whole(self.folder / ALIVE, json.dumps(content).encode())

    def take(self, job: Path) -> bool:
        """Claim the job with this run folder. Return False if another process has it, or its run goes on."""
        job.mkdir(parents=True, exist_ok=True)
        last = max((int(path.name.removeprefix(CLAIM)) for path in job.glob(f"{CLAIM}*")), default=0)
        if last and (self._has_holder(job / f"{CLAIM}{last}") or is_held(job)):
            return False
        try:
            with (job / f"{CLAIM}{last + 1}").open("x") as file:
                file.write(self.folder.name)
        except FileExistsError:
            return False
        self.own[job] = last + 1
        return True

    def is_lost(self, job: Path) -> bool:
        """Return whether another process has taken this one for dead, and a job from it."""
        return (job / f"{CLAIM}{self.own[job] + 1}").exists()

    def _has_holder(self, claim: Path) -> bool:
        """Return whether a claim counts."""
        name = claim.read_text()
        # "": its process has just created it, or died before it could write its name
        return self._is_alive(name) if name else self._changes(claim, b"")

    def _had_ended(self, process: Path) -> bool:
        """Return whether a process had ended when this one began. The disk's clock has timed both beats."""
        if not self._is_alive(process.name):
            return True
        try:
            last = (process / ALIVE).stat().st_mtime
        except OSError:  # it has just ended, or replaced the file
            return False
        return (self.folder / ALIVE).stat().st_mtime - last > self.lease

    def _is_alive(self, name: str) -> bool:
        alive = self.processes / name / ALIVE
        try:
            content = alive.read_bytes()
        except FileNotFoundError:  # it has removed it
            return False
        except OSError as error:
            if error.errno != errno.ESTALE:
                raise
            return True  # on NFS: it has replaced it just now
        if json.loads(content)["machine"] == platform.node():
            return is_held(alive.parent)
        return self._changes(alive, content)

    def _changes(self, file: Path, content: bytes) -> bool:
        """Return whether a file has got its content within a lease, as far as this process has seen."""
        now = time.monotonic()
        if self.seen.get(file, (None,))[0] != content:
            self.seen[file] = (content, now)
        return now - self.seen[file][1] < self.lease


@contextmanager
def claiming(study: Path, lease: float = LEASE) -> Iterator[Claims]:
    """Let this process claim jobs of a study. lease: seconds; the same for all processes.

    Raises ValueError if another process may be at work and the file system has no locks.
    """
    claims, ended = Claims(study, lease), threading.Event()

    def show_life() -> None:
        while not ended.wait(lease / BEATS):
            with suppress(OSError):  # a disk that is full or away may be back for the next
                claims.beat()

    thread = threading.Thread(target=show_life, daemon=True, name="beats")
    thread.start()
    try:
        check_can_share(study, but=claims.folder)  # after the first beat: of two, one sees the other's
        yield claims
    finally:
        ended.set()
        thread.join()
        (claims.folder / ALIVE).unlink(missing_ok=True)  # missing if the study was deleted
        release(claims.folder)


def check_can_share(study: Path, *, but: Path | None = None) -> None:
    """Raise ValueError if other processes work on the study and its file system has no locks.

    but: folder of this process.
    """
    others = [path for path in (study / PROCESSES).glob(f"*/{ALIVE}") if path.parent != but]
    if others and not works_in(study):
        holder = (others[0].parent / LOCK).read_text()
        raise ValueError(
            f"{study} is in use by {holder}, and its file system has no locks, which several processes need; "
            f"wait until it ends, or, if it has died, delete {others[0]}"
        )

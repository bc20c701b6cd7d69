"""One process writes in a folder at a time: it holds a lock on the folder until it ends, however that comes.

The operating system keeps the lock on an open file, `.lock`, and releases it when the process is gone, also
after a kill or a power cut. So the file alone means nothing; its text names the holder. Readers need no lock.

A folder that several processes write in, such as a study's, is held by the first of them alone until it calls
`share`, and from then on by all of them together.
"""

from __future__ import annotations

import errno
import os
import platform
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import datetime
from pathlib import Path

from kit.disk import scratch_beside
from kit.ranks import here

LOCK = ".lock"
NAMED_WITHIN = 0.5  # seconds for whoever has just taken a lock to write its name in place of an earlier one
NOT_FOLLOWED = getattr(os, "O_NOFOLLOW", 0)
# NFS without a lock daemon, and some FUSE and container file systems
NO_LOCKS = {errno.ENOLCK, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS}
_held: dict[Path, int] = {}  # folder -> its lock file, open
_shared: set[Path] = set()  # those of them that other processes may hold, too


def hold(folder: Path, *, join: bool = False) -> bool:
    """Lock a folder until this process ends, and create it if need be. Return whether it was unlocked so far.

    It may be called again, for instance by two runs in one notebook. Processes that this one starts have to
    lock their own folders. Of several ranks, the first holds the lock for all. join: if others hold it, wait
    until they share it, and hold it with them; on Windows nobody can.
    Raises ValueError naming the other process that holds the lock. If the file system has no locks, a warning
    says so.
    """
    if not here().is_first:
        return False
    folder = folder.resolve()
    if folder in _held and _is_at(folder, _held[folder]):
        return False
    _close(folder)  # somebody has deleted the folder since
    while folder not in _held:
        folder.mkdir(parents=True, exist_ok=True)
        file = os.open(folder / LOCK, os.O_RDWR | os.O_CREAT | NOT_FOLLOWED, 0o666)
        try:
            is_shared = _lock(file, folder, join)
        except BaseException:
            os.close(file)
            raise
        if _is_at(folder, file):
            _held[folder] = file
            _shared.update([folder] * is_shared)
        else:  # its last holder has removed it in the meantime
            os.close(file)

    since = datetime.now().astimezone().isoformat(" ", "seconds")
    os.ftruncate(file, 0)
    os.lseek(file, 0, os.SEEK_SET)
    os.write(file, f"process {os.getpid()} on {platform.node()} since {since}".encode())
    return True


def release(folder: Path) -> None:
    """Give a lock back, and remove its file unless others hold it, too."""
    folder = folder.resolve()
    ours = folder in _held and _is_at(folder, _held[folder])
    ours = ours and (folder not in _shared or _take(_held[folder]))
    if os.name == "nt":  # which removes no open file
        _close(folder)
    if ours:  # elsewhere it goes first, while nobody else can have locked it
        (folder / LOCK).unlink(missing_ok=True)
    _close(folder)


def share(folder: Path) -> None:
    """Let other processes hold a folder that this one holds, too. On Windows it stays this one's alone."""
    folder = folder.resolve()
    if folder in _held and os.name != "nt" and _take(_held[folder], shared=True):
        _shared.add(folder)


def is_shared(folder: Path) -> bool:
    """Return whether this process holds a folder with others, or with others to come."""
    return folder.resolve() in _shared


def is_held(folder: Path) -> bool:
    """Return whether any process has a folder to itself; False if the file system has no locks.

    To find out, the lock is shared for a moment.
    """
    try:
        file = os.open(folder / LOCK, os.O_RDWR | NOT_FOLLOWED)
    except FileNotFoundError:
        return False
    try:
        return _take(file, shared=True) is False
    finally:
        os.close(file)


def works_in(folder: Path) -> bool:
    """Return whether the file system of a folder has locks: one that is taken cannot be taken again."""
    probe = scratch_beside(folder / LOCK)
    files = [os.open(probe, os.O_RDWR | os.O_CREAT, 0o666) for _ in range(2)]
    try:
        return bool(_take(files[0])) and _take(files[1]) is False
    finally:
        for file in files:
            os.close(file)
        probe.unlink()


@contextmanager
def held(folder: Path) -> Iterator[None]:
    """Hold the lock for as long as the context lasts, or longer if this process held it before."""
    was_free = hold(folder)
    try:
        yield
    finally:
        if was_free:
            release(folder)


def _is_at(folder: Path, file: int) -> bool:
    """Return whether an open file is still the lock file of the folder."""
    try:
        return os.path.samestat(os.fstat(file), os.stat(folder / LOCK))
    except FileNotFoundError:
        return False


def _lock(file: int, folder: Path, join: bool) -> bool:
    """Lock an open file, and return whether others may hold it, too.

    Raises ValueError if another process holds it and this one may not join.
    """
    taken = _take(file)
    if taken is False and join and os.name != "nt":
        if not _take(file, shared=True):
            print(f"waiting for {_holder(file)}, which has {folder} to itself", file=sys.stderr, flush=True)
            _take(file, shared=True, wait=True)
        return True
    if taken is False:
        time.sleep(NAMED_WITHIN)
        taken = _take(file)  # another process may have held it only to see whether it is held
    if taken is False:
        raise ValueError(
            f"{folder} is in use by {_holder(file)}; wait until it ends, end it, or pass another --out"
        )
    if taken is None:
        print(f"{folder}: its file system has no locks; let no other process write there", file=sys.stderr)
    return False


def _take(file: int, *, shared: bool = False, wait: bool = False) -> bool | None:
    """Lock an open file, or change its lock, and return whether that was possible.

    None = the file system has no locks. On Windows a lock is never shared.
    """
    try:
        if os.name == "nt":
            import msvcrt

            os.lseek(file, 1 << 20, os.SEEK_SET)  # what is locked cannot be read: not the text at the start
            msvcrt.locking(file, msvcrt.LK_NBLCK, 1)
        else:
            import fcntl

            # not lockf, whose lock is gone as soon as this process closes any other descriptor of the file
            how = (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | (0 if wait else fcntl.LOCK_NB)
            fcntl.flock(file, how)
    except (BlockingIOError, PermissionError):
        return False
    except OSError as error:
        if error.errno not in NO_LOCKS:
            raise
        return None
    return True


def _holder(file: int) -> str:
    """Return the name that the holder of a lock has written into its file."""
    os.lseek(file, 0, os.SEEK_SET)
    return os.read(file, 1_000).decode("utf-8", "replace") or "another process"


def _close(folder: Path) -> None:
    _shared.discard(folder)
    if folder in _held:
        os.close(_held.pop(folder))


def _let_go() -> None:
    """Close the locks in a forked process, which otherwise would keep them after the end of their holder."""
    for folder in [*_held]:
        _close(folder)


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_let_go)

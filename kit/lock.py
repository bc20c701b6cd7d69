"""One process writes in a folder at a time: it holds a lock on the folder until it ends, however that comes.

The operating system keeps the lock on an open file, `.lock`, and releases it when the process is gone, also
after a kill or a power cut. So the file alone means nothing; its text names the holder. Readers need no lock.
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

LOCK = ".lock"
NAMED_WITHIN = 0.5  # seconds for whoever has just taken a lock to write its name in place of an earlier one
NOT_FOLLOWED = getattr(os, "O_NOFOLLOW", 0)
# NFS without a lock daemon, and some FUSE and container file systems
NO_LOCKS = {errno.ENOLCK, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS}
_held: dict[Path, int] = {}  # folder -> its lock file, open


def hold(folder: Path) -> bool:
    """Lock a folder until this process ends, and create it if need be. Return whether it was unlocked so far.

    It may be called again, for instance by two runs in one notebook. Processes that this one starts have to
    lock their own folders.
    Raises ValueError naming the other process that holds the lock. If the file system has no locks, a warning
    says so.
    """
    folder.mkdir(parents=True, exist_ok=True)
    folder = folder.resolve()
    if folder in _held and _is_at(folder, _held[folder]):
        return False
    _close(folder)  # somebody has deleted the folder since
    while folder not in _held:
        file = os.open(folder / LOCK, os.O_RDWR | os.O_CREAT | NOT_FOLLOWED, 0o666)
        try:
            _lock(file, folder)
        except BaseException:
            os.close(file)
            raise
        if _is_at(folder, file):
            _held[folder] = file
        else:  # its last holder has removed it in the meantime
            os.close(file)

    since = datetime.now().astimezone().isoformat(" ", "seconds")
    os.ftruncate(file, 0)
    os.write(file, f"process {os.getpid()} on {platform.node()} since {since}".encode())
    return True


def release(folder: Path) -> None:
    """Give a lock back, and remove its file."""
    folder = folder.resolve()
    ours = folder in _held and _is_at(folder, _held[folder])
    if os.name == "nt":  # which removes no open file
        _close(folder)
    if ours:  # elsewhere it goes first, while nobody else can have locked it
        (folder / LOCK).unlink(missing_ok=True)
    _close(folder)


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


def _lock(file: int, folder: Path) -> None:
    """Lock an open file. Raises ValueError if another process has done so."""
    try:
        if os.name == "nt":
            import msvcrt

            os.lseek(file, 1 << 20, os.SEEK_SET)  # what is locked cannot be read: not the text at the start
            msvcrt.locking(file, msvcrt.LK_NBLCK, 1)
            os.lseek(file, 0, os.SEEK_SET)
        else:
            import fcntl

            # not lockf, whose lock is gone as soon as this process closes any other descriptor of the file
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError):
        time.sleep(NAMED_WITHIN)
        os.lseek(file, 0, os.SEEK_SET)
        holder = os.read(file, 1_000).decode("utf-8", "replace") or "another process"
        raise ValueError(
            f"{folder} is in use by {holder}; wait until it ends, end it, or pass another --out"
        ) from None
    except OSError as error:
        if error.errno not in NO_LOCKS:
            raise
        print(
            f"{folder}: its file system has no locks ({error.strerror}); let no other process write there",
            file=sys.stderr,
        )


def _close(folder: Path) -> None:
    if folder in _held:
        os.close(_held.pop(folder))


def _let_go() -> None:
    """Close the locks in a forked process, which otherwise would keep them after the end of their holder."""
    for folder in [*_held]:
        _close(folder)


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_let_go)

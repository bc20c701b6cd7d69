"""Files and folders that are written whole or not at all, and are on the disk once they are written.

What is written first gets a name that nobody can foresee, beside its place. It is flushed to the disk and
renamed, and the rename is flushed, too. A kill or a power cut leaves all of the old or all of the new.
"""

from __future__ import annotations

import errno
import os
import re
import secrets
import shutil
from pathlib import Path

SCRATCH = re.compile(r"\..+\.[0-9a-f]{16}\.tmp", re.DOTALL)
NOT_SYNCED = {errno.EINVAL, errno.ENOTSUP}  # some network file systems cannot flush a folder


def scratch_beside(path: Path) -> Path:
    """Return a new name for what will be renamed to `path`: hidden, in the same folder, not to be foreseen.

    Create it with open("xb") or mkdir(), which follow no link that is there already.
    """
    return path.with_name(f".{path.name}.{secrets.token_hex(8)}.tmp")


def remove_scratch(folder: Path) -> None:
    """Delete what a kill has left half-written in a folder, and in those directly below it.

    Call it only while nobody else writes there.
    """
    for left in [*folder.glob(".*.tmp"), *folder.glob("*/.*.tmp")]:
        if SCRATCH.fullmatch(left.name):
            shutil.rmtree(left) if left.is_dir() and not left.is_symlink() else left.unlink()


def write_whole(path: Path, content: bytes) -> None:
    """Write a file. A link at `path` is replaced, not followed."""
    scratch = scratch_beside(path)
    try:
        with scratch.open("xb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        scratch.replace(path)
    finally:
        scratch.unlink(missing_ok=True)  # it is there only if something went wrong
    sync_folder(path.parent)


def publish(scratch: Path, path: Path) -> None:
    """Give a complete folder its own name, replacing the folder there. scratch: from scratch_beside."""
    for part in scratch.rglob("*"):
        sync_folder(part) if part.is_dir() else sync_file(part)
    sync_folder(scratch)
    old = scratch.with_suffix(".old")  # there is a whole folder at every moment
    if path.exists():
        path.rename(old)
    scratch.rename(path)
    sync_folder(path.parent)
    shutil.rmtree(old, ignore_errors=True)


def check_space(path: Path, needed: int, what: str) -> None:
    """Raise ValueError if fewer than `needed` bytes are free where `path` will be. what: for the error."""
    there = next(folder for folder in path.absolute().parents if folder.is_dir())
    free = shutil.disk_usage(there).free
    if free < needed:
        raise ValueError(
            f"{what} takes {needed / 2**30:.2f} GiB and {free / 2**30:.2f} GiB are free in {there}; make "
            "room, or pass an --out on a larger disk"
        )


def sync_file(path: Path) -> None:
    """Flush a file's content to the disk."""
    with path.open("rb+") as file:  # Windows flushes only what is open for writing
        os.fsync(file.fileno())


def sync_folder(path: Path) -> None:
    """Flush the names in a folder to the disk. Windows does so by itself, and opens no folder."""
    if os.name != "posix":
        return
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in NOT_SYNCED:
            raise
    finally:
        os.close(descriptor)

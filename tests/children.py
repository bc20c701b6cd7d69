"""Tests in a process of their own: a file's kernels in Triton's interpreter, and a run that is killed and resumed."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from kit import checkpoint


def pass_in_the_interpreter(file: str, *options: str) -> None:
    """The real Triton kernels: TRITON_INTERPRET is read when a kernel is defined. Prints what pytest said."""
    command = [sys.executable, "-m", "pytest", file, "--noconftest", "-q", "-p", "no:cacheprovider", *options]
    child = subprocess.run(command, env=os.environ | {"TRITON_INTERPRET": "1"}, capture_output=True, text=True)
    assert child.returncode == 0, f"\n{child.stdout[-6000:]}\n{child.stderr[-3000:]}"
    print(child.stdout)


def call(file: str, function: str, *arguments, **keywords) -> subprocess.Popen:
    """`function` of the test file `file`, on one thread, in a process that has just been started."""
    shown = ", ".join([*map(repr, arguments), *(f"{name}={value!r}" for name, value in keywords.items())])
    code = f"import sys; sys.path.insert(0, {str(Path(file).parent)!r}); from {Path(file).stem} import *; {function}({shown})"
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    return subprocess.Popen([sys.executable, "-c", code], env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)


def wait(child: subprocess.Popen) -> None:
    assert child.wait() == 0, child.stderr.read().decode()


def train_unbroken_and_killed(start, folder: Path, *, lines: int, newest_checkpoint: str) -> None:
    """Runs folder/whole to its end, kills folder/broken once its metrics have so many lines, and resumes it.

    start(out, resume) -> the process. newest_checkpoint: what the kill must find.
    """
    wait(start(str(folder / "whole"), False))
    broken = start(str(folder / "broken"), False)
    metrics = folder / "broken" / "metrics.jsonl"
    while broken.poll() is None and not (metrics.exists() and metrics.read_text().count("\n") >= lines):
        time.sleep(0.001)
    broken.send_signal(signal.SIGKILL)
    broken.wait()
    if (folder / "broken" / "model").exists():
        pytest.fail("the run ended before it could be killed: give it more steps")
    assert broken.returncode == -signal.SIGKILL
    assert checkpoint.latest(folder / "broken" / "checkpoints").name == newest_checkpoint
    wait(start(str(folder / "broken"), True))

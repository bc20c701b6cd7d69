"""Run tests in processes of their own: kernels in Triton's interpreter, recipes, a run that is killed."""

import atexit
import multiprocessing
import os
import random
import re
import runpy
import signal
import socket
import subprocess
import sys
import tempfile
import time
from contextlib import suppress
from pathlib import Path

import pytest

from kit.train import checkpoint

IN_THE_INTERPRETER = "passed in the interpreter"  # a property of a test's report
ROOT = Path(__file__).resolve().parents[1]
RECIPES = [  # those that are commands: recipes/rewards.py is read by another
    path for path in sorted((ROOT / "recipes").glob("*.py")) if "__main__" in path.read_text(encoding="utf-8")
]
# Importing torch and transformers takes seconds, often longer than the run itself. So on Linux one clean
# process imports them and is forked for every child. It has computed nothing, so no threads are lost.
CONTEXT = multiprocessing.get_context("forkserver" if sys.platform == "linux" else "spawn")
PRELOADED = """
    pytest peft kit.evaluate.measure kit.memory.simulate kit.models.qlora kit.report.before_after
    kit.report.valley kit.rl.loop kit.train.loop transformers.models.gemma3.modeling_gemma3
    transformers.models.llama.modeling_llama transformers.models.qwen2.modeling_qwen2
"""
CONTEXT.set_forkserver_preload(PRELOADED.split())


class Child:
    """Run `function(*arguments)` in a process of its own: one thread, no GPU, no network."""

    def __init__(self, function, *arguments, cwd="."):
        self._folder = tempfile.TemporaryDirectory()
        call = function, arguments, str(Path(cwd).resolve()), self._folder.name
        self._process = CONTEXT.Process(target=_run, args=call)
        for name in ("1", "2"):
            Path(self._folder.name, name).touch()
        self._process.start()
        atexit.register(self.kill)  # a test that fails must not leave it running

    def poll(self) -> int | None:
        """Return the exit status, or minus the number of the signal that ended it; None while it runs."""
        return self._process.exitcode

    def wait(self) -> int:
        self._process.join()
        return self._process.exitcode

    def kill(self) -> None:
        """Send SIGKILL and wait until the process has ended."""
        self._process.kill()
        self._process.join()

    @property
    def returncode(self) -> int | None:
        return self.poll()

    @property
    def stdout(self) -> str:
        return Path(self._folder.name, "1").read_text(encoding="utf-8")

    @property
    def stderr(self) -> str:
        return Path(self._folder.name, "2").read_text(encoding="utf-8")


def _run(function, arguments, cwd, streams):
    for descriptor in (1, 2):
        os.dup2(os.open(Path(streams, str(descriptor)), os.O_WRONLY | os.O_CREAT | os.O_TRUNC), descriptor)
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background job would ignore it
    os.environ |= {"HF_HUB_OFFLINE": "1", "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
    os.environ["PYTHONPATH"] = str(ROOT)
    import torch

    torch.set_num_threads(1)
    os.chdir(cwd)
    try:
        function(*arguments)
    finally:
        atexit._run_exitfuncs()  # a process of multiprocessing does not call them by itself


def _run_script(file, flags):
    sys.argv[:] = [file, *flags]
    sys.path.insert(0, str(Path(file).parent))
    runpy.run_path(file, run_name="__main__")


def _run_function(file, function, arguments, keywords):
    sys.path.insert(0, str(Path(file).parent))
    getattr(__import__(Path(file).stem), function)(*arguments, **keywords)


def start_recipe(recipe: str, *flags: str, cwd: Path) -> Child:
    """Start recipes/<recipe>.py with these flags, in the folder cwd."""
    return Child(_run_script, str(ROOT / "recipes" / f"{recipe}.py"), flags, cwd=cwd)


def run_recipe(recipe: str, *flags: str, cwd: Path) -> Child:
    """Run recipes/<recipe>.py with these flags, in the folder cwd, to its end."""
    child = start_recipe(recipe, *flags, cwd=cwd)
    child.wait()
    return child


def call(file: str, function: str, *arguments, **keywords) -> Child:
    """Start `function` of the test file `file` in a new process."""
    return Child(_run_function, file, function, arguments, keywords)


class CtrlC:
    """Sends Ctrl-C to this process when it is called for the `at`-th time."""

    def __init__(self, at: int):
        self.left = at

    def __call__(self) -> None:
        self.left -= 1
        if not self.left:
            os.kill(os.getpid(), signal.SIGINT)


def free_port() -> int:
    """Return a port for rank 0, below those that the system gives to others before it is used."""
    while True:
        port = random.SystemRandom().randrange(20_000, 32_000)
        with socket.socket() as one, suppress(OSError):
            one.bind(("127.0.0.1", port))
            return port


def wait_until_still(file: Path) -> None:
    """Wait until a file has not changed for a second. Fail if it goes on changing."""
    for _ in range(30):
        before = file.read_text()
        time.sleep(1.0)
        if file.read_text() == before:
            return
    pytest.fail(f"{file} goes on changing: the run outlived its study")


def start_ranks(count: int, file: str, function: str, *arguments, cwd=".") -> list[Child]:
    """Start `function` of the test file `file` in each of `count` ranks, as torchrun does on one machine."""
    shared = {"WORLD_SIZE": str(count), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    own = [{"RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(count)]
    return [Child(_run_rank, shared | each, file, function, arguments, cwd=cwd) for each in own]


def _run_rank(environment, file, function, arguments):
    os.environ |= environment
    _run_function(file, function, arguments, {})


def wait(child: Child) -> None:
    assert child.wait() == 0, child.stderr


def pass_in_the_interpreter(file: str, record_property, *options: str) -> None:
    """Run a test file on the real Triton kernels and print pytest's output.

    A process of its own, because TRITON_INTERPRET is read when a kernel is defined. record_property: pytest's
    fixture, which tells the summary how many tests have passed there.
    """
    flags = ["--noconftest", "-m", "not slow", "-p", "no:cacheprovider", *options]
    command = [sys.executable, "-m", "pytest", file, *flags]
    environment = os.environ | {"TRITON_INTERPRET": "1"}
    child = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert child.returncode == 0, f"\n{child.stdout[-6000:]}\n{child.stderr[-3000:]}"
    print(child.stdout)
    record_property(IN_THE_INTERPRETER, int(re.search(r"([0-9]+) passed", child.stdout)[1]))


def train_unbroken_and_killed(start, folder: Path, *, lines: int, newest_checkpoint: str) -> None:
    """Run folder/whole to its end. Kill folder/broken once its metrics have so many lines, and resume it.

    start(out, resume): returns the process. newest_checkpoint: the one that must exist after the kill.
    """
    wait(start(str(folder / "whole"), False))
    broken = start(str(folder / "broken"), False)
    metrics = folder / "broken" / "metrics.jsonl"
    while broken.poll() is None and not (metrics.exists() and metrics.read_text().count("\n") >= lines):
        time.sleep(0.001)
    broken.kill()
    if (folder / "broken" / "model").exists():
        pytest.fail("the run ended before it could be killed: give it more steps")
    assert broken.returncode == -signal.SIGKILL, broken.stderr
    assert checkpoint.latest(folder / "broken" / "checkpoints").name == newest_checkpoint
    wait(start(str(folder / "broken"), True))

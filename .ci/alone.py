"""Run each test file alone.

pytest imports all files before it runs the first, so a file that needs the imports of another passes there.
Here each runs in a fork of this process, which has imported large packages and nothing of ours; importing
them for each file would take most of the time. A file's output is shown if it fails, otherwise its last line.
"""

import importlib
import os
import sys
from pathlib import Path
from tempfile import TemporaryDirectory

PACKAGES = ["torch", "triton.language", "sympy", "pytest", "bitsandbytes"]
PACKAGES += ["transformers.models.auto.tokenization_auto"]
PACKAGES += [
    f"transformers.models.{family}.modeling_{family}" for family in ("gemma3", "llama", "qwen2", "qwen3")
]
EVERY_TEST_IS_SLOW = 5  # pytest's exit status if it selected none


def start(test_file: Path, output: Path) -> int:
    """Return the process that runs a test file."""
    process = os.fork()
    if not process:
        descriptor = os.open(output, os.O_WRONLY | os.O_CREAT)
        os.dup2(descriptor, 1)
        os.dup2(descriptor, 2)
        os._exit(importlib.import_module("pytest").main([str(test_file)]))
    return process


def main(folder: Path) -> int:
    """Return the number of files that fail."""
    for package in PACKAGES:
        importlib.import_module(package)
    waiting, running, failed = sorted(Path("tests").rglob("test_*.py"), reverse=True), {}, 0
    while waiting or running:
        while waiting and len(running) < os.cpu_count():
            test_file, output = waiting.pop(), folder / str(len(waiting))
            running[start(test_file, output)] = test_file, output
        process, status = os.wait()
        test_file, output = running.pop(process)
        passed = os.waitstatus_to_exitcode(status) in (0, EVERY_TEST_IS_SLOW)
        failed += not passed
        lines = output.read_text().splitlines()
        print(
            f"{test_file}: {lines[-1]}" if passed else "\n".join([*lines, f"{test_file} fails alone"]),
            flush=True,
        )
    return failed


if __name__ == "__main__":  # processes that a test spawns import this file
    with TemporaryDirectory() as name:
        sys.exit(main(Path(name)))

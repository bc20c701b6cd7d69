"""What the benchmarks share: contestants in processes of their own, their figures, and a file for them.

A peak of memory is a process's highest ever, so contestants whose memory is compared run apart.
"""

import importlib.util
import math
import multiprocessing
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict
from pathlib import Path

from kit.machine import GIB, describe_machine, peak_resident_bytes
from kit.run import write_json

TRL = {  # of its trainers: nothing written or printed, and every step's figures kept in state.log_history
    "report_to": "none",
    "save_strategy": "no",
    "disable_tqdm": True,
    "logging_steps": 1,
}


def in_a_process(function: Callable, *arguments):
    """Call a function in a new process, on as many threads as here, and return what it returns."""
    import torch  # here, as the grader's workers, which import this file, do without it

    spawn, threads = multiprocessing.get_context("spawn"), (torch.get_num_threads(),)
    with ProcessPoolExecutor(1, spawn, initializer=torch.set_num_threads, initargs=threads) as pool:
        return pool.submit(function, *arguments).result()


def has_trl() -> bool:
    """Return whether TRL is installed, and say so if it is not."""
    if importlib.util.find_spec("trl"):
        return True
    print("TRL is not installed (pip install trl): not compared")
    return False


def timed(function: Callable, *arguments, **options) -> tuple:
    """Return (what a function returns, seconds, CPU seconds, which a busy machine changes less)."""
    cpu, start = time.process_time(), time.perf_counter()
    result = function(*arguments, **options)
    return result, time.perf_counter() - start, time.process_time() - cpu


def peak_gib(before: int | None = 0) -> float:
    """Return the peak of this process's memory less so many bytes, in GiB; nan if one of them is unknown."""
    peak = peak_resident_bytes()
    return math.nan if peak is None or before is None else (peak - before) / GIB


def table(heading: str, rows: Mapping[str, Sequence[str]]) -> str:
    """Return a table in Markdown. heading: "| | a | b". rows: name -> the cells below a and b."""
    lines = [f"{heading} |", f"|---|{'---:|' * heading.count(' | ')}"]
    return "\n".join([*lines, *(f"| {name} | {' | '.join(cells)} |" for name, cells in rows.items())])


def save(config, **figures) -> None:
    """Write the figures to the file config.json, beside machine and settings; "" = write nothing."""
    if config.json:
        write_json(Path(config.json), {"machine": describe_machine(), "config": asdict(config), **figures})

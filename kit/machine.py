"""The machine that a recipe runs on: its name for a table of figures, its memory, GPU and threads."""

from __future__ import annotations

import gc
import os
import platform
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from kit.extras import require

if TYPE_CHECKING:
    import torch  # imported where it is used: it takes seconds, and flags are read before

GIB = 2**30  # bytes
CONTEXT = round(0.55 * GIB)  # bytes of a card that CUDA and its libraries use; an assumption
# Weights of the largest matrix of a small model: in fp32 the 1 MiB that one core's L2 cache holds. Several
# cores save it no memory traffic, and each must wait for the slowest at the end of every short product, which
# beside another job is one that is not running.
SMALL_MATRIX = 2**18


def describe_machine() -> dict[str, str | int]:
    """Return processor, cores, threads, GPU and versions, for the head of a table or a results file."""
    import torch

    has_gpu = torch.cuda.is_available()
    return {
        "processor": _proc("/proc/cpuinfo", "model name") or platform.processor() or platform.machine(),
        "cores": os.cpu_count() or 0,
        "threads": torch.get_num_threads(),
        "gpu": torch.cuda.get_device_name() if has_gpu else "none: nothing here was timed on a GPU",
        "torch": torch.__version__,
        "python": platform.python_version(),
    }


def require_gpu(device: str, what: str, instead: Mapping[str, str]) -> None:
    """Raise ValueError if the device is "cuda" and torch sees no GPU, or if Triton is not installed.

    what: the thing that needs a GPU. instead: commands that work without one -> what each does.
    """
    if device != "cuda":
        return

    import torch

    if torch.cuda.is_available():
        require(what, "triton")
        return

    width = max(map(len, instead))
    ways = [f"  {command:<{width}}    {effect}" for command, effect in instead.items()]
    raise ValueError("\n".join([f"{what} needs an NVIDIA GPU and none is here. What works here:", *ways]))


def return_memory(device: torch.device) -> None:
    """Return to the driver the blocks of GPU memory that no tensor uses.

    Call it between sampling and training: the tensors of one do not fit the blocks that the other leaves.
    """
    if device.type == "cuda":
        import torch

        gc.collect()
        torch.cuda.empty_cache()


def one_thread_if_small(model: torch.nn.Module) -> None:
    """Compute on one thread from now on, and say so, if the model is small and on a CPU.

    Only recipes call this: it changes the whole process. OMP_NUM_THREADS, if it is set, is left to decide.
    """
    import torch

    threads, largest = torch.get_num_threads(), max(weight.numel() for weight in model.parameters())
    is_small = model.device.type == "cpu" and largest <= SMALL_MATRIX
    if is_small and threads > 1 and "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(1)
        print(
            f"threads     1 of {threads}: this model's matrices are too small for several cores to share; "
            "set OMP_NUM_THREADS to decide it yourself"
        )


def resident_bytes() -> int | None:
    """Return the memory that this process uses now; None if the system does not tell (only Linux does)."""
    return _kib("VmRSS")


def peak_resident_bytes() -> int | None:
    """Return the most memory that this process has ever used; None if the system does not tell."""
    return _kib("VmHWM")


def _kib(key: str) -> int | None:
    value = _proc("/proc/self/status", key)
    return None if value is None else int(value.split()[0]) * 1024


def _proc(path: str, key: str) -> str | None:
    """Return the value of the first line `key: value`; None if the file or the key is absent."""
    if not Path(path).is_file():
        return None
    lines = (line.split(":", 1) for line in Path(path).read_text().splitlines() if ":" in line)
    return next((value.strip() for name, value in lines if name.strip() == key), None)

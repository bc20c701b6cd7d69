"""The machine a figure was measured on: its name, and how much memory a process has held."""

from __future__ import annotations

import gc
import os
import platform
from pathlib import Path

import torch

GIB = 2**30
CONTEXT = round(0.55 * GIB)  # bytes a card gives to CUDA itself, its libraries and the display; an assumption


def describe_machine() -> dict[str, str | int]:
    """Processor, cores, threads, card and versions, for the head of a table or a results file."""
    return {
        "processor": _proc("/proc/cpuinfo", "model name") or platform.processor() or platform.machine(),
        "cores": os.cpu_count() or 0,
        "threads": torch.get_num_threads(),
        "gpu": torch.cuda.get_device_name()
        if torch.cuda.is_available()
        else "none: nothing here was timed on a GPU",
        "torch": torch.__version__,
        "python": platform.python_version(),
    }


def return_memory(device: torch.device) -> None:
    """Give the card back what no tensor uses. Call it between sampling and training: each finds no room in the other's blocks."""
    if device.type == "cuda":
        gc.collect()
        torch.cuda.empty_cache()


def resident_bytes() -> int | None:
    """Memory this process holds now; None if the system does not say (anything but Linux)."""
    return _kib("VmRSS")


def peak_resident_bytes() -> int | None:
    """The most memory this process has ever held; None if the system does not say."""
    return _kib("VmHWM")


def _kib(key: str) -> int | None:
    value = _proc("/proc/self/status", key)
    return None if value is None else int(value.split()[0]) * 1024


def _proc(path: str, key: str) -> str | None:
    """The value of the first line `key: value`; None if the file or the key is absent."""
    if not Path(path).is_file():
        return None
    lines = (line.split(":", 1) for line in Path(path).read_text().splitlines() if ":" in line)
    return next((value.strip() for name, value in lines if name.strip() == key), None)

"""The machine that a recipe runs on: its name for a table of figures, its memory, GPU and threads."""

from __future__ import annotations

import gc
import os
import platform
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from kit.command_line import started_as
from kit.extras import require
from kit.ranks import here

if TYPE_CHECKING:
    import torch  # imported where it is used: it takes seconds, and flags are read before

GIB = 2**30  # bytes
CONTEXT = round(0.55 * GIB)  # bytes of a card that CUDA and its libraries use; an assumption
# Weights of the largest matrix of a small model: in fp32 the 1 MiB that one core's L2 cache holds. Several
# cores save it no memory traffic, and each must wait for the slowest at the end of every short product, which
# may not be running at all beside another job.
SMALL_MATRIX = 2**18


def describe_machine() -> dict[str, str | int]:
    """Return processor, cores, threads, GPU and versions, for the head of a table or a results file."""
    import torch

    has_gpu = torch.cuda.is_available()
    return {
        "processor": _proc(Path("/proc/cpuinfo"), "model name") or platform.processor() or platform.machine(),
        "cores": os.cpu_count() or 0,
        "threads": torch.get_num_threads(),
        "gpu": torch.cuda.get_device_name() if has_gpu else "none: nothing here was timed on a GPU",
        "torch": torch.__version__,
        "python": platform.python_version(),
    }


def describe_machines() -> dict:
    """Return describe_machine() of this process; of several ranks, that of the first, and all under `ranks`.

    Every rank must call this.
    """
    first, *others = here().gather(describe_machine())
    return first | ({"ranks": [first, *others]} if others else {})


def limit_process(name: str, amount: int) -> None:
    """Lower one of this process's limits, such as RLIMIT_AS, if the system has it: Windows has none."""
    try:
        import resource
    except ImportError:
        return
    kind = getattr(resource, name)
    hard = resource.getrlimit(kind)[1]
    resource.setrlimit(kind, (amount if hard == resource.RLIM_INFINITY else min(amount, hard), hard))


def require_gpu(device: str, what: str, instead: Mapping[str, str]) -> None:
    """Raise ValueError if the device is "cuda" and torch sees no GPU, or if Triton is not installed.

    what: the thing that needs a GPU. instead: commands that work without one -> what each does.
    """
    if device != "cuda":
        return

    import torch

    is_amd = torch.version.hip is not None  # torch calls AMD's cards "cuda", too
    if torch.cuda.is_available() and not is_amd:
        require(what, "triton")
        return

    found = "this torch is for AMD cards, where no kernel was ever tried" if is_amd else "none is here"
    width = max(map(len, instead))
    ways = [f"  {command:<{width}}    {effect}" for command, effect in instead.items()]
    raise ValueError("\n".join([f"{what} needs an NVIDIA GPU and {found}. What works here:", *ways]))


def on_cpu(small: str) -> dict[str, str]:
    """Return what a recipe offers to require_gpu. small: flags that make the run small enough for a CPU."""
    command = started_as()
    return {
        f"{command} --smoke": "all stages in about a minute, with a tiny model",
        f"{command} --device cpu": f"this model on this CPU: slow, so make it small, for example {small}",
    }


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


def free_memory(root: Path = Path("/")) -> int | None:
    """Return the CPU memory that a process may still take, in bytes; None if the system does not tell.

    It is what Linux calls available, or less in a container: what the limit of a control group (version 1 or
    2) leaves, whose file cache can be reclaimed. root: folder with proc and sys.
    """
    found = [_kib("MemAvailable", root / "proc/meminfo")]
    groups = root / "proc/self/cgroup"
    for line in groups.read_text().splitlines() if groups.is_file() else ():
        _, controllers, path = line.split(":", 2)
        top, limit, used, cache = root / "sys/fs/cgroup", "memory.max", "memory.current", "inactive_file "
        if controllers:  # version 1, where unlimited is a number near 2**63
            top, limit, used = top / "memory", "memory.limit_in_bytes", "memory.usage_in_bytes"
            cache = "total_inactive_file "
        if not controllers or "memory" in controllers.split(","):
            folder = top / path.lstrip("/")  # which a container does not see if its namespace is its own
            for group in (folder, *folder.parents):
                if (group / limit).is_file() and (group / limit).read_text().strip() != "max":
                    stat = (group / "memory.stat").read_text().splitlines()
                    had_back = next(int(row.split()[1]) for row in stat if row.startswith(cache))
                    left = int((group / limit).read_text()) - int((group / used).read_text()) + had_back
                    found.append(max(left, 0))
    return min((free for free in found if free is not None), default=None)


def _kib(key: str, path: Path = Path("/proc/self/status")) -> int | None:
    value = _proc(path, key)
    return None if value is None else int(value.split()[0]) * 1024


def _proc(path: Path, key: str) -> str | None:
    """Return the value of the first line `key: value`; None if the file or the key is absent."""
    if not path.is_file():
        return None
    lines = (line.split(":", 1) for line in path.read_text().splitlines() if ":" in line)
    return next((value.strip() for name, value in lines if name.strip() == key), None)

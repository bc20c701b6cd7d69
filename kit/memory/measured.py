"""Compare the plan with what is free before a run, and with what was held during it."""

from __future__ import annotations

from math import floor
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from kit.machine import CONTEXT, GIB, free_memory, return_memory
from kit.progress import print_line
from kit.run import write_json
from kit.train.loop import Unwatched

if TYPE_CHECKING:
    from kit.memory.phases import RunPlan
    from kit.memory.simulate import Plan

COMPARED_AFTER = 10  # steps: every kind of row has occurred by then
LESS = "settings that need less, such as --offload_inputs (--plan lists what helps)"


def check_free_memory(planned: RunPlan) -> None:
    """Raise ValueError if card or CPU have less memory free than the plan needs. Call it before loading."""
    larger = planned.larger
    free, total = torch.cuda.mem_get_info()
    if larger.total - CONTEXT > free:  # CUDA runs by now and has taken its own part
        raise ValueError(
            f"the plan needs {larger.total / GIB:.2f} GiB but {free / GIB:.2f} of the card's "
            f"{total / GIB:.2f} GiB are free; its largest owners are {larger.largest_owners()}; pass "
            f"--gpu_gb {floor(10 * free / GIB) / 10} --desktop_gb 0 to choose settings that fit, or close "
            "what uses the card"
        )
    check_cpu_memory(planned)


def check_cpu_memory(planned: RunPlan, at_once: int = 0) -> None:
    """Raise ValueError if the CPU has less memory free than a run needs.

    at_once: runs of a study that share it; 0 = this is a run of its own.
    """
    needed, free = max(at_once, 1) * planned.host, free_memory()
    if free is not None and needed > free:
        on = [name for name in planned.update.savings.switched_on if name.startswith("offload_")]
        runs = f" for {at_once} runs at once" if at_once > 1 else ""
        ways = ["close what uses it", "raise a container's limit"]
        if at_once > 1:
            ways.append("run fewer at once with --gpus")
        elif not at_once:
            ways.append(f"leave a part of it on the card: --no_{on[-1]}")
        if planned.run and not planned.run.has_adapters and "update_in_backward" not in planned.run.without:
            ways.append("pass --gpu_gb with --faster, which keeps less there")
        raise ValueError(
            f"the plan keeps {needed / GIB:.2f} GiB in CPU memory{runs} ({', '.join(on)}) but "
            f"{free / GIB:.2f} GiB are free; {', or '.join(ways)}"
        )


class PeakMemory(Unwatched):
    """The most memory that training has held so far, in GiB; None on a CPU, where nothing is measured.

    gib: allocated in tensors, which is what the plan simulates. reserved_gib: what the allocator has reserved
    for them, gaps included, which is what must fit on the card. planned: None = no plan was made. path: file
    for what was measured and planned, written after ten steps.
    """

    def __init__(self, device: torch.device, planned: Plan | None, path: Path):
        self.device, self.planned, self.path = device, planned, path
        self.gib = self.reserved_gib = None
        self.on_card = device.type == "cuda"
        self.leave_out()

    def leave_out(self) -> None:
        """Leave out of the peak what an evaluation has held, whose cache is not a part of a step."""
        if self.on_card:
            return_memory(self.device)
            torch.cuda.reset_peak_memory_stats(self.device)

    def look(self, step: int, num_steps: int) -> None:
        """Measure after step 1, 2, ... of num_steps."""
        if self.on_card:
            now = torch.cuda.max_memory_allocated, torch.cuda.max_memory_reserved
            tensors, reserved = (most(self.device) / GIB for most in now)
            self.gib, self.reserved_gib = max(self.gib or 0, tensors), max(self.reserved_gib or 0, reserved)
            if step == min(COMPARED_AFTER, num_steps) and self.planned is not None:
                self.compare()

    def compare(self) -> None:
        """Print what was measured beside the plan, and write both to the file."""
        room = (self.planned.total - CONTEXT) / GIB
        print_line(
            f"memory      measured peak {self.gib:.2f} GiB of tensors, planned {self.planned.peak / GIB:.2f} "
            f"GiB (simulated); {self.reserved_gib:.2f} GiB reserved for them, planned at most {room:.2f} GiB"
        )
        measured = {"measured_peak_gib": self.gib, "measured_reserved_gib": self.reserved_gib}
        write_json(self.path, measured | {"planned": self.planned.as_json()})

    def exhausted(self, step: int, newest: Path | None, less: str = LESS) -> ValueError:
        """Return the error for a step that ran out of memory.

        newest: the last checkpoint. less: what to pass, so that the step needs less.
        """
        plan = "no plan was made"
        if self.planned is not None:
            plan = f"the plan said {self.planned.total / GIB:.2f} GiB, at most in {self.planned.when}"
        if self.gib is not None:
            plan += f"; the steps before peaked at {self.gib:.2f} GiB, {self.reserved_gib:.2f} GiB reserved"
        checkpoint = newest or "none, so the run starts over"
        return ValueError(
            f"step {step} ran out of memory: {plan}. Pass --resume with {less}; the last checkpoint is "
            f"{checkpoint}"
        )

"""What the card did while a call ran: the share of time it was busy, kernels, launches, copies to the host.

It reads torch.profiler's raw events: torch's own tables take seconds for the 50,000 launches of a step.
Memory and stacks are left out. Without a card, operators on the CPU are counted instead.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity

from kit.recipes.card.results import Card


@dataclass(frozen=True)
class Profile:
    seconds: float  # from the first kernel's start to the last one's end; 0 = no kernel was seen
    busy: float  # seconds in which a kernel or a copy ran
    kernels: int
    launches: int  # by the host; a CUDA graph of many kernels is one
    copies_to_host: int
    longest: list[tuple[str, float, int]]  # (kernel, milliseconds in all, times)


def profiled(card: Card, call: Callable[[], object]) -> Profile:
    """Run the call under torch.profiler."""
    activity, device = ProfilerActivity.CPU, DeviceType.CPU
    if card.is_cuda:
        activity, device = ProfilerActivity.CUDA, DeviceType.CUDA
    card.synchronize()
    with torch.profiler.profile(activities=[activity]) as profiler:
        call()
        card.synchronize()

    spans, nanoseconds, times, launches = [], Counter(), Counter(), 0
    for event in profiler.profiler.kineto_results.events():
        name, duration = event.name(), event.duration_ns()
        if event.device_type() != device:
            launches += "launch" in name.lower()  # cudaLaunchKernel, cuLaunchKernelEx, cudaGraphLaunch
        elif not event.is_user_annotation():
            spans.append((event.start_ns(), event.start_ns() + duration))
            nanoseconds[name] += duration
            times[name] += 1

    busy = end = 0
    for start, stop in sorted(spans):
        busy += max(0, stop - max(start, end))
        end = max(end, stop)
    whole = end - min(spans)[0] if spans else 0

    kernels = sum(n for name, n in times.items() if not name.startswith(("Memcpy", "Memset")))
    to_host = sum(n for name, n in times.items() if "DtoH" in name)
    longest = [(name[:100], total / 1e6, times[name]) for name, total in nanoseconds.most_common(12)]
    return Profile(whole / 1e9, busy / 1e9, kernels, launches, to_host, longest)

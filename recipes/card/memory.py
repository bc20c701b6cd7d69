"""Memory and time of a call, under a cap on memory where one is wanted."""

from __future__ import annotations

import contextlib
import statistics
import time
from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch

from kit.machine import GIB
from kit.recipes.card.results import Card

SHORT = 2.0  # seconds; a longer call is timed once


class Usage(NamedTuple):
    """A call's result, its seconds, and the most GiB that torch allocated and reserved; 0 GiB on a CPU."""

    result: object
    seconds: float
    allocated: float
    reserved: float


def measured(card: Card, call: Callable[[], object], *, held: float = 0.0, cap: float | None = None) -> Usage:
    """Run a call with at most cap GiB more than held; None = no cap.

    held: GiB that are not the call's: they are subtracted from the peaks.
    """
    with memory_cap(card, None if cap is None else held + cap):
        result, seconds = timed(card, call)
        if not card.is_cuda:
            return Usage(result, seconds, 0.0, 0.0)
        peaks = torch.cuda.max_memory_allocated(), torch.cuda.max_memory_reserved()
        return Usage(result, seconds, *(peak / GIB - held for peak in peaks))


def timed(card: Card, call: Callable[[], object]) -> tuple[object, float]:
    """Run a call. Return its result and its seconds, until the card is idle."""
    card.synchronize()
    start = time.perf_counter()
    result = call()
    card.synchronize()
    return result, time.perf_counter() - start


def median_seconds(card: Card, call: Callable[[], object], *, first: float | None = None) -> float:
    """Return the median of three times of a call; on a CPU, and of a long call, its only time.

    first: seconds that the call took before; None = not known.
    """
    first = timed(card, call)[1] if first is None else first
    more = 2 if card.is_cuda and first < SHORT else 0
    return statistics.median([first, *(timed(card, call)[1] for _ in range(more))])


@contextlib.contextmanager
def memory_cap(card: Card, gib: float | None = None) -> Iterator[None]:
    """Limit torch's allocator to so many GiB, and count peaks from here on. None = no limit."""
    card.free()
    if not card.is_cuda:
        yield
        return
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    total = torch.cuda.get_device_properties(torch.cuda.current_device()).total_memory / GIB
    torch.cuda.set_per_process_memory_fraction(1.0 if gib is None else max(0.0, min(1.0, gib / total)))
    try:
        yield
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)


def warm_up(card: Card) -> float:
    """Create cuBLAS's workspaces, which the plan counts to CUDA's own, and return the GiB held by now."""
    x = torch.ones(64, 64, device=card.device, dtype=torch.bfloat16, requires_grad=True)
    (x @ x).sum().backward()  # in the backward pass's thread, too, which has a workspace of its own
    del x
    card.free()
    return held_gib(card)


def held_gib(card: Card) -> float:
    """Return the GiB of tensors that exist now."""
    return torch.cuda.memory_allocated() / GIB if card.is_cuda else 0.0


def beside_plan(planned: float, usage: Usage, cap: float) -> str:
    return (
        f"GiB planned {planned:.2f}, allocated {usage.allocated:.2f}, reserved {usage.reserved:.2f}, "
        f"cap {cap:.2f}"
    )

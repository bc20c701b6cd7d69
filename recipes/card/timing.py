"""Times of kernels by the card's own events, and two limits to compare them with: copying and multiplying."""

from __future__ import annotations

import statistics
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache

import torch

from kit.recipes.card.compare import normal
from kit.recipes.card.memory import timed
from kit.recipes.card.results import Card, Results

LONG, VERY_LONG = 30.0, 300.0  # ms; longer calls run three times, and once


@dataclass
class Limits:
    """What the card can do, as measured. The defaults serve for estimates if measuring fails."""

    copy_gbs: float = 300.0  # GB/s, read and written
    matmul_tflops: float = 30.0  # of bf16


def measure_limits(results: Results, card: Card) -> Limits:
    limits = Limits()
    with results.case("copy bandwidth"):
        limits.copy_gbs = copy_gbs(card)
        results.figure("copy bandwidth", f"{limits.copy_gbs:,.0f} GB/s", gbs=limits.copy_gbs)
    with results.case("matmul"):
        limits.matmul_tflops = matmul_flops(card) / 1e12
        text = f"{limits.matmul_tflops:,.1f} TFLOP/s of a large bf16 matmul"
        results.figure("matmul", text, tflops=limits.matmul_tflops)
    card.free()
    return limits


@cache
def copy_gbs(card: Card) -> float:
    """Measure the GB/s, read and written, of one large copy."""
    x = torch.randn(2**16 if card.small else 2**28, device=card.device)  # 1 GiB
    y = torch.empty_like(x)
    return 2 * x.nbytes / milliseconds(card, lambda: y.copy_(x)) / 1e6


@cache
def matmul_flops(card: Card) -> float:
    """Measure the FLOP/s of one large bf16 matmul: what MFU is a share of."""
    N = 64 if card.small else 8192
    a, b = normal(card, N, N), normal(card, N, N)
    return 2 * N**3 / milliseconds(card, lambda: a @ b) * 1e3


def milliseconds(card: Card, call: Callable[[], object]) -> float:
    """Return the median time of a call after a first one, which compiles. On a CPU: the time of one call."""
    call()
    if not card.is_cuda:
        return 1e3 * timed(card, call)[1]

    once = event_time(call)
    if once < LONG:
        from triton.testing import do_bench

        return do_bench(call, warmup=10, rep=50, return_mode="median")  # clears the L2 cache between runs
    more = 2 if once < VERY_LONG else 0
    return statistics.median([once, *(event_time(call) for _ in range(more))])


def event_time(call: Callable[[], object]) -> float:
    """Return the milliseconds of one call between two events of the card."""
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    start.record()
    call()
    end.record()
    torch.cuda.synchronize()
    return start.elapsed_time(end)


def claim(results: Results, card: Card, name: str, holds: bool, text: str, **numbers) -> None:
    """Judge a claim about speed. A rehearsal, or another architecture's code, gives a figure only."""
    if card.is_cuda and not card.arch:
        results.check(name, holds, text, **numbers)
    else:
        results.figure(name, f"{text} (not judged)", **numbers)

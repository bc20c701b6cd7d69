"""Memory plans of training steps, simulated in processes of their own while the card is at work."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
from collections.abc import Iterator
from concurrent.futures import Future, ProcessPoolExecutor, TimeoutError
from pathlib import Path
from tempfile import TemporaryDirectory

import torch

from kit.machine import GIB
from kit.memory import Plan, plan
from kit.recipes.card.models import ROW_TOKENS, Training
from kit.recipes.card.results import Results, Skip


@contextlib.contextmanager
def planned(cases: list[Training]) -> Iterator[dict[Training, Future]]:
    """Plan all cases in processes beside the training; they end with the block."""
    before = set(multiprocessing.active_children())
    workers = max(min(len(cases), (os.cpu_count() or 2) // 2, 4), 1)  # a GiB each; started when needed
    spawn = multiprocessing.get_context("spawn")
    pool = ProcessPoolExecutor(workers, spawn, initializer=stay_off_the_card)
    with TemporaryDirectory() as folder:
        try:
            yield {case: pool.submit(make_plan, case, folder) for case in cases}
        finally:
            pool.shutdown(wait=False, cancel_futures=True)
            for process in set(multiprocessing.active_children()) - before:
                process.terminate()


def stay_off_the_card() -> None:
    """Set up a planning process: without the card, with one thread."""
    os.environ["CUDA_VISIBLE_DEVICES"] = ""
    torch.set_num_threads(1)


def make_plan(case: Training, folder: str) -> Plan:
    """Simulate one step of the case. folder: takes the config of a small model."""
    model, row_tokens = case.model, len(case.row([ROW_TOKENS], 0))
    if case.small:
        model = str(Path(folder) / f"{case.short}_{case.rank}")
        case.config.save_pretrained(model)
    return plan(model, row_tokens=row_tokens, savings=case.savings, qlora_rank=case.rank, rows=case.rows)


def plan_of(results: Results, job: Future, seconds: float) -> Plan:
    """Wait for a plan. Raise Skip if it is late, or if the card has less memory than it needs.

    seconds: what the case itself takes.
    """
    try:
        found = job.result(max(min(results.left() - seconds, 600), 1))
    except TimeoutError:
        raise Skip("the memory plan was not ready in time") from None
    results.need(gib=found.total / GIB)
    return found

"""Estimate a sweep before it runs: which cells fit, how many hours they take, and what they leave on disk.

A cell is one model that is fine-tuned on a number of traces and measured. kit.memory.run_plan says what is
simulated and what is assumed. Reinforcement learning is not estimated.
"""

from __future__ import annotations

import heapq
import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path

from kit.config import as_flags
from kit.machine import GIB
from kit.memory.hours import CHECKPOINTS, Estimate, Work, estimate_run
from kit.memory.measured import check_cpu_memory
from kit.memory.phases import MeasuredRun, RunPlan
from kit.memory.run_plan import given_up, plan_run
from kit.memory.settings import PlanSettings
from kit.run import write_json
from kit.train.savings import Savings
from kit.valley.study import FIXED_BATCH, Cell, ranks_of, short_name

ROWS = 2  # per step, at least: Table 2 has 8 traces or more
FILE = "memory.json"  # the chosen settings in a sweep's folder, so that --resume need not simulate again

Pair = tuple[str, str]  # model and method, which the cells of all sizes and seeds share
Memory = Mapping[Pair, RunPlan | str]  # its plan, or why there is none
Chosen = Mapping[Pair, tuple[dict, str]]  # its memory settings, and why it cannot run; "" = it can


def plan_memory(cells: Sequence[Cell], *, qlora_rank: int, card: PlanSettings, **sizes) -> Memory:
    """Plan every model and method, and print a line for each. sizes: other fields of MeasuredRun."""
    found = {}
    for model, method in dict.fromkeys((cell.model, cell.method) for cell in cells):
        ranks = ranks_of(method, qlora_rank)
        try:
            planned = plan_run(MeasuredRun(model=model, rows=ROWS, **ranks, **sizes), card)
            parts = f"training {planned.update.total / GIB:.2f}, sampling {planned.sampling.total / GIB:.2f}"
            on = as_flags(planned.update.savings.switched_on | {"num_slots": planned.num_slots})
            words = f"{parts} GiB (simulated); {planned.fits_text(card.desktop_gb)}; with {on}"
        except ValueError as error:
            planned = str(error)
            words = f"NO: {planned}"
        found[model, method] = planned
        print(f"  {short_name(model)}, {method}: {words}", flush=True)
    return found


def estimate_cells(
    cells: Sequence[Cell], memory: Memory, work: Work, *, card: str = ""
) -> dict[Cell, Estimate]:
    """Estimate every cell that has a plan. work: what all cells share. card: as estimate_run's."""
    found = {}
    for cell in cells:
        planned = memory[cell.model, cell.method]
        if isinstance(planned, RunPlan):
            sizes = {"num_traces": cell.num_traces, "epochs": cell.epochs, "batch_traces": cell.batch_traces}
            found[cell] = estimate_run(planned, replace(work, **sizes), card=card)
    return found


def describe(
    cells: Sequence[Cell], memory: Memory, estimates: Mapping[Cell, Estimate], *, num_cards: int = 1
) -> str:
    """Return the estimates as a table, their sums, and what they assume.

    Cells that differ only in the seed share a line. estimates: from estimate_cells.
    """
    columns = f"{'batch':>6}{'steps':>8}{'training':>12}{'sampling':>12}{'disk kept':>12}{'checkpoints':>14}"
    lines = [f"{'cell':<52}{columns}"]
    for cell, seeds in Counter(replace(cell, seed=0) for cell in cells).items():
        name = cell.name.removesuffix("-seed0") + (f" x {seeds} seeds" if seeds > 1 else "")
        if found := estimates.get(cell):
            in_backward = memory[cell.model, cell.method].update.savings.update_in_backward
            batch = "1 row" if in_backward else str(cell.batch_traces)
            times = f"{found.training_hours:>10,.1f} h{found.sampling_hours:>10,.1f} h"
            disk = f"{found.disk_kept / GIB:>8,.1f} GiB{found.disk[CHECKPOINTS] / GIB:>10,.1f} GiB"
            lines.append(f"{name:<52}{batch:>6}{found.num_steps:>8,.0f}{times}{disk}")
        else:
            lines.append(f"{name:<52}  no plan: see above")
    if not estimates:
        return "\n".join([*lines, "no cell can be planned"])

    fitting = list(estimates.values())
    baselines = {cell.baseline: found.baseline_hours for cell, found in estimates.items()}
    training = sum(found.training_hours for found in fitting)
    sampling = sum(found.sampling_hours for found in fitting)
    before = sum(baselines.values())
    hours = training + sampling + before
    counts = sorted({2, 4, 8, num_cards} - {1})
    several = (f"{hours_on(n, baselines, estimates):,.1f} h on {n}" for n in counts)
    kept = sum(found.disk_kept for found in fitting) / GIB
    checkpoints = num_cards * max(found.disk[CHECKPOINTS] for found in fitting) / GIB

    work = fitting[0].work
    sources = dict.fromkeys(source for found in fitting for source in found.sources)
    lines += [
        f"{len(fitting)} of {len(cells)} cells can be planned; {len(baselines)} baselines",
        f"in all  {training:,.1f} h of training, {sampling:,.1f} h of sampling after it, {before:,.1f} h for "
        f"the baselines: {hours:,.1f} h on one card",
        f"cards   {'; '.join(several)}; one run per card, those of the most traces first",
        f"disk    {kept:,.0f} GiB of models and samples, which stay, and at most {checkpoints:,.0f} GiB "
        "of checkpoints, which go; RL, the hub client's files and the cache of tokens are not counted",
        f"Estimates, not timings. Speeds: {'; '.join(sources)}. Assumed: traces of {work.trace_tokens:,} "
        f"tokens, {work.num_samples:,} responses of {work.response_tokens:,} tokens per evaluation, full "
        "rows, all slots always busy. Launch overhead and reinforcement learning are not counted.",
    ]
    return "\n".join(lines)


def hours_on(num_cards: int, baselines: Mapping[str, float], estimates: Mapping[Cell, Estimate]) -> float:
    """Return how long several cards take if each starts, whenever it is free, the first run that is left.

    baselines: hours by name. They come first, then the cells as kit.valley.runs sorts them.
    """
    free, measured = [0.0] * num_cards, {}  # when each card is free, and each baseline done
    for name, hours in baselines.items():
        measured[name] = heapq.heappop(free) + hours
        heapq.heappush(free, measured[name])
    for cell in sorted(estimates, key=lambda cell: (cell.seed, -cell.num_traces)):
        start = max(heapq.heappop(free), measured[cell.baseline])
        found = estimates[cell]
        heapq.heappush(free, start + found.training_hours + found.sampling_hours)
    return max(free)


def as_json(
    cells: Sequence[Cell], memory: Memory, estimates: Mapping[Cell, Estimate], desktop_gb: float
) -> list[dict]:
    """Return one row per cell for a file. desktop_gb: as for Plan.as_json."""
    rows = []
    for cell in cells:
        planned = memory[cell.model, cell.method]
        found = {"why_not": planned, "memory": None}
        if isinstance(planned, RunPlan):
            found = {"why_not": "", "memory": planned.as_json(desktop_gb)} | asdict(estimates[cell])
        rows.append(asdict(cell) | found)
    return rows


def settings_of(memory: Memory) -> Chosen:
    """Return the settings of every model and method."""
    return {
        pair: ({}, planned) if isinstance(planned, str) else (planned.switches(), "")
        for pair, planned in memory.items()
    }


def _checked(planned: RunPlan | str, at_once: int) -> RunPlan | str:
    if isinstance(planned, RunPlan):
        try:
            check_cpu_memory(planned, at_once)
        except ValueError as error:
            return str(error)
    return planned


def choose_settings(
    cells: Sequence[Cell], path: Path, *, card: PlanSettings, at_once: int = 1, **sizes
) -> Chosen:
    """Return settings that fit the card, kept in path/memory.json; none without gpu_gb.

    at_once: runs that share the CPU's memory; a pair for which it is too small has no plan. sizes: as for
    plan_memory.
    """
    stored = path / FILE
    if not stored.is_file():
        if not card.gpu_gib:
            return {(cell.model, cell.method): ({}, "") for cell in cells}
        plans = plan_memory(cells, card=card, **sizes)
        found = settings_of({pair: _checked(planned, at_once) for pair, planned in plans.items()})
        write_json(stored, [[*pair, *chosen] for pair, chosen in found.items()])
    rows = json.loads(stored.read_text(encoding="utf-8"))
    return {(model, method): (settings, problem) for model, method, settings, problem in rows}


def with_settings(cells: Sequence[Cell], chosen: Chosen) -> tuple[list[Cell], list[str]]:
    """Return (the cells as they can run, what that changes).

    With updates in the backward pass every step is one row, whatever Table 2 asks for. The control arm with
    one batch size is then left out: every size has that already.
    """
    found, forced = [], {}
    for cell in cells:
        settings, _ = chosen[cell.model, cell.method]
        if "batch_traces" not in settings:
            found.append(cell)
        elif cell.arm != FIXED_BATCH:
            found.append(replace(cell, batch_traces=settings["batch_traces"]))
        savings = {name: value for name, value in settings.items() if name in vars(Savings())}
        if price := given_up(Savings(**savings)):
            forced[f"{short_name(cell.model)}, {cell.method}: {price}, as --faster chose"] = None
    return found, list(forced)

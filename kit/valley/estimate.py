"""Estimate a sweep before it runs: which cells fit, how many hours they take, and what they leave on disk.

A cell is one model that is fine-tuned on a number of traces and measured. kit.memory.run_plan says what is
simulated and what is assumed. Reinforcement learning is not estimated.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from kit.config import as_flags
from kit.machine import GIB
from kit.memory.choose import given_up
from kit.memory.run_plan import Estimate, RunPlan, Work, estimate_run, plan_run
from kit.memory.settings import PlanSettings
from kit.run import write_json
from kit.train.savings import Savings
from kit.valley.study import FIXED_BATCH, QLORA, Cell, short_name

ROWS = 2  # per step, at least: Table 2 has 8 traces or more
FILE = "memory.json"  # the chosen settings in a sweep's folder, so that --resume need not simulate again


@dataclass(frozen=True)
class CellPlan:
    """Estimates of a cell. Both are None if it does not fit."""

    cell: Cell
    memory: RunPlan | None
    estimate: Estimate | None
    why_not: str = ""  # why they are None


Memory = Mapping[tuple[str, str], RunPlan | str]  # (model, method) -> its plan, or why there is none


def plan_cells(cells: Sequence[Cell], memory: Memory, work: Work, *, card: str = "") -> list[CellPlan]:
    """Estimate every cell. memory: from plan_memory. work: what all cells share. card: as estimate_run's."""
    found = []
    for cell in cells:
        planned = memory[cell.model, cell.method]
        if isinstance(planned, str):
            found.append(CellPlan(cell, None, None, planned))
        else:
            sizes = {"num_traces": cell.num_traces, "epochs": cell.epochs, "batch_traces": cell.batch_traces}
            found.append(CellPlan(cell, planned, estimate_run(planned, replace(work, **sizes), card=card)))
    return found


def describe(plans: Sequence[CellPlan], *, num_cards: int = 1) -> str:
    """Return the estimates as a table, their sums, and what they assume.

    Cells that differ only in the seed share a line.
    """
    columns = f"{'batch':>6}{'steps':>8}{'training':>12}{'sampling':>12}{'disk kept':>12}{'checkpoints':>14}"
    lines = [f"{'cell':<52}{columns}"]
    alike: dict[Cell, list[CellPlan]] = {}
    for found in plans:
        alike.setdefault(replace(found.cell, seed=0), []).append(found)
    lines += [_line(cell, group) for cell, group in alike.items()]

    fitting = [found.estimate for found in plans if found.estimate is not None]
    if not fitting:
        return "\n".join([*lines, "no cell can be planned"])

    baselines = {found.cell.baseline: found.estimate.baseline_hours for found in plans if found.estimate}
    training = sum(found.training_hours for found in fitting)
    sampling = sum(found.sampling_hours for found in fitting)
    before = sum(baselines.values())
    hours = training + sampling + before
    on_several = f", {hours / num_cards:,.1f} h on {num_cards} if they share evenly" if num_cards > 1 else ""
    kept = sum(found.disk_kept for found in fitting) / GIB
    checkpoints = num_cards * max(found.disk_while_training for found in fitting) / GIB

    work = fitting[0].work
    sources = dict.fromkeys(source for found in fitting for source in found.sources)
    lines += [
        f"{len(fitting)} of {len(plans)} cells can be planned; {len(baselines)} baselines",
        f"in all  {training:,.1f} h of training, {sampling:,.1f} h of sampling after it, {before:,.1f} h for "
        f"the baselines: {hours:,.1f} h on one card{on_several}",
        f"disk    {kept:,.0f} GiB of models and samples, which stay, and at most {checkpoints:,.0f} GiB "
        "of checkpoints, which go; RL, the hub client's files and the cache of tokens are not counted",
        f"Estimates, not timings. Speeds: {'; '.join(sources)}. Assumed: traces of {work.trace_tokens:,} "
        f"tokens, {work.num_samples:,} responses of {work.response_tokens:,} tokens per evaluation, full "
        "rows, all slots always busy. Launch overhead and reinforcement learning are not counted.",
    ]
    return "\n".join(lines)


def _line(cell: Cell, group: Sequence[CellPlan]) -> str:
    """Return the table's line of one cell and its seeds."""
    name = cell.name.removesuffix("-seed0") + (f" x {len(group)} seeds" if len(group) > 1 else "")
    first, found = group[0], group[0].estimate
    if found is None:
        return f"{name:<52}  no plan: see above"
    batch = "1 row" if first.memory.update.savings.update_in_backward else str(cell.batch_traces)
    disk = f"{found.disk_kept / GIB:>8,.1f} GiB{found.disk_while_training / GIB:>10,.1f} GiB"
    times = f"{found.training_hours:>10,.1f} h{found.sampling_hours:>10,.1f} h"
    return f"{name:<52}{batch:>6}{found.num_steps:>8,.0f}{times}{disk}"


def write_plan(path: Path, plans: Sequence[CellPlan]) -> None:
    """Write the estimates as a JSON list with one object per cell."""
    rows = []
    for found in plans:
        memory = found.memory and found.memory.as_json()
        estimates = asdict(found.estimate) if found.estimate else {}
        rows.append(asdict(found.cell) | {"why_not": found.why_not, "memory": memory} | estimates)
    write_json(path, rows)


def plan_memory(
    cells: Sequence[Cell],
    *,
    qlora_rank: int,
    report: Callable[[str], None] = print,
    **what,
) -> dict[tuple[str, str], RunPlan | str]:
    """Return (model, method) -> its plan, or why there is none.

    what: as plan_run takes it. report: receives one line per plan.
    """
    found: dict[tuple[str, str], RunPlan | str] = {}
    for model, method in dict.fromkeys((cell.model, cell.method) for cell in cells):
        rank = qlora_rank if method == QLORA else 0
        try:
            found[model, method] = plan_run(model, qlora_rank=rank, rows=ROWS, **what)
        except ValueError as error:
            found[model, method] = str(error)
        report(f"  {short_name(model)}, {method}: {_describe_memory(found[model, method])}")
    return found


def _describe_memory(planned: RunPlan | str) -> str:
    if isinstance(planned, str):
        return f"NO: {planned}"
    parts = f"training {planned.update.total / GIB:.2f}, sampling {planned.sampling.total / GIB:.2f}"
    on = as_flags(planned.update.savings.switched_on | {"num_slots": planned.num_slots})
    return f"{parts} GiB (simulated); {planned.larger.fits_text}; with {on}"


Chosen = Mapping[tuple[str, str], tuple[dict, str]]  # (model, method) -> as settings_of returns it


def settings_of(planned: RunPlan | str, max_grad_norm: float) -> tuple[dict, str]:
    """Return (a cell's memory settings, why it cannot run; "" = it can). max_grad_norm: the recipe's own."""
    return ({}, planned) if isinstance(planned, str) else (planned.switches(max_grad_norm), "")


def choose_settings(
    cells: Sequence[Cell], path: Path, *, max_grad_norm: float, card: PlanSettings, **what
) -> dict[tuple[str, str], tuple[dict, str]]:
    """Return settings that fit the card, kept in path/memory.json; none without gpu_gb. what: plan_run's."""
    stored = path / FILE
    if not stored.is_file():
        if not card.gpu_gib:
            return {(cell.model, cell.method): ({}, "") for cell in cells}
        found = plan_memory(cells, card=card, **what)
        write_json(stored, [[*pair, *settings_of(planned, max_grad_norm)] for pair, planned in found.items()])
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
            forced[f"{short_name(cell.model)}, {cell.method}: {price}, to fit the card"] = None
    return found, list(forced)

"""The memory settings of a sweep's models: simulated, or chosen for a card, once for each model and method."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import fields, replace
from pathlib import Path

from kit.fitting import choose, switches
from kit.machine import GIB
from kit.memory import CARDS, Plan, plan
from kit.run import write_json
from kit.savings import Savings
from kit.sweep import FIXED_BATCH, QLORA, Cell, short_name

Chosen = Mapping[tuple[str, str], tuple[dict, str]]  # (model, method) -> the recipe's settings, why none fits ("" = they do)
ROWS = 2  # of a step, at least: Table 2 takes 8 traces or more
FILE = "memory.json"  # of a sweep: what was chosen, so that a resumed one need not simulate again


def plan_memory(
    cells: Sequence[Cell], *, row_tokens: int, gpu_gb: float, qlora_rank: int, report: Callable[[str], None] = print
) -> dict[tuple[str, str], Plan | str]:
    """(model, method) -> its plan, or why there is none. Each is simulated once, which takes up to a minute, or several where
    settings are chosen. gpu_gb: 0 = the settings as they are, else the fastest that fit. report: is given a line a plan."""
    found: dict[tuple[str, str], Plan | str] = {}
    for model, method in dict.fromkeys((cell.model, cell.method) for cell in cells):
        what = {"row_tokens": row_tokens, "qlora_rank": qlora_rank if method == QLORA else 0, "rows": ROWS}
        try:
            found[model, method] = choose(model, gpu_gb=gpu_gb, **what) if gpu_gb else plan(model, **what)
        except ValueError as error:
            found[model, method] = str(error)
        report(f"  {short_name(model)}, {method}: {_describe(found[model, method], gpu_gb)}")
    return found


def _describe(planned: Plan | str, gpu_gb: float) -> str:
    if isinstance(planned, str):
        return f"NO: {planned}"
    cards = [gpu_gb] if gpu_gb else [gb for gb in CARDS if planned.fits(gb)]
    on = [
        f"{field.name} {value}" for field in fields(Savings) if (value := getattr(planned.savings, field.name)) != field.default
    ]
    return (
        f"{planned.total / GIB:.2f} GiB (simulated); fits {', '.join(f'{gb:g} GB' for gb in cards) or 'no card up to 24 GB'}; "
        f"switched on: {', '.join(on) or 'nothing but the defaults'}"
    )


def settings_of(planned: Plan | str, max_grad_norm: float) -> tuple[dict, str]:
    """What a cell's recipe is given, and why it cannot be run. max_grad_norm: the recipe's own."""
    return ({}, planned) if isinstance(planned, str) else (switches(planned, max_grad_norm), "")


def choose_settings(
    cells: Sequence[Cell], path: Path, *, max_grad_norm: float, row_tokens: int, gpu_gb: float, qlora_rank: int
) -> dict[tuple[str, str], tuple[dict, str]]:
    """The memory settings for a card of gpu_gb; the recipe's own where it is 0. Kept in path/memory.json."""
    if not gpu_gb:
        return {(cell.model, cell.method): ({}, "") for cell in cells}
    stored = path / FILE
    if not stored.is_file():
        found = plan_memory(cells, row_tokens=row_tokens, gpu_gb=gpu_gb, qlora_rank=qlora_rank)
        write_json(stored, [[*pair, *settings_of(planned, max_grad_norm)] for pair, planned in found.items()])
    rows = json.loads(stored.read_text(encoding="utf-8"))
    return {(model, method): (settings, problem) for model, method, settings, problem in rows}


def with_settings(cells: Sequence[Cell], chosen: Chosen) -> tuple[list[Cell], list[str]]:
    """(the cells as they can be run, what that changes). Where gradients die with their layer a step is one row, whatever Table 2
    says; the control arm with one batch is then left out, as every size is that already."""
    found, single = [], {}
    for cell in cells:
        settings, _ = chosen[cell.model, cell.method]
        if "batch_traces" not in settings:
            found.append(cell)
        elif cell.arm != FIXED_BATCH:
            single[f"{short_name(cell.model)}, {cell.method}"] = None
            found.append(replace(cell, batch_traces=settings["batch_traces"]))
    lines = [f"one row of packed traces a step at every size, to fit the card, for {'; '.join(single)}"] if single else []
    return found, lines

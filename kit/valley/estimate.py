"""Estimate a sweep before it runs: which cells fit, how many hours they take, and what they leave on disk.

A cell is one model that is fine-tuned on a number of traces and measured. Memory is simulated
(kit.memory.simulate). Hours follow from this card's measured speed or from a datasheet (kit.memory.hours).
Training rows count as full, copies to and from CPU memory as free. How long answers get is the experiment's
question: their length is assumed, and so is that of a trace. Reinforcement learning is not estimated.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from kit.config import as_flags
from kit.evaluate.benchmarks import find_benchmarks
from kit.machine import GIB
from kit.memory.choose import choose, switches
from kit.memory.flops import Sizes
from kit.memory.hours import CARDS, card_name, sampling_speed, training_speed
from kit.memory.simulate import Plan, plan
from kit.models.loading import load_config
from kit.run import write_json
from kit.valley.study import FIXED_BATCH, QLORA, Cell, short_name

REFERENCE = CARDS["NVIDIA GeForce RTX 3090"]  # whose datasheet counts if no known card is here
TEXT_BYTES = 5  # of a log per sampled token: about four characters, and what is written with them
OPTIMIZER_BYTES = 2 + 8 / 256  # per trained weight: two 8-bit states and their scales
ROWS = 2  # per step, at least: Table 2 has 8 traces or more
FILE = "memory.json"  # the chosen settings in a sweep's folder, so that --resume need not simulate again


@dataclass(frozen=True)
class Assumed:
    """Lengths that only the experiment can show."""

    trace_tokens: int  # per trace with its problem, on average
    response_tokens: int  # per response, on average


@dataclass(frozen=True)
class Evaluation:
    """One pass over the benchmarks."""

    num_samples: int
    num_slots: int

    @classmethod
    def of(cls, benchmarks: str, *, num_questions: int, num_samples: int, num_slots: int) -> Evaluation:
        """Count the samples; only your own questions are read. benchmarks: as find_benchmarks takes them."""
        table = find_benchmarks(benchmarks)
        questions = (min(num_questions or b.num_questions, b.num_questions) for b in table)
        samples = (num_samples or b.num_samples for b in table)
        return cls(sum(n * k for n, k in zip(questions, samples, strict=True)), num_slots)


@dataclass(frozen=True)
class CellPlan:
    """Estimates of a cell that fits. All but the cell and its memory are None or 0 if it does not."""

    cell: Cell
    memory: Plan | None
    evaluation: Evaluation
    assumed: Assumed
    why_not: str = ""  # why memory is None
    num_steps: float = 0.0  # optimizer steps
    training_hours: float = 0.0
    sampling_hours: float = 0.0  # of the fine-tuned model
    baseline_hours: float = 0.0  # sampling of the base model
    sources: tuple[str, ...] = ()  # of the hours: measured or estimated
    disk_kept: int = 0  # bytes: weights in bf16, and the samples before and after
    disk_while_training: int = 0  # bytes of two checkpoints, the older kept until the newer is whole


def plan_cells(
    cells: Sequence[Cell],
    memory: Mapping[tuple[str, str], Plan | str],
    *,
    evaluation: Evaluation,
    assumed: Assumed,
    max_steps: int = 0,
) -> list[CellPlan]:
    """Estimate every cell. memory: from plan_memory. max_steps: stop training there; 0 = all epochs."""
    found = []
    for cell in cells:
        planned = memory[cell.model, cell.method]
        if isinstance(planned, Plan):
            found.append(_plan_cell(cell, planned, evaluation, assumed, max_steps))
        else:
            found.append(CellPlan(cell, None, evaluation, assumed, why_not=planned))
    return found


def _plan_cell(
    cell: Cell, planned: Plan, evaluation: Evaluation, assumed: Assumed, max_steps: int
) -> CellPlan:
    """Estimate a cell that fits."""
    traces, rank = cell.epochs * cell.num_traces, planned.qlora_rank
    card = CARDS.get(card_name(), REFERENCE)
    tokens = traces * assumed.trace_tokens
    rows = tokens / planned.row_tokens
    steps = rows if planned.savings.update_in_backward else min(rows, traces / cell.batch_traces)
    share = min(1.0, max_steps / steps) if max_steps else 1.0

    answers = evaluation.num_slots, assumed.response_tokens
    training = training_speed(cell.model, planned.savings, rank, planned.row_tokens, card=card)
    sampling = sampling_speed(cell.model, *answers, nf4=bool(rank), card=card)
    baseline = sampling_speed(cell.model, *answers, card=card)

    sizes = Sizes.of(load_config(cell.model))
    trained = sizes.adapters(rank) if rank else sizes.weights
    sampled = evaluation.num_samples * assumed.response_tokens
    return CellPlan(
        cell,
        planned,
        evaluation,
        assumed,
        num_steps=share * steps,
        training_hours=training.hours(share * tokens),
        sampling_hours=sampling.hours(sampled),
        baseline_hours=baseline.hours(sampled),
        sources=(training.source, sampling.source, baseline.source),
        disk_kept=2 * trained + 2 * sampled * TEXT_BYTES,
        disk_while_training=round(2 * trained * (2 + OPTIMIZER_BYTES)),
    )


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

    fitting = [found for found in plans if found.memory is not None]
    if not fitting:
        return "\n".join([*lines, "no cell can be planned"])

    baselines = {found.cell.baseline: found.baseline_hours for found in fitting}
    training = sum(found.training_hours for found in fitting)
    sampling = sum(found.sampling_hours for found in fitting)
    before = sum(baselines.values())
    hours = training + sampling + before
    on_several = f", {hours / num_cards:,.1f} h on {num_cards} if they share evenly" if num_cards > 1 else ""
    kept = sum(found.disk_kept for found in fitting) / GIB
    checkpoints = num_cards * max(found.disk_while_training for found in fitting) / GIB

    evaluation, assumed = fitting[0].evaluation, fitting[0].assumed
    sources = dict.fromkeys(source for found in fitting for source in found.sources)
    lines += [
        f"{len(fitting)} of {len(plans)} cells can be planned; {len(baselines)} baselines",
        f"in all  {training:,.1f} h of training, {sampling:,.1f} h of sampling after it, {before:,.1f} h for "
        f"the baselines: {hours:,.1f} h on one card{on_several}",
        f"disk    {kept:,.0f} GiB of models and samples, which stay, and at most {checkpoints:,.0f} GiB "
        "of checkpoints, which go; RL, the hub client's files and the cache of tokens are not counted",
        f"Estimates, not timings. Speeds: {'; '.join(sources)}. Assumed: traces of {assumed.trace_tokens:,} "
        f"tokens, {evaluation.num_samples:,} responses of {assumed.response_tokens:,} tokens per evaluation, "
        f"full rows, {evaluation.num_slots} slots always busy. Launch overhead and reinforcement learning "
        "are not counted.",
    ]
    return "\n".join(lines)


def _line(cell: Cell, group: Sequence[CellPlan]) -> str:
    """Return the table's line of one cell and its seeds."""
    name = cell.name.removesuffix("-seed0") + (f" x {len(group)} seeds" if len(group) > 1 else "")
    first = group[0]
    if first.memory is None:
        return f"{name:<52}  no plan: see above"
    batch = "1 row" if first.memory.savings.update_in_backward else str(cell.batch_traces)
    disk = f"{first.disk_kept / GIB:>8,.1f} GiB{first.disk_while_training / GIB:>10,.1f} GiB"
    times = f"{first.training_hours:>10,.1f} h{first.sampling_hours:>10,.1f} h"
    return f"{name:<52}{batch:>6}{first.num_steps:>8,.0f}{times}{disk}"


def write_plan(path: Path, plans: Sequence[CellPlan]) -> None:
    """Write the estimates as a JSON list with one object per cell."""
    hours = ("training_hours", "sampling_hours", "baseline_hours")
    names = ("num_steps", *hours, "disk_kept", "disk_while_training")
    rows = []
    for found in plans:
        row = asdict(found.cell) | {"why_not": found.why_not, "memory": None}
        if found.memory is not None:
            row |= {"memory": found.memory.as_json()} | {name: getattr(found, name) for name in names}
        rows.append(row)
    write_json(path, rows)


def plan_memory(
    cells: Sequence[Cell],
    *,
    row_tokens: int,
    gpu_gb: float,
    qlora_rank: int,
    report: Callable[[str], None] = print,
) -> dict[tuple[str, str], Plan | str]:
    """Return (model, method) -> its plan, or why there is none.

    gpu_gb: choose settings that fit, in up to a minute each; 0 = the defaults, in seconds. report: receives
    one line per plan.
    """
    found: dict[tuple[str, str], Plan | str] = {}
    for model, method in dict.fromkeys((cell.model, cell.method) for cell in cells):
        what = {"row_tokens": row_tokens, "qlora_rank": qlora_rank if method == QLORA else 0, "rows": ROWS}
        try:
            found[model, method] = choose(model, gpu_gb=gpu_gb, **what) if gpu_gb else plan(model, **what)
        except ValueError as error:
            found[model, method] = str(error)
        report(f"  {short_name(model)}, {method}: {_describe_memory(found[model, method])}")
    return found


def _describe_memory(planned: Plan | str) -> str:
    if isinstance(planned, str):
        return f"NO: {planned}"
    fits = ", ".join(f"{gb} GB" for gb in planned.fits_gb) or "no card up to 24 GB"
    on = as_flags(planned.savings.switched_on) or "nothing but the defaults"
    return f"{planned.total / GIB:.2f} GiB (simulated); fits {fits}; switched on: {on}"


Chosen = Mapping[tuple[str, str], tuple[dict, str]]  # (model, method) -> as settings_of returns it


def settings_of(planned: Plan | str, max_grad_norm: float) -> tuple[dict, str]:
    """Return (a cell's memory settings, why it cannot run; "" = it can). max_grad_norm: the recipe's own."""
    return ({}, planned) if isinstance(planned, str) else (switches(planned, max_grad_norm), "")


def choose_settings(
    cells: Sequence[Cell],
    path: Path,
    *,
    max_grad_norm: float,
    row_tokens: int,
    gpu_gb: float,
    qlora_rank: int,
) -> dict[tuple[str, str], tuple[dict, str]]:
    """Return memory settings for a card of gpu_gb, kept in path/memory.json; 0 = the recipe's own."""
    if not gpu_gb:
        return {(cell.model, cell.method): ({}, "") for cell in cells}
    stored = path / FILE
    if not stored.is_file():
        found = plan_memory(cells, row_tokens=row_tokens, gpu_gb=gpu_gb, qlora_rank=qlora_rank)
        write_json(stored, [[*pair, *settings_of(planned, max_grad_norm)] for pair, planned in found.items()])
    rows = json.loads(stored.read_text(encoding="utf-8"))
    return {(model, method): (settings, problem) for model, method, settings, problem in rows}


def with_settings(cells: Sequence[Cell], chosen: Chosen) -> tuple[list[Cell], list[str]]:
    """Return (the cells as they can run, what that changes).

    With updates in the backward pass every step is one row, whatever Table 2 asks for. The control arm with
    one batch size is then left out: every size has that already.
    """
    found, single = [], {}
    for cell in cells:
        settings, _ = chosen[cell.model, cell.method]
        if "batch_traces" not in settings:
            found.append(cell)
        elif cell.arm != FIXED_BATCH:
            single[f"{short_name(cell.model)}, {cell.method}"] = None
            found.append(replace(cell, batch_traces=settings["batch_traces"]))

    models = "; ".join(single)
    forced = f"one row of packed traces per step at every size, to fit the card, for {models}"
    return found, [forced] if single else []

"""The plan of a sweep: which cells fit, how long they take, and what they leave on disk. Estimates, but for the simulated memory.

    training   packed rows x the seconds of a row (kit/memory/seconds.py: counted flops and bytes, an assumed card)
    sampling   the sampler's steps x the larger of (weights and caches) / BANDWIDTH and (2 flops per weight and slot) / FLOPS

A row is taken to be full and one document, the most that attention can cost. The sampler takes tokens / slots steps, as if every
slot were busy to the end, and reads every slot's cache as far as a whole response. Launch overhead and idle slots are ignored, so
real sampling is slower. How long answers get is the experiment's question: their length is assumed, and so is that of a trace.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path

from transformers import PreTrainedConfig

from kit.evaluate.benchmarks import BENCHMARKS
from kit.machine import GIB
from kit.memory.choose import choose, switches
from kit.memory.seconds import ASSUMED, BANDWIDTH, FLOPS, Sizes
from kit.memory.simulate import CARDS, Plan, plan
from kit.models.loading import load_config
from kit.run import write_json
from kit.train.savings import Savings
from kit.valley.study import FIXED_BATCH, QLORA, Cell, short_name

TEXT_BYTES = 5  # of a log, a sampled token: about four characters, and what is written beside them
NF4_BYTES = 4.6  # a weight: half a byte read, two written and two read again, as in kit/memory/seconds.py
OPTIMIZER_BYTES = 2 + 8 / 256  # a trained number: two 8-bit states and their scales


@dataclass(frozen=True)
class Assumed:
    """What a plan takes for granted."""

    trace_tokens: int  # a trace with its problem, on average
    response_tokens: int  # a response, on average


@dataclass(frozen=True)
class Evaluation:
    """One pass over the benchmarks."""

    num_samples: int
    num_slots: int

    @classmethod
    def of(cls, benchmarks: str, *, num_questions: int, num_samples: int, num_slots: int) -> Evaluation:
        """benchmarks: as kit.evaluate.parse_benchmarks takes them; counted from its table, no file is read."""
        table = [BENCHMARKS[word.split("=")[0].strip()] for word in benchmarks.split(",")]
        return cls(sum(min(num_questions or b.num_questions, b.num_questions) * (num_samples or b.num_samples) for b in table),
                   num_slots)  # fmt: skip


def sampling_seconds(
    config: PreTrainedConfig, evaluation: Evaluation, response_tokens: int, *, quantised: bool = False
) -> float:  # fmt: skip
    """Of one evaluation with responses of so many tokens, in bf16, or with layers in NF4; see the head of this file."""
    sizes = Sizes.of(config)
    weights = sizes.linears + sizes.V * sizes.H
    spans = [*sizes.windows, *[response_tokens] * (sizes.L - len(sizes.windows))]
    places = sum(
        min(response_tokens, span) for span in spans
    )  # in all layers, of one slot: a card reads all rows to the longest
    of_weights = (NF4_BYTES if quantised else 2) * sizes.linears + 2 * sizes.V * sizes.H
    moved = of_weights + evaluation.num_slots * 2 * 2 * sizes.kv * places
    steps = evaluation.num_samples * response_tokens / evaluation.num_slots
    return steps * max(moved / BANDWIDTH, 2 * weights * evaluation.num_slots / FLOPS)


@dataclass(frozen=True)
class CellPlan:
    """One cell's estimates."""

    cell: Cell
    memory: Plan | None  # None: it does not fit, or has no config at hand
    why_not: str  # "" where it fits
    config: PreTrainedConfig | None
    evaluation: Evaluation
    assumed: Assumed
    max_steps: int  # 0 = all epochs

    @property
    def num_rows(self) -> float:
        """Packed rows, as full as can be."""
        return self._all_rows * min(1.0, self.max_steps / self._all_steps if self.max_steps else 1.0)

    @property
    def num_steps(self) -> float:
        """Optimizer steps."""
        return min(self._all_steps, self.max_steps or self._all_steps)

    @property
    def _all_rows(self) -> float:
        return self.cell.epochs * self.cell.num_traces * self.assumed.trace_tokens / self.memory.row_tokens

    @property
    def _all_steps(self) -> float:
        if self.memory.savings.update_in_backward:  # one row per step
            return self._all_rows
        return min(self._all_rows, self.cell.epochs * self.cell.num_traces / self.cell.batch_traces)

    @property
    def training_hours(self) -> float:
        seconds = dict(self.memory.seconds)
        once = seconds.pop("offload_optimizer", 0.0)  # a step; all else is of a row
        return (self.num_rows * sum(seconds.values()) + self.num_steps * once) / 3600

    @property
    def sampling_hours(self) -> float:
        """Of the fine-tuned model."""
        return self._sampling_hours(quantised=bool(self.memory.qlora_rank))

    @property
    def baseline_hours(self) -> float:
        """Of the base model, in bf16."""
        return self._sampling_hours(quantised=False)

    def _sampling_hours(self, *, quantised: bool) -> float:
        tokens = self.assumed.response_tokens
        return sampling_seconds(self.config, self.evaluation, tokens, quantised=quantised) / 3600

    @property
    def trained(self) -> int:
        """Numbers that are trained and kept."""
        sizes = Sizes.of(self.config)
        rank = self.memory.qlora_rank
        if rank:
            return (
                sizes.L
                * rank
                * (2 * (sizes.H + sizes.q) + 2 * (sizes.H + sizes.kv) + 3 * (sizes.H + sizes.intermediate))
            )
        return sizes.linears + sizes.V * sizes.H * (1 if sizes.tied else 2)

    @property
    def disk_kept(self) -> int:
        """Bytes: weights in bf16, and the samples before and after."""
        return 2 * self.trained + 2 * self.evaluation.num_samples * self.assumed.response_tokens * TEXT_BYTES

    @property
    def disk_while_training(self) -> int:
        """Bytes of the two checkpoints that lie beside one another while the newer is written."""
        return round(2 * self.trained * (2 + OPTIMIZER_BYTES))


def plan_cells(
    cells: Sequence[Cell], memory: Mapping[tuple[str, str], Plan | str], *, evaluation: Evaluation, assumed: Assumed,
    max_steps: int = 0,
) -> list[CellPlan]:  # fmt: skip
    """A plan a cell, in their order."""
    found = []
    for cell in cells:
        planned = memory[cell.model, cell.method]
        fits = isinstance(planned, Plan)
        config = load_config(cell.model) if fits else None
        found.append(
            CellPlan(
                cell,
                planned if fits else None,
                "" if fits else planned,
                config,
                evaluation,
                assumed,
                max_steps,
            )
        )
    return found


def describe(plans: Sequence[CellPlan], *, num_cards: int = 1) -> str:
    """The plan as a table, its sums, and what they assume. Cells that differ in the seed alone are one line."""
    lines = [
        f"{'cell':<52}{'batch':>6}{'steps':>8}{'training':>12}{'sampling':>12}{'disk kept':>12}{'while training':>16}"
    ]
    alike: dict[Cell, list[CellPlan]] = {}
    for found in plans:
        alike.setdefault(replace(found.cell, seed=0), []).append(found)
    for cell, group in alike.items():
        first, name = (
            group[0],
            cell.name.removesuffix("-seed0") + (f" x {len(group)} seeds" if len(group) > 1 else ""),
        )
        if first.memory is None:
            lines.append(f"{name:<52}  no plan: see above")
            continue
        batch = "1 row" if first.memory.savings.update_in_backward else str(cell.batch_traces)
        lines.append(
            f"{name:<52}{batch:>6}{first.num_steps:>8,.0f}{first.training_hours:>10,.1f} h{first.sampling_hours:>10,.1f} h"
            f"{first.disk_kept / GIB:>8,.1f} GiB{first.disk_while_training / GIB:>12,.1f} GiB"
        )
    fitting = [found for found in plans if found.memory is not None]
    if not fitting:
        return "\n".join([*lines, "no cell can be planned"])
    baselines = {found.cell.baseline: found for found in fitting}
    training = sum(found.training_hours for found in fitting)
    sampling = sum(found.sampling_hours for found in fitting)
    before = sum(found.baseline_hours for found in baselines.values())
    hours = training + sampling + before
    on_several = f", {hours / num_cards:,.1f} h on {num_cards} if they share evenly" if num_cards > 1 else ""
    kept, going = (
        sum(found.disk_kept for found in fitting),
        max(found.disk_while_training for found in fitting) * num_cards,
    )
    assumed, evaluation = fitting[0].assumed, fitting[0].evaluation
    return "\n".join([
        *lines,
        f"{len(fitting)} of {len(plans)} cells can be planned; {len(baselines)} baselines, one a model and seed",
        f"in all  {training:,.1f} h of training, {sampling:,.1f} h of sampling after it, {before:,.1f} h for the baselines: "
        f"{hours:,.1f} h on one card{on_several}",
        f"disk    {kept / GIB:,.0f} GiB of models and samples, which stay, and at most {going / GIB:,.0f} GiB of checkpoints, "
        "which go; RL, what the hub's client stores and the cache of tokens are not counted",
        f"Estimates, not timings: {ASSUMED}; rows full; traces of {assumed.trace_tokens:,} tokens and "
        f"{evaluation.num_samples:,} responses of {assumed.response_tokens:,} tokens an evaluation, both lengths assumed; a step "
        f"of sampling moves the weights and {evaluation.num_slots} busy slots' caches once, launches left out: it takes longer; "
        "reinforcement learning is not estimated.",
    ])  # fmt: skip


def write_plan(path: Path, plans: Sequence[CellPlan]) -> None:
    """The estimates as JSON, a cell each."""
    names = (
        "num_steps",
        "training_hours",
        "sampling_hours",
        "baseline_hours",
        "disk_kept",
        "disk_while_training",
    )
    write_json(path, [
        asdict(found.cell) | {"why_not": found.why_not, "memory": found.memory and found.memory.as_json()}
        | ({name: getattr(found, name) for name in names} if found.memory else {})
        for found in plans
    ])  # fmt: skip


Chosen = Mapping[
    tuple[str, str], tuple[dict, str]
]  # (model, method) -> the recipe's settings, why none fits ("" = they do)
ROWS = 2  # of a step, at least: Table 2 takes 8 traces or more
FILE = "memory.json"  # of a sweep: what was chosen, so that a resumed one need not simulate again


def plan_memory(
    cells: Sequence[Cell],
    *,
    row_tokens: int,
    gpu_gb: float,
    qlora_rank: int,
    report: Callable[[str], None] = print,
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
        f"{field.name} {value}"
        for field in fields(Savings)
        if (value := getattr(planned.savings, field.name)) != field.default
    ]
    return (
        f"{planned.total / GIB:.2f} GiB (simulated); fits {', '.join(f'{gb:g} GB' for gb in cards) or 'no card up to 24 GB'}; "
        f"switched on: {', '.join(on) or 'nothing but the defaults'}"
    )


def settings_of(planned: Plan | str, max_grad_norm: float) -> tuple[dict, str]:
    """What a cell's recipe is given, and why it cannot be run. max_grad_norm: the recipe's own."""
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
    lines = (
        [f"one row of packed traces per step at every size, to fit the card, for {'; '.join(single)}"]
        if single
        else []
    )
    return found, lines

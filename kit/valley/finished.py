"""What a sweep has measured: its finished cells beside their baselines, as curves over the number of traces."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean

from kit.evaluate.results import Result, check_comparable, mean_accuracy
from kit.run import AFTER, BEFORE, SAMPLES, Journal
from kit.valley.curves import ByQuestion, Curve, Estimate, Point, difference, findings
from kit.valley.jobs import DONE, read_outcomes
from kit.valley.sweep import (
    BASELINES,
    CELLS,
    FIXED_BATCH,
    FULL,
    QLORA,
    RL,
    Cell,
    baseline_name,
    read_sweep,
    rl_name,
    short_name,
)

Results = dict[str, Result]  # benchmark -> its samples
LENGTH_BENCHMARK = "math500"  # the paper takes the length of responses there
TITLES = {FULL: "full fine-tuning", QLORA: "QLoRA"}


def curve_name(cell: Cell) -> str:
    """Name of the curve a cell belongs to."""
    return f"{short_name(cell.model)}, {method_name(cell)}"


def method_name(cell: Cell) -> str:
    return TITLES[cell.method] + (
        f", batch {cell.batch_traces} throughout" if cell.arm == FIXED_BATCH else ""
    )


@dataclass(frozen=True)
class Measured:
    """A cell that is done."""

    cell: Cell
    after: Results
    training_seconds: float

    def of(self, model: str, curve: str, num_traces: int) -> bool:
        """Whether it belongs to that point of that curve."""
        return (self.cell.model, curve_name(self.cell), self.cell.num_traces) == (model, curve, num_traces)


@dataclass(frozen=True)
class RLRun:
    """Reinforcement learning from one start, that is done."""

    model: str
    method: str
    num_traces: int  # of the start; 0 = the base model
    seed: int
    stages: dict[str, Results]  # BEFORE and AFTER

    @property
    def name(self) -> str:
        return rl_name(self.model, self.method, self.num_traces, self.seed)

    def accuracy(self, stage: str) -> float:
        return mean_accuracy(list(self.stages[stage].values()))


@dataclass(frozen=True)
class Sweep:
    """Everything a sweep's folder holds that is done."""

    cells: list[Cell]  # all of them, done or not
    deviations: list[str]
    measured: list[Measured]
    baselines: dict[tuple[str, int], Results]  # (model, seed)
    rl: list[RLRun]

    @classmethod
    def read(cls, path: Path) -> Sweep:
        """Raises ValueError if there is no sweep."""
        cells, deviations, rl_sizes = read_sweep(path)
        done = {name for name, outcome in read_outcomes(path).items() if outcome.status == DONE}
        starts = dict.fromkeys((cell.model, cell.seed) for cell in cells)
        baselines = {
            (model, seed): results_in(path / BASELINES / baseline_name(model, seed) / SAMPLES)
            for model, seed in starts if f"baseline {baseline_name(model, seed)}" in done
        }  # fmt: skip
        measured = [
            Measured(cell, results_in(path / CELLS / cell.name / AFTER), _training_seconds(path / CELLS / cell.name))
            for cell in cells if f"cell {cell.name}" in done
        ]  # fmt: skip
        rl_runs = []
        for model, method, seed in dict.fromkeys((cell.model, cell.method, cell.seed) for cell in cells):
            for size in rl_sizes:
                name = rl_name(model, method, size, seed)
                if f"rl {name}" in done:
                    stages = {stage: results_in(path / RL / name / stage) for stage in (BEFORE, AFTER)}
                    rl_runs += [RLRun(model, method, size, seed, stages)] if all(stages.values()) else []
        return cls(cells, deviations, measured, baselines, rl_runs)


def results_in(folder: Path) -> Results:
    """The samples in a folder, a benchmark each."""
    results = (Result.read(file) for file in sorted(folder.glob("*.jsonl")))
    return {result.benchmark: result for result in results if result.rows}


def measured_by(path: Path, kind: str, name: str) -> Results:
    """What a run of the sweep in `path` measured last. kind: baseline, cell or rl."""
    folder = {
        "baseline": path / BASELINES / name / SAMPLES,
        "cell": path / CELLS / name / AFTER,
        "rl": path / RL / name / AFTER,
    }
    return results_in(folder[kind])


def _training_seconds(run: Path) -> float:
    return sum(row["seconds"] for row in Journal(run / "metrics.jsonl").read())


def length_benchmark(sweep: Sweep) -> str:
    """The benchmark whose responses' length is reported: the paper's, or the first there is."""
    names = [
        name
        for results in [*sweep.baselines.values(), *(found.after for found in sweep.measured)]
        for name in results
    ]
    return LENGTH_BENCHMARK if LENGTH_BENCHMARK in names else next(iter(names), LENGTH_BENCHMARK)


def curves_of(sweep: Sweep, model: str) -> tuple[list[Curve], list[str]]:
    """(a curve a method and arm of one model, why cells are left out of them); no curve where no baseline is done."""
    baselines = {seed: results for (name, seed), results in sweep.baselines.items() if name == model}
    if not baselines:
        return [], []
    length_of = length_benchmark(sweep)
    base = _point(0, baselines, length_of)
    groups: dict[str, dict[int, dict[int, Results]]] = {}  # curve -> size -> seed -> results
    refused = []
    for found in sweep.measured:
        if found.cell.model != model:
            continue
        try:
            check_alike(baselines[found.cell.seed], found)
        except ValueError as error:
            refused.append(f"{found.cell.name} is left out: {error}")
        else:
            groups.setdefault(curve_name(found.cell), {}).setdefault(found.cell.num_traces, {})[
                found.cell.seed
            ] = found.after
    curves = [
        Curve(name, base, [_point(size, sizes[size], length_of) for size in sorted(sizes)])
        for name, sizes in groups.items()
    ]
    return curves or [Curve(short_name(model), base, [])], refused


def sentences(sweep: Sweep) -> list[str]:
    """What the cells say, model by model."""
    models = dict.fromkeys(cell.model for cell in sweep.cells)
    return [line for model in models for line in findings(curves_of(sweep, model)[0])] + rl_sentences(
        sweep.rl
    )


def check_alike(before: Results, found: Measured) -> None:
    """Raises ValueError if a cell was measured otherwise than its baseline."""
    if before.keys() != found.after.keys():
        raise ValueError(
            f"it has samples of {', '.join(found.after) or 'nothing'}, its baseline of {', '.join(before)}"
        )
    for name in before:
        check_comparable(before[name], found.after[name])


def _point(num_traces: int, seeds: dict[int, Results], length_of: str) -> Point:
    return Point(num_traces, {s: shares(results) for s, results in seeds.items()},
                 {s: tokens(results, length_of) for s, results in seeds.items()})  # fmt: skip


def shares(results: Results) -> ByQuestion:
    """(benchmark, question) -> share of right samples."""
    return {
        (name, question): share
        for name, result in results.items()
        for question, share in result.by_question().items()
    }


def tokens(results: Results, benchmark: str) -> ByQuestion:
    """(benchmark, question) -> mean tokens of the responses."""
    found: dict[tuple[str, str], list[int]] = {}
    for row in results[benchmark].rows:
        found.setdefault((benchmark, row["question"]), []).append(row["tokens"])
    return {question: fmean(counts) for question, counts in found.items()}


def rl_change(rl_run: RLRun) -> str:
    """What reinforcement learning did to accuracy, with its interval."""
    seed = rl_run.seed
    return _points(difference({seed: shares(rl_run.stages[AFTER])}, {seed: shares(rl_run.stages[BEFORE])}))


def _points(change: Estimate) -> str:
    return f"{100 * change.mean:+.1f} points ± {100 * change.half:.1f}"


def rl_sentences(rl_runs: Sequence[RLRun]) -> list[str]:
    """Of every fine-tuned start, whether RL ends above or below where it ends from the base model; paired by seed."""
    ends: dict[
        tuple[str, str], dict[int, dict[int, ByQuestion]]
    ] = {}  # (model, method) -> size -> seed -> shares
    for rl_run in rl_runs:
        sizes = ends.setdefault((rl_run.model, rl_run.method), {})
        sizes.setdefault(rl_run.num_traces, {})[rl_run.seed] = shares(rl_run.stages[AFTER])
    lines = []
    for (model, method), sizes in ends.items():
        for size in (size for size in sorted(sizes) if size and 0 in sizes):
            change = difference(sizes[size], sizes[0])
            side = "above" if change.above_zero() else "below" if change.below_zero() else ""
            ending = f"ends {side}" if side else "cannot be told from"
            lines.append(
                f"{short_name(model)}, {TITLES[method]}: reinforcement learning from the model after {size:,} traces {ending} "
                f"that from the base model ({_points(change)})."
            )
    return lines

"""Read what a study has measured so far, as curves over the number of traces."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from statistics import fmean

from kit.evaluate.results import (
    AS_THE_PAPER,
    STRICT,
    Result,
    check_comparable,
    group_by_question,
    headline,
    mean_accuracy,
    read_results,
)
from kit.journal import CONFIG, STEP, Journal
from kit.paper import LENGTH_BENCHMARK, REWARD
from kit.run import AFTER, BEFORE, SAMPLES, kept_traces, read_json, read_json_if_any, write_json
from kit.valley.curves import ByQuestion, Curve, Point
from kit.valley.jobs import DONE, Outcome, read_outcomes
from kit.valley.study import Cell, short_name

Results = dict[str, Result]  # benchmark -> its samples
STUDY = "study.json"
CELLS, RL = "cells", "rl"  # folders of a study: of runs by the cell's name, and of RL by the start's name


@dataclass(frozen=True)
class Finished:
    """A cell that is done."""

    cell: Cell
    results: Results  # of the fine-tuned model, or of the base model
    metrics: Sequence[dict]  # one row per step; none for a base model
    num_kept: int = 0  # traces that it was trained on; 0 = not known

    @property
    def accuracy(self) -> float:
        """The paper's headline: the unweighted mean over its benchmarks, or over all without any of them."""
        return mean_accuracy(self.results)

    @property
    def training_seconds(self) -> float:
        return sum(row["seconds"] for row in self.metrics)


@dataclass(frozen=True)
class RLRun:
    """Reinforcement learning from one start, that is done."""

    start: Cell
    stages: dict[str, Results]  # BEFORE and AFTER
    rewards: Sequence[float]  # mean reward of each step
    reward: str = REWARD  # what is rewarded: the recipe's setting


@dataclass(frozen=True)
class StudyResults:
    """Everything that is done in a study's folder."""

    cells: list[Cell]  # to fine-tune, done or not, in the study's order
    deviations: list[str]  # from the paper
    outcomes: dict[str, Outcome]  # of every run that has ended, by name
    finished: list[Finished]  # base models first
    rl: list[RLRun]
    settings: Mapping[str, object] = field(default_factory=dict)  # of the recipe

    @classmethod
    def read(cls, path: Path) -> StudyResults:
        """Read the study in `path`. Raises ValueError if there is none."""
        if not (path / STUDY).is_file():
            raise ValueError(
                f"{path} holds no study ({STUDY}); pass a run folder of valley_demo.py or valley_sweep.py"
            )
        stored = read_json(path / STUDY)
        cells = [Cell(**row) for row in stored["cells"]]
        outcomes = read_outcomes(path)
        done = {name for name, outcome in outcomes.items() if outcome.status == DONE}

        bases = dict.fromkeys(Cell.of_base(cell.model, cell.seed, cell.method) for cell in cells)
        measured = [*dict.fromkeys(Cell.of_base(cell.model, cell.seed) for cell in cells), *cells]
        finished = [read_cell(path, cell) for cell in measured if cell.name in done]
        rl_runs = [read_rl(path, start) for start in [*bases, *cells] if rl_name(start) in done]
        return cls(
            cells,
            stored["deviations"],
            outcomes,
            finished,
            [run for run in rl_runs if all(run.stages.values())],
            read_json_if_any(path / CONFIG),
        )

    @property
    def is_short(self) -> bool:
        """Whether this is the demo's --smoke, which --quick continues to more traces."""
        return bool(self.settings.get("smoke")) and "quick" in self.settings

    @property
    def models(self) -> list[str]:
        return list(dict.fromkeys(cell.model for cell in self.cells))

    def bases(self, model: str) -> dict[int, Finished]:
        """Return seed -> the base model's samples."""
        return {
            found.cell.seed: found
            for found in self.finished
            if found.cell.model == model and not found.cell.num_traces
        }

    def points(self, model: str) -> tuple[dict[str, dict[int, list[Finished]]], list[str]]:
        """Return (curve -> size -> its seeds, what is wrong with cells); no curve if no baseline is done."""
        bases, groups, refused = self.bases(model), {}, []
        for found in self.finished:
            if found.cell.model == model and found.cell.num_traces and bases:
                if 0 < found.num_kept < found.cell.num_traces:
                    traces = f"only {found.num_kept:,} traces, since its data has no more"
                    refused.append(f"{found.cell.name} was trained on {traces}")
                try:
                    check_alike(bases[found.cell.seed].results, found.results)
                except ValueError as error:
                    refused.append(f"{found.cell.name} is left out: {error}")
                else:
                    sizes = groups.setdefault(found.cell.curve, {})
                    sizes.setdefault(found.cell.num_traces, []).append(found)
        return {name: dict(sorted(sizes.items())) for name, sizes in groups.items()}, refused

    def curves(self, model: str) -> list[Curve]:
        """Return one curve for each method and arm of a model that has a finished size."""
        bases, length_of, curves = list(self.bases(model).values()), self.length_benchmark, []
        for name, sizes in self.points(model)[0].items():
            points = [point_of(seeds, length_of) for seeds in sizes.values()]
            curves.append(Curve(f"{short_name(model)}, {name}", point_of(bases, length_of), points))
        return curves

    @property
    def length_benchmark(self) -> str:
        """The benchmark whose responses' length is reported: the paper's, or the first there is."""
        names = [name for found in self.finished for name in found.results]
        return LENGTH_BENCHMARK if LENGTH_BENCHMARK in names else next(iter(names), LENGTH_BENCHMARK)


def write_study(path: Path, cells: Sequence[Cell], deviations: Sequence[str]) -> None:
    """Write what the report needs to know beside the run folders."""
    write_json(path / STUDY, {"cells": [asdict(cell) for cell in cells], "deviations": list(deviations)})


def rl_name(start: Cell) -> str:
    """Return the name of the job that trains this start with reinforcement learning."""
    return f"rl {start.name}"


def read_cell(path: Path, cell: Cell) -> Finished:
    """Read what the run of a cell, or of a base model, has measured last."""
    run = path / CELLS / cell.name
    results = read_results(run / (AFTER if cell.num_traces else SAMPLES))
    metrics = Journal(run / "metrics.jsonl", STEP.with_numbers("seconds")).read()
    return Finished(cell, results, metrics, kept_traces(run))


def read_rl(path: Path, start: Cell) -> RLRun:
    """Read reinforcement learning from this start."""
    run = path / RL / start.name
    stages = {stage: read_results(run / stage) for stage in (BEFORE, AFTER)}
    metrics = Journal(run / "metrics.jsonl", STEP.with_numbers("reward_mean")).read()
    reward = read_json_if_any(run / CONFIG).get("reward", REWARD)
    return RLRun(start, stages, [row["reward_mean"] for row in metrics], reward)


def check_alike(before: Results, after: Results) -> None:
    """Raise ValueError if a cell was measured differently from its baseline."""
    if before.keys() != after.keys():
        raise ValueError(
            f"it has samples of {', '.join(after) or 'nothing'}, its baseline of {', '.join(before)}"
        )
    for name in before:
        check_comparable(before[name], after[name])


def point_of(seeds: Sequence[Finished], length_of: str) -> Point:
    """Return these seeds as a point of a curve. length_of: the benchmark whose responses' length counts."""
    return Point(
        seeds[0].cell.num_traces,
        {found.cell.seed: shares(found.results) for found in seeds},
        {found.cell.seed: tokens(found.results, length_of) for found in seeds},
        paper_shares(seeds),
    )


def of_seeds(seeds: Sequence[Finished], benchmark: str) -> tuple[int, dict[int, Result]]:
    """Return (the number of traces of these seeds, seed -> its samples of one benchmark)."""
    return seeds[0].cell.num_traces, {found.cell.seed: found.results[benchmark] for found in seeds}


def shares(results: Results, column: str = STRICT) -> ByQuestion:
    """Return (benchmark, question) -> share of right samples, of the headline's benchmarks.

    column: of the verdicts, STRICT or AS_THE_PAPER.
    """
    return {
        (name, question): share
        for name, result in headline(results).items()
        for question, share in result.by_question(column).items()
    }


def paper_shares(seeds: Sequence[Finished]) -> dict[int, ByQuestion] | None:
    """Return seed -> shares by the paper's grading; None if a log was not graded that way."""
    results = [result for found in seeds for result in headline(found.results).values()]
    if any(result.paper_accuracy is None for result in results):
        return None
    return {found.cell.seed: shares(found.results, AS_THE_PAPER) for found in seeds}


def tokens(results: Results, benchmark: str) -> ByQuestion:
    """Return (benchmark, question) -> mean tokens of the responses."""
    counts = group_by_question(results[benchmark].rows, lambda row: row["tokens"])
    return {(benchmark, question): fmean(found) for question, found in counts.items()}

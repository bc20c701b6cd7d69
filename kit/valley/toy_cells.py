"""The valley at toy scale: fine-tune one small model on more and more traces, and measure every model that comes out.

A cell (kit/valley/study.py) goes through the pipeline of the real recipes: kit.data.traces, kit.packing,
kit.train.loop, kit.evaluate.measure. A finished one is a line of cells.jsonl, beside a folder with its
samples and weights; a run that is killed goes on inside the cells it was in, and what is finished is kept.
Cells run in processes of their own, in one thread each: their numbers do not depend on each other."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from statistics import fmean

from tqdm import tqdm

from kit import models
from kit.data.chat import ChatFormat
from kit.data.documents import make_documents
from kit.data.toy import make_traces
from kit.evaluate.benchmarks import Benchmark
from kit.evaluate.measure import evaluate
from kit.evaluate.results import Result
from kit.run import Journal, RunFolder
from kit.train.loop import TrainingPlan, train
from kit.train.savings import Savings
from kit.valley.curves import Curve, Point
from kit.valley.processes import run_apart
from kit.valley.study import ARMS, BASE, Cell, Study

SAMPLES = "samples"  # folder of a cell's samples
MAX_ROW_TOKENS = 2_048  # of a pack: larger ones are no faster on a CPU
SAMPLE_COST = (
    4  # measured: a sampled token takes about as long as this many trained ones; for the time left alone
)


@dataclass(frozen=True)
class Finished:
    """A cell that is done: its line of the journal and its samples."""

    cell: Cell
    row: dict
    result: Result


def usual_tokens(arm: str) -> float:
    """Tokens of a trace with its problem: 48 where it is short, 119 where it is long, on average."""
    return 48 + 71 * (ARMS[arm].long_share if arm in ARMS else 0)


def plan_of(study: Study, cell: Cell, lengths: Sequence[int]) -> TrainingPlan:
    """Rows as long as a step's traces are together, so that a batch of few traces is a batch of few traces."""
    row_tokens = max(*lengths, min(MAX_ROW_TOKENS, cell.batch_traces * sum(lengths) // len(lengths)))
    return TrainingPlan.make(
        lengths, row_tokens=row_tokens, batch_traces=cell.batch_traces, epochs=study.epochs, seed=cell.seed
    )


def make_cell(cell: Cell, study: Study, benchmark: Benchmark, path: Path) -> dict:
    """Train a cell's model, or go on with it, and measure it: its line of the journal, its samples and weights in `path`."""
    run = RunFolder(path)
    path.mkdir(parents=True, exist_ok=True)
    row = {"cell": cell.name, **asdict(cell)}
    model, tokenizer = models.load(cell.model, device="cpu")
    row["parameters"] = sum(parameter.numel() for parameter in model.parameters())
    chat = ChatFormat(tokenizer, instruction="")
    if cell.arm != BASE:
        held_out = {question.problem for question in benchmark.questions}
        documents = make_documents(
            make_traces(ARMS[cell.arm].long_share, cell.num_traces, cell.seed, held_out), chat
        )
        plan = plan_of(study, cell, [len(document) for document in documents])
        trained = train(
            model, tokenizer, documents, plan, run,
            lr=study.lr, warmup_ratio=study.warmup_ratio, beta2=0.95, savings=Savings(recompute=False),
            checkpoint_every=study.checkpoint_every, seed=cell.seed,
        )  # fmt: skip
        model, _ = models.load(str(trained), device="cpu")  # what is measured is what was saved
        metrics = run.metrics.read()
        row |= {
            "epochs": study.epochs,
            "steps": len(plan.steps),
            "trained_tokens": plan.tokens,
            "loss": metrics[-1]["loss"],
            "training_seconds": round(sum(step["seconds"] for step in metrics)),
        }
    start = time.perf_counter()
    result = evaluate(
        model, chat, benchmark, study.params, path / SAMPLES,
        num_samples=study.num_samples, num_slots=study.num_slots, seed=cell.seed,
    )  # fmt: skip
    row |= {
        name: getattr(result, name)
        for name in ("accuracy", "mean_tokens", "truncated", "looping", "reflection")
    }
    row |= {"sampled_tokens": sum(sample["tokens"] for sample in result.rows),
            "sampling_seconds": round(time.perf_counter() - start)}  # fmt: skip
    return row


class Valley:
    """A study in a folder: cells.jsonl, and a folder per cell under cells/."""

    def __init__(self, study: Study, benchmark: Benchmark, path: Path):
        self.study, self.benchmark, self.path = study, benchmark, path
        self.journal = Journal(path / "cells.jsonl")

    def run(self, *, num_workers: int = 1) -> Iterator[Finished]:
        """Make and measure every cell that is not done yet, num_workers at a time; gives each as it is finished."""
        done = {row["cell"] for row in self.journal.read()}
        # within a seed the longest first, so that the processes end together
        waiting = sorted(
            self.study.cells(), key=lambda cell: (cell.arm != BASE, cell.seed, -self._cost(cell))
        )
        waiting = [cell for cell in waiting if cell.name not in done]
        jobs = [(cell, self.study, self.benchmark, self.path / "cells" / cell.name) for cell in waiting]
        finished = 0.0
        with tqdm(total=sum(map(self._cost, waiting)), unit=" tokens", unit_scale=True, disable=None) as bar:

            def show(running: list[tuple]) -> None:
                bar.set_description(", ".join(cell.name for cell, *_ in running))
                bar.update(finished + sum(self._trained_so_far(cell) for cell, *_ in running) - bar.n)

            for (cell, *_), row in run_apart(
                make_cell, jobs, num_workers=num_workers, log=self.path / "workers.log", on_wait=show
            ):
                row = {"place": self.study.place_of(cell), **row}  # they do not end in the order of the study
                self.journal.append(row)
                finished += self._cost(cell)
                yield _finished(row, self.path)

    def trained_tokens(self) -> float:
        """Of all cells together, about: from the toy's usual lengths."""
        return sum(self._trained_tokens(cell) for cell in self.study.cells())

    def _trained_tokens(self, cell: Cell) -> float:
        return cell.num_traces * self.study.epochs * usual_tokens(cell.arm)

    def _cost(self, cell: Cell) -> float:
        """Trained tokens, and sampled ones at their weight: what the bar counts."""
        samples = len(self.benchmark.questions) * self.study.num_samples
        return self._trained_tokens(cell) + SAMPLE_COST * samples * usual_tokens(cell.arm)

    def _trained_so_far(self, cell: Cell) -> float:
        traces = steps_so_far(self.path / "cells" / cell.name) * cell.batch_traces
        return min(traces * usual_tokens(cell.arm), self._trained_tokens(cell))


def steps_so_far(path: Path) -> int:
    """Of the training run in `path`, which another process is writing."""
    metrics = path / "metrics.jsonl"
    return metrics.read_bytes().count(b"\n") if metrics.is_file() else 0


def read_cells(path: Path) -> list[Finished]:
    """The finished cells of the study in `path`, in its order, with their samples. Raises ValueError if there is none."""
    rows = Journal(path / "cells.jsonl").read() if (path / "cells.jsonl").is_file() else []
    if not rows:
        raise ValueError(
            f"{path} holds no finished cell (cells.jsonl); pass the folder of a run of recipes/valley_demo.py"
        )
    return [_finished(row, path) for row in sorted(rows, key=lambda row: row["place"])]


def cell_of(row: dict) -> Cell:
    """The cell of a line of the journal."""
    return Cell(**{field.name: row[field.name] for field in fields(Cell)})


def _finished(row: dict, path: Path) -> Finished:
    cell = cell_of(row)
    return Finished(cell, row, Result.read(next((path / "cells" / cell.name / SAMPLES).glob("*.jsonl"))))


def by_point(found: Sequence[Finished]) -> dict[tuple[str, str, int], list[Finished]]:
    """(model, arm, number of traces) -> its seeds, in the study's order."""
    groups: dict[tuple[str, str, int], list[Finished]] = {}
    for done in found:
        groups.setdefault((done.cell.model, done.cell.arm, done.cell.num_traces), []).append(done)
    return groups


def first_model(found: Sequence[Finished]) -> list[Finished]:
    """The cells of the model that all arms were run on."""
    return [done for done in found if done.cell.model == found[0].cell.model]


def first_arm(found: Sequence[Finished]) -> str | None:
    """The arm with all sizes; None if only base models have been measured."""
    return next((done.cell.arm for done in found if done.cell.arm != BASE), None)


def describe(finished: Finished) -> str:
    """A model by its size, as a figure's legend says it."""
    return f"model of {finished.row['parameters'] / 1_000:,.0f}k parameters"


def title_of(finished: Finished, found: Sequence[Finished]) -> str:
    """The name of the curve that a cell is on: its arm's, with the model where that is not the first one."""
    title = ARMS[finished.cell.arm].title
    return title if finished.cell.model == found[0].cell.model else f"{title}, {describe(finished)}"


def curves(found: Sequence[Finished]) -> list[Curve]:
    """A curve an arm of each model, in the study's order; a point has the seeds that are finished so far. A model whose base
    self has not been measured yet has none."""
    points = by_point(found)
    bases = {model: point_of(cells) for (model, arm, _), cells in points.items() if arm == BASE}
    drawn: dict[tuple[str, str], Curve] = {}
    for (model, arm, _), cells in points.items():
        if model in bases and arm != BASE:
            curve = drawn.setdefault((model, arm), Curve(title_of(cells[0], found), bases[model], []))
            curve.points.append(point_of(cells))
    return list(drawn.values())


def point_of(cells: Sequence[Finished]) -> Point:
    """The seeds of one point."""
    return Point(
        cells[0].cell.num_traces,
        shares={done.cell.seed: done.result.by_question() for done in cells},
        tokens={done.cell.seed: _tokens_by_question(done.result) for done in cells},
    )


def _tokens_by_question(result: Result) -> dict[str, float]:
    tokens: dict[str, list[int]] = {}
    for row in result.rows:
        tokens.setdefault(row["question"], []).append(row["tokens"])
    return {question: fmean(counts) for question, counts in tokens.items()}

"""The valley at toy scale: fine-tune one small model on more and more traces, and measure every model that comes out.

A cell is one model: an arm (what the traces are), a number of traces, a seed. It goes through the pipeline of the real recipes:
kit.data, kit.packing, kit.sft, kit.evaluate. A finished cell is one line of cells.jsonl, beside a folder with its samples and
weights; a run that is killed goes on inside the cell it was in, and what is finished is kept.
"""

from __future__ import annotations

import random
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import fmean

from tqdm import tqdm

from kit import models
from kit.benchmarks import Benchmark
from kit.chat import ChatFormat
from kit.data import Trace, make_documents
from kit.evaluate import evaluate
from kit.generate import SamplingParams
from kit.journal import Journal
from kit.results import Result
from kit.run import RunFolder
from kit.savings import Savings
from kit.sft import TrainingPlan, train
from kit.toy import long_trace, make_chain, short_trace
from kit.valley_curves import Curve, Point

BASE = "base"  # the arm of the untouched model
SAMPLES = "samples"  # folder of a cell's samples
MAX_ROW_TOKENS = 2_048  # of a pack: larger ones are no faster on a CPU
CHECKPOINT_EVERY = 200  # steps: about a minute of work can be lost
SAMPLE_COST = 4  # measured: a sampled token takes about as long as this many trained ones; for the time left alone


@dataclass(frozen=True)
class Arm:
    """What the models of one curve are trained on."""

    title: str
    long_share: float  # of the traces, the others being short; the problems are the same in every arm
    fixed_batch: bool = False  # the largest size's batch at every size


ARMS = {
    "long": Arm("long traces", 1.0),
    "short": Arm("short traces", 0.0),
    "mixed": Arm("half short, half long", 0.5),
    "fixed": Arm("long traces, fixed batch", 1.0, fixed_batch=True),
}


@dataclass(frozen=True)
class Cell:
    """One model to make and measure."""

    arm: str  # of ARMS, or BASE
    num_traces: int  # 0 for BASE
    seed: int  # of traces, packs and samples
    batch_traces: int = 0  # traces a step; 0 for BASE

    @property
    def name(self) -> str:
        return f"{self.arm}-{self.num_traces}-seed{self.seed}"


@dataclass(frozen=True)
class Study:
    """What all cells share. The rule of the batch is the paper's Table 2 in small: it grows with the data, so that from
    min_batch * steps_an_epoch traces on the number of steps stays the same."""

    model: str = "tiny"
    arms: tuple[str, ...] = tuple(ARMS)
    sizes: tuple[int, ...] = (16, 64, 256, 1_024, 4_096, 16_384)  # traces, of the first arm
    control_sizes: tuple[int, ...] = (16, 64, 256, 1_024, 4_096)  # of the other arms
    seeds: int = 3
    epochs: int = 4
    lr: float = 3e-4
    warmup_ratio: float = 0.05
    min_batch: int = 4  # traces a step
    steps_an_epoch: int = 256
    params: SamplingParams = field(default_factory=lambda: SamplingParams(max_new_tokens=512))
    num_samples: int = 4  # a question
    num_slots: int = 100

    def __post_init__(self):
        for arm in self.arms:
            if arm not in ARMS:
                raise ValueError(f"there is no arm {arm!r}; the arms are {', '.join(ARMS)}")
        for name, fits, rule in (
            ("arms", len(self.arms) == len(set(self.arms)) > 0, "one or more, each once"),
            ("sizes", self.sizes and _grows(self.sizes), "numbers of traces, each larger than the one before"),
            ("control_sizes", _grows(self.control_sizes), "numbers of traces, each larger than the one before"),
            ("seeds", self.seeds >= 1, ">= 1"),
            ("min_batch", self.min_batch >= 1, ">= 1"),
            ("steps_an_epoch", self.steps_an_epoch >= 1, ">= 1"),
        ):  # fmt: skip
            if not fits:
                raise ValueError(f"{name} is {getattr(self, name)} but must be {rule}")

    def batch_of(self, num_traces: int) -> int:
        """Traces a step where the batch grows with the data."""
        return max(self.min_batch, num_traces // self.steps_an_epoch)

    def cells(self) -> list[Cell]:
        """Every cell, the untouched model first, then seed by seed, so that one seed's picture is whole before the next begins.

        The arm with a fixed batch, the largest size's, leaves out where it is the long arm, and where an epoch is a single step.
        """
        cells = [Cell(BASE, 0, seed) for seed in range(self.seeds)]
        fixed = self.batch_of(self.sizes[-1])
        for seed in range(self.seeds):
            for arm in self.arms:
                for size in self.sizes if arm == self.arms[0] else self.control_sizes:
                    if not ARMS[arm].fixed_batch:
                        cells.append(Cell(arm, size, seed, self.batch_of(size)))
                    elif self.batch_of(size) < fixed < size:
                        cells.append(Cell(arm, size, seed, fixed))
        return cells


def _grows(sizes: Sequence[int]) -> bool:
    return all(before < after for before, after in zip((0, *sizes), sizes, strict=False))


def make_traces(arm: Arm, num_traces: int, seed: int, exclude: set[str]) -> list[Trace]:
    """num_traces toy problems with a trace each, none of them in `exclude`, no problem twice.

    The problems depend on the seed alone, and a smaller number is a prefix of a larger one: the arms differ in the traces, the
    sizes are nested. Long and short traces are spread evenly.
    """
    problems, seen, traces = random.Random(f"problems {seed}"), set(exclude), []
    while len(traces) < num_traces:
        chain = make_chain(problems, problems.randint(2, 8))
        if chain.problem in seen:
            continue
        seen.add(chain.problem)
        i = len(traces)
        is_long = int((i + 1) * arm.long_share) > int(i * arm.long_share)
        text = long_trace(chain, random.Random(f"trace {seed} {chain.problem}")) if is_long else short_trace(chain)
        traces.append(Trace(chain.problem, text, f"toy[{i}]"))
    return traces


@dataclass(frozen=True)
class Finished:
    """A cell that is done: its line of the journal and its samples."""

    cell: Cell
    row: dict
    result: Result


def _usual_tokens(arm: str) -> float:
    """Tokens of a trace with its problem: 48 where it is short, 119 where it is long, on average."""
    return 48 + 71 * (ARMS[arm].long_share if arm in ARMS else 0)


class Valley:
    """A study in a folder: cells.jsonl, and a folder a cell under cells/."""

    def __init__(self, study: Study, benchmark: Benchmark, path: Path):
        self.study, self.benchmark, self.path = study, benchmark, path
        self.journal = Journal(path / "cells.jsonl")
        self.held_out = {question.problem for question in benchmark.questions}

    def run(self) -> Iterator[Finished]:
        """Make and measure every cell that is not done yet; gives each as it is finished."""
        cells = self.study.cells()
        done = {row["cell"] for row in self.journal.read()}
        waiting = [cell for cell in cells if cell.name not in done]
        costs = {cell: self._cost(cell) for cell in cells}
        with tqdm(total=sum(costs[cell] for cell in waiting), unit=" tokens", unit_scale=True, disable=None) as bar:
            for number, cell in enumerate(waiting, len(cells) - len(waiting) + 1):
                bar.set_description(f"{cell.name} ({number} of {len(cells)})")
                yield self._run(cell)
                bar.update(costs[cell])

    def trained_tokens(self) -> float:
        """Of all cells together, about: from the toy's usual lengths."""
        return sum(self._trained_tokens(cell) for cell in self.study.cells())

    def _trained_tokens(self, cell: Cell) -> float:
        return cell.num_traces * self.study.epochs * _usual_tokens(cell.arm)

    def _cost(self, cell: Cell) -> float:
        """Trained tokens, and sampled ones at their weight: what the bar counts."""
        samples = len(self.benchmark.questions) * self.study.num_samples
        return self._trained_tokens(cell) + SAMPLE_COST * samples * _usual_tokens(cell.arm)

    def _run(self, cell: Cell) -> Finished:
        study, run = self.study, RunFolder(self.path / "cells" / cell.name)
        run.path.mkdir(parents=True, exist_ok=True)
        row = {"cell": cell.name, "arm": cell.arm, "num_traces": cell.num_traces, "seed": cell.seed,
               "batch_traces": cell.batch_traces}  # fmt: skip
        model, tokenizer = models.load(study.model, device="cpu")
        chat = ChatFormat(tokenizer, instruction="")
        if cell.arm != BASE:
            documents = make_documents(make_traces(ARMS[cell.arm], cell.num_traces, cell.seed, self.held_out), chat)
            plan = self.plan(cell, [len(document) for document in documents])
            trained = train(
                model, tokenizer, documents, plan, run,
                lr=study.lr, warmup_ratio=study.warmup_ratio, beta2=0.95, savings=Savings(recompute=False),
                checkpoint_every=CHECKPOINT_EVERY, seed=cell.seed,
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
            model, chat, self.benchmark, study.params, run.path / SAMPLES,
            num_samples=study.num_samples, num_slots=study.num_slots, seed=cell.seed,
        )  # fmt: skip
        row |= {name: getattr(result, name) for name in ("accuracy", "mean_tokens", "truncated", "looping", "reflection")}
        row |= {"sampled_tokens": sum(sample["tokens"] for sample in result.rows),
                "sampling_seconds": round(time.perf_counter() - start)}  # fmt: skip
        self.journal.append(row)
        return Finished(cell, row, result)

    def plan(self, cell: Cell, lengths: Sequence[int]) -> TrainingPlan:
        """Rows as long as a step's traces are together, so that a batch of few traces is a batch of few traces."""
        row_tokens = max(*lengths, min(MAX_ROW_TOKENS, cell.batch_traces * sum(lengths) // len(lengths)))
        return TrainingPlan.make(
            lengths, row_tokens=row_tokens, batch_traces=cell.batch_traces, epochs=self.study.epochs, seed=cell.seed
        )


def read_cells(path: Path) -> list[Finished]:
    """The finished cells of the study in `path`, with their samples. Raises ValueError where there is none."""
    rows = Journal(path / "cells.jsonl").read() if (path / "cells.jsonl").is_file() else []
    if not rows:
        raise ValueError(f"{path} holds no finished cell (cells.jsonl); pass the folder of a run of recipes/valley_demo.py")
    return [
        Finished(
            Cell(row["arm"], row["num_traces"], row["seed"], row["batch_traces"]),
            row,
            Result.read(next((path / "cells" / row["cell"] / SAMPLES).glob("*.jsonl"))),
        )
        for row in rows
    ]


def curves(found: Sequence[Finished]) -> list[Curve]:
    """A curve an arm, in the order of ARMS; a point has the seeds that are finished so far."""
    if not any(cell.cell.arm == BASE for cell in found):
        return []
    base = _point(found, BASE, 0)
    drawn = []
    for name, arm in ARMS.items():
        sizes = sorted({cell.cell.num_traces for cell in found if cell.cell.arm == name})
        if sizes:
            drawn.append(Curve(arm.title, base, [_point(found, name, size) for size in sizes]))
    return drawn


def _point(found: Sequence[Finished], arm: str, num_traces: int) -> Point:
    cells = [cell for cell in found if (cell.cell.arm, cell.cell.num_traces) == (arm, num_traces)]
    return Point(
        num_traces,
        shares={cell.cell.seed: cell.result.by_question() for cell in cells},
        tokens={cell.cell.seed: _tokens_by_question(cell.result) for cell in cells},
    )


def _tokens_by_question(result: Result) -> dict[str, float]:
    tokens: dict[str, list[int]] = {}
    for row in result.rows:
        tokens.setdefault(row["question"], []).append(row["tokens"])
    return {question: fmean(counts) for question, counts in tokens.items()}

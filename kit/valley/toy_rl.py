"""Reinforcement learning from three starts of a valley: the base model, the one at its lowest point, the one
trained on the most traces.

The algorithm is kit/rl/grpo.py, the task the valley's own: prompts are problems of its kind that nothing is
measured on. Before and after, the valley's questions are answered with new samples, since the lowest of
several points is in part bad luck. The base model is right nearly always: it can only stay or fall, and
no start can end much above it. Every start is a run folder under rl/ that resumes, with its metrics and its
samples; a line of rl.jsonl says that it is finished.

The learning rate is the better of two that were tried, one seed, 60 steps, % right before and after on 100 other problems of the
kind: from 64 long traces 4.8 -> 89.5 at 1e-4 and 4.8 -> 24.5 at 3e-4; from 16,384 77.8 -> 83.5 and 77.8 -> 83.0. Longer problems
were tried as well: the base model solves those with eight numbers, the most it has seen, and hardly one with nine (3 %),
before and after 60 steps at either rate.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import fmean

from tqdm import tqdm

from kit import models
from kit.data.chat import ChatFormat
from kit.data.problems import Question
from kit.data.toy import make_rows
from kit.evaluate.benchmarks import Benchmark
from kit.evaluate.measure import evaluate
from kit.evaluate.results import Result
from kit.rl.grpo import Policy
from kit.rl.loop import train
from kit.rl.settings import Settings
from kit.run import Journal, RunFolder
from kit.train.savings import Savings
from kit.valley.curves import ByQuestion, difference, estimate, percent
from kit.valley.processes import run_apart
from kit.valley.study import ARMS, BASE, Cell, Study
from kit.valley.toy_cells import Finished, Valley, by_point, cell_of, first_arm, first_model, steps_so_far

MAX_NEW_TOKENS = 384  # of an answer to learn from; the longest trace has about 340
NUM_PROMPTS = 2_000  # problems to draw from
BATCH_PROMPTS = 16  # a step, 8 answers each
LR, KL_COEF = 1e-4, 1e-3


@dataclass(frozen=True)
class RLRun:
    """One start and what reinforcement learning made of it."""

    cell: Cell
    rewards: Sequence[float]  # a step
    before: Result
    after: Result


def starts(found: Sequence[Finished]) -> list[Cell]:
    """For every finished seed of the first model: the base model itself and, of the first arm, the size where
    accuracy is lowest and the largest."""
    arm = first_arm(found)
    means = {size: fmean(done.row["accuracy"] for done in cells) for (model, name, size), cells in by_point(found).items()
             if (model, name) == (found[0].cell.model, arm)}  # fmt: skip
    if not means:
        raise ValueError(
            "no model of any arm is finished, so there is no start to compare; finish the demo first"
        )
    wanted = [(BASE, 0), *((arm, size) for size in sorted({min(means, key=means.get), max(means)}))]
    return [
        done.cell
        for key in wanted
        for done in first_model(found)
        if (done.cell.arm, done.cell.num_traces) == key
    ]


def make_rl_run(cell: Cell, study: Study, benchmark: Benchmark, path: Path, steps: int) -> dict:
    """Train one start for `steps` steps, or go on with it, and measure it: its line of the journal."""
    run = RunFolder(path / "rl" / cell.name)
    where = cell.model if cell.arm == BASE else str(path / "cells" / cell.name / "model")
    model, tokenizer = models.load(where, device="cpu")
    chat = ChatFormat(tokenizer, instruction="")
    max_new_tokens = min(MAX_NEW_TOKENS, study.params.max_new_tokens)
    settings = Settings(max_new_tokens=max_new_tokens, num_slots=256, minibatch_prompts=8, row_tokens=4_096, kl_coef=KL_COEF,
                        seed=cell.seed)  # fmt: skip
    policy = Policy(model, chat, settings, lr=LR, savings=Savings(recompute=False))

    def measure(model, stage: str) -> Result:
        return evaluate(
            model, chat, benchmark, study.params, run.path / stage,
            num_samples=study.num_samples, num_slots=study.num_slots, seed=study.seeds + cell.seed,
        )  # fmt: skip

    before = measure(model, "before")
    prompts = prompts_for(benchmark, cell.seed)
    trained = train(policy, prompts, run, steps=steps, batch_prompts=BATCH_PROMPTS, checkpoint_every=10)
    policy.close()
    model, _ = models.load(str(trained), device="cpu")
    after = measure(model, "after")
    return {
        "cell": cell.name,
        **asdict(cell),
        "steps": steps,
        "before": before.accuracy,
        "accuracy": after.accuracy,
    }


def prompts_for(benchmark: Benchmark, seed: int) -> list[Question]:
    """Problems to learn from, none of them in the benchmark."""
    rows = make_rows(
        "short",
        NUM_PROMPTS,
        seed=1_000 + seed,
        exclude={question.problem for question in benchmark.questions},
    )
    return [Question(str(i), row["problem"], row["answer"]) for i, row in enumerate(rows)]


def run_rl(valley: Valley, found: Sequence[Finished], *, steps: int, num_workers: int = 1) -> Iterator[RLRun]:
    """Train every start for `steps` steps and measure it, num_workers at a time; gives each as it is finished. Finished ones are
    kept. Raises ValueError if those have been trained for another number of steps."""
    path, journal = valley.path, Journal(valley.path / "rl.jsonl")
    rows = journal.read()
    if others := {row["steps"] for row in rows} - {steps}:
        raise ValueError(
            f"rl_steps is {steps} but {journal.path} has models trained for {', '.join(map(str, sorted(others)))}; pass that, or "
            f"delete {path / 'rl'} and {journal.path} to train them anew"
        )
    done = {row["cell"] for row in rows}
    jobs = [
        (cell, valley.study, valley.benchmark, path, steps) for cell in starts(found) if cell.name not in done
    ]
    taken = 0
    with tqdm(total=steps * len(jobs), desc="rl", unit=" steps", disable=None) as bar:

        def show(running: list[tuple]) -> None:
            bar.update(taken + sum(steps_so_far(path / "rl" / cell.name) for cell, *_ in running) - bar.n)

        for (cell, *_), row in run_apart(
            make_rl_run, jobs, num_workers=num_workers, log=path / "workers.log", on_wait=show
        ):
            journal.append({"place": valley.study.place_of(cell), **row})
            taken += steps
            yield _read(path, cell)


def read_rl_runs(path: Path) -> list[RLRun]:
    """The finished starts of the valley in `path`; none where reinforcement learning was not asked for."""
    rows = Journal(path / "rl.jsonl").read() if (path / "rl.jsonl").is_file() else []
    return [_read(path, cell_of(row)) for row in sorted(rows, key=lambda row: row["place"])]


def _read(path: Path, cell: Cell) -> RLRun:
    run = path / "rl" / cell.name
    before, after = (Result.read(next((run / stage).glob("*.jsonl"))) for stage in ("before", "after"))
    return RLRun(cell, [row["reward_mean"] for row in Journal(run / "metrics.jsonl").read()], before, after)


def title(cell: Cell) -> str:
    return "base model" if cell.arm == BASE else f"{ARMS[cell.arm].title}, {cell.num_traces:,}"


def by_start(rl_runs: Sequence[RLRun]) -> dict[str, list[RLRun]]:
    groups: dict[str, list[RLRun]] = {}
    for rl_run in rl_runs:
        groups.setdefault(title(rl_run.cell), []).append(rl_run)
    return groups


def rl_findings(rl_runs: Sequence[RLRun]) -> list[str]:
    """What became of every start, and whether it ends below or above the base model."""
    groups = by_start(rl_runs)
    reference = _shares(groups.get("base model", ()), "after")
    sentences = []
    for name, of_start in groups.items():
        before, after = (_shares(of_start, stage) for stage in ("before", "after"))
        gain = difference(after, before)
        change = (
            "rises"
            if gain.above_zero()
            else "falls"
            if gain.below_zero()
            else "does not change beyond chance"
        )
        lengths = [
            fmean(getattr(rl_run, stage).mean_tokens for rl_run in of_start) for stage in ("before", "after")
        ]
        said = (
            f"Reinforcement learning from {name}: accuracy {change}, {percent(_mean(before))} to {percent(_mean(after))}, and "
            f"the mean length of answers goes from {lengths[0]:.0f} to {lengths[1]:.0f} tokens"
        )
        if name != "base model" and set(after) & set(reference):
            gap = difference(after, reference)
            side = (
                "above"
                if gap.above_zero(len(groups) - 1)
                else "below"
                if gap.below_zero(len(groups) - 1)
                else ""
            )
            unknown = "whether it ends above or below the base model is not known"
            end = f"it ends {side} the base model" if side else unknown
            said += f"; {end} ({100 * gap.mean:+.1f} points ± {100 * gap.half:.1f})"
        sentences.append(f"{said}.")
    return sentences


def _shares(rl_runs: Sequence[RLRun], stage: str) -> Mapping[int, ByQuestion]:
    return {rl_run.cell.seed: getattr(rl_run, stage).by_question() for rl_run in rl_runs}


def _mean(shares: Mapping[int, ByQuestion]):
    return estimate(shares, (0.0, 0.0, 1.0, 1.0))

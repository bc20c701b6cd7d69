"""Run a study: each base model, each cell and each start of reinforcement learning is a run of a recipe."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean

from kit import paper
from kit.command import Stopped, finish, open_run
from kit.command_line import command_of
from kit.evaluate.results import read_results
from kit.journal import CONFIG
from kit.lock import is_shared, share
from kit.progress import print_line
from kit.run import AFTER, SAMPLES, read_json_if_any
from kit.valley.claims import Claims, check_can_share, claiming
from kit.valley.finished import CELLS, RL, StudyResults, rl_name, write_study
from kit.valley.jobs import FAILED, LOG, Job, Outcome, Worker, read_outcomes, run_jobs
from kit.valley.sentences import sentences
from kit.valley.study import ARMS, BASE, Cell, Study, ranks_of

LOWEST, MOST = "lowest", "most"  # starts of reinforcement learning that the results name
# + the cell's seed: the lowest of several points is in part bad luck, so its questions are sampled again
RL_SEED = 1_000
REPORT_EVERY = 600.0  # seconds, at least, between two reports of an unfinished study: each takes seconds


@dataclass(frozen=True)
class Recipes:
    """The recipes that a study runs, and their settings other than those that follow from a cell."""

    evaluate: dict  # of evaluate.py
    finetune: Callable[[Cell], dict]  # of gemma3_1b_8k.py; raises ValueError for a cell that cannot be run
    reinforce: Callable[[Cell], dict]  # of grpo_qwen2_5_0_5b.py, for this start
    rank: int = 0  # of adapters
    rl_flags: tuple[str, ...] = ()  # further flags of grpo_qwen2_5_0_5b.py, as typed


def jobs_of(cells: Sequence[Cell], recipes: Recipes, path: Path) -> list[Job]:
    """Return the runs of the cells, each preceded by that of its base model. path: the study's folder."""
    found: dict[str, Job] = {}
    for cell in cells:
        baseline, common = path / CELLS / cell.baseline, {"model": cell.model, "seed": cell.seed}
        evaluation = Job(cell.baseline, "kit.recipes.evaluate", recipes.evaluate | common, baseline)
        found.setdefault(cell.baseline, evaluation)

        settings, problem = {}, ""
        try:
            settings = recipes.finetune(cell)
        except ValueError as error:
            problem = str(error)
        own = {name: getattr(cell, name) for name in ("num_traces", "epochs", "batch_traces")}
        own |= {"long_share": ARMS[cell.arm].long_share, **ranks_of(cell.method, recipes.rank)}
        settings = settings | common | own | {"baseline": str(baseline)}
        recipe, folder = "kit.recipes.gemma3_1b_8k", path / CELLS / cell.name
        found[cell.name] = Job(cell.name, recipe, settings, folder, (cell.baseline,), problem=problem)
    return list(found.values())


def rl_jobs(starts: Sequence[Cell], recipes: Recipes, path: Path) -> list[Job]:
    """Return the runs of reinforcement learning from these starts."""
    found = []
    for start in starts:
        if start.arm == BASE:
            settings, needs = {"model": start.model, **ranks_of(start.method, recipes.rank)}, ()
        else:  # adapters are trained on as they are
            settings, needs = {"model": str(path / CELLS / start.name / "model")}, (start.name,)
        settings = recipes.reinforce(start) | settings | {"seed": RL_SEED + start.seed}
        recipe, folder = "kit.recipes.grpo_qwen2_5_0_5b", path / RL / start.name
        found.append(Job(rl_name(start), recipe, settings, folder, needs, recipes.rl_flags))
    return found


def check_steps(jobs: Sequence[Job]) -> None:
    """Raise ValueError if a start was trained for another number of steps: one report must not mix them."""
    for job in jobs:
        steps = job.settings.get("steps")
        before = read_json_if_any(job.folder / CONFIG).get("steps", steps)
        if steps not in (None, before):
            raise ValueError(
                f"rl_steps is {steps} but {job.folder} was trained for {before}; pass that, or another --out"
            )


def rl_starts(results: StudyResults, words: Sequence[str], models: Sequence[str]) -> list[Cell]:
    """Return the starts of reinforcement learning for these models: all seeds of the sizes that words name.

    words: numbers of traces of the study's first arm (0 = the base model), LOWEST and MOST. These two are the
    finished size with the lowest mean accuracy and the largest finished size; if nothing is finished they
    name no start.
    """
    first_arm, found = results.cells[0].arm, []
    pairs = dict.fromkeys((cell.model, cell.method) for cell in results.cells if cell.model in models)
    for model, method in pairs:
        wanted = (model, method, first_arm)
        cells = [cell for cell in results.cells if (cell.model, cell.method, cell.arm) == wanted]
        accuracies: dict[int, list[float]] = {}
        for done in results.finished:
            if done.cell in cells:
                accuracies.setdefault(done.cell.num_traces, []).append(done.accuracy)

        means = {size: fmean(values) for size, values in accuracies.items()}
        named = {LOWEST: min(means, key=means.get), MOST: max(means)} if means else {}
        sizes = {named.get(word) if word in (LOWEST, MOST) else int(word) for word in words}
        if 0 in sizes:
            found += [Cell.of_base(model, seed, method) for seed in sorted({cell.seed for cell in cells})]
        starts = [cell for cell in cells if cell.num_traces in sizes]
        found += sorted(starts, key=lambda cell: cell.num_traces)
    return found


def open_study(config, may_grow: Sequence[str]) -> Path:
    """Open the folder of a study as open_run does, and return it. Several processes may work on it.

    The first holds it alone until `run_study` has prepared it; the others wait for that. One that is started
    with the folder and the settings of a study that is there works on that, also without `resume`.
    """
    if config.out:
        check_can_share(Path(config.out))
    return open_run(config, may_grow=may_grow, join=True).path.resolve()


def run_study(
    study: Study,
    cells: Sequence[Cell],
    path: Path,
    recipes: Recipes,
    workers: Sequence[Worker],
    *,
    deviations: Sequence[str],
    rl: Sequence[str],
    write_report: Callable[..., Path],
    then: tuple[str, ...],
) -> Path:
    """Run the cells, then reinforcement learning from the starts that `rl` names, and return the report.

    cells: the study's, as they can be run here. What is done stays done. Several workers, and a process that
    comes to help others, begin with the longest runs, so that all end together. Every process writes the
    report, the last one all of it. then: without `rl`, the effect of a command to type next, the command and
    its words. Raises SystemExit naming the runs that failed, once all others are done.
    """
    joins = is_shared(path)
    write_study(path, cells, deviations)
    (path / CELLS).mkdir(exist_ok=True)  # the study has begun: a refusal of this process does not remove it
    share(path)
    jobs = jobs_of(cells, recipes, path)
    if len(workers) > 1 or joins:
        jobs.sort(key=lambda job: (bool(job.needs), job.settings["seed"], -job.settings.get("num_traces", 0)))
    print(f"runs        {len(cells)} cells, {len(jobs)} runs, {len(workers)} at once, each with its {LOG}")
    print(paper.describe(deviations))

    with claiming(path) as claims:
        failed = _run(jobs, path, workers, claims, write_report)
        if rl:
            starts = rl_jobs(rl_starts(StudyResults.read(path), rl, study.compared), recipes, path)
            check_steps(starts)
            failed += _run(starts, path, workers, claims, write_report)
            jobs += starts

    report = write_report(path)
    print("\n".join(sentences(StudyResults.read(path))))
    if failed:
        print(f"report {report.resolve().as_uri()}")
        names = ", ".join(failed)
        raise SystemExit(f"{len(failed)} of {len(jobs)} runs failed: {names}; --resume tries them again")
    if rl:
        then = ("the answers of its models, side by side", command_of("ask"), "--model", str(path))
    finish(report, *then)
    return report


def _run(
    jobs: Sequence[Job], path: Path, workers: Sequence[Worker], claims: Claims, write_report
) -> list[str]:
    """Run the jobs, print how each ends, and write a report now and then. Return the names of the failed."""
    reported, ended = time.monotonic(), 0
    try:
        for outcome in run_jobs(jobs, path, workers, claims):
            ended += 1
            print_line(line(outcome))
            if time.monotonic() - reported > REPORT_EVERY:
                page, reported = write_report(path, goes_on=True), time.monotonic()
                print_line(f"report so far: {page.resolve().as_uri()}")
    except KeyboardInterrupt:
        raise Stopped(f"after {ended} runs; the others keep what they have") from None
    outcomes = read_outcomes(path)
    return [job.name for job in jobs if outcomes[job.name].status == FAILED]


def line(outcome: Outcome) -> str:
    """Describe how a run ended, and what it measured last."""
    if outcome.status == FAILED:
        log = f"\n  its log: {outcome.log}" if outcome.log else ""
        return f"FAILED {outcome.job}: {outcome.error}{log}"
    folder = Path(outcome.log).parent
    results = read_results(folder / AFTER) or read_results(folder / SAMPLES)
    return f"{outcome.job}, {outcome.seconds:,.0f} s: " + "; ".join(map(str, results.values()))

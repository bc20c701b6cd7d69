"""The report of a study: its run folders -> figures, sentences and one self-contained report.html.

Accuracy is the paper's headline, the unweighted mean over the benchmarks. Differences are paired by question
and seed.
"""

from __future__ import annotations

import html
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from statistics import fmean

from kit import paper
from kit.evaluate.results import headline
from kit.report import page as pages
from kit.report import reflection
from kit.report.answers import STEP_MARKS, answer
from kit.report.before_after import NOTHING
from kit.report.curve_figures import causes_figure, rl_figure, steps_figure, valley_figure
from kit.report.figures import embed
from kit.report.first_screen import choose, first_screen
from kit.run import AFTER, BEFORE
from kit.valley.curves import Estimate, difference, estimate, widened
from kit.valley.error_accumulation import Decomposition, decompose, explain
from kit.valley.finished import RL, Finished, StudyResults, of_seeds, point_of, shares
from kit.valley.first_error import CAUSES, STEPWISE, has_steps
from kit.valley.jobs import DONE, FAILED
from kit.valley.sentences import by_start, findings, rl_findings, what_came_out, what_was_done
from kit.valley.study import Cell, short_name

SHOWN = 12  # problems in the browser


def write_report(path: Path, *, goes_on: bool = False) -> Path:
    """Write the figures and report.html of the study in `path`, and return the report.

    goes_on: the study will write it again. Raises ValueError if there is no study.
    """
    results = StudyResults.read(path)
    first = next((model for model in results.models if results.curves(model)), "")
    sections = [f"<p><small>{html.escape(progress(results))}</small></p>"]
    for model in results.models:
        sections += [of_model(path, results, model, drawn=model == first), why(path, results, model)]
    sections += [
        rl_section(path, results),
        "<h2>Every cell (one size of one training set)</h2>" + table(results),
        failures(results),
        pages.bullets("What differs from the paper", results.deviations),
        same_problem(results),
    ]
    title = f"Through the valley: {', '.join(map(short_name, results.models))}"
    first_page = opening(path, results, first)
    return pages.write(path, title, first_page, sections, results.settings, goes_on=goes_on)


def opening(path: Path, results: StudyResults, model: str) -> str:
    """Return the first screen: the first curve of the first model that has one ("" = none has)."""
    curve = next(iter(results.curves(model)), None)
    outcome = what_came_out(curve, is_short=results.is_short) if curve else NOTHING
    sentences = (what_was_done(results), outcome)
    if curve is None:
        return first_screen(sentences, None, "")
    low, looks = curve.lowest, len(curve.points)
    sizes = next(iter(results.points(model)[0].values()))
    tuned = sizes[curve.points[low].num_traces][0]
    base = results.bases(model)[tuned.cell.seed]
    change = curve.changes()[low]
    titles = ("base model", f"after {tuned.cell.num_traces:,} traces")
    widest = Estimate(change.mean, widened(looks) * change.half)
    pair = choose(base.results, tuned.results, widest, titles)
    return first_screen(sentences, pair, drawing(path, results, model))


def drawing(path: Path, results: StudyResults, model: str) -> str:
    """Write the figure of a model's curves, with the paper's numbers, and return it as HTML."""
    name, curves = short_name(model), results.curves(model)
    draw = partial(valley_figure, curves, results.length_benchmark, stars(results, model))
    return embed(path / f"{name}.png", draw, f"{model}: accuracy and length against the number of traces")


def stars(results: StudyResults, model: str) -> dict[int, float]:
    """Return the paper's numbers for a model; none if the study measures other benchmarks."""
    measured = {name for found in results.finished for name in headline(found.results)}
    return paper.stars(short_name(model).lower()) if measured == {*paper.BENCHMARKS} else {}


def progress(results: StudyResults) -> str:
    """Describe how many cells are done, and what the intervals cover."""
    ended = [results.outcomes[cell.name].status for cell in results.cells if cell.name in results.outcomes]
    done, failed, waiting = ended.count(DONE), ended.count(FAILED), len(results.cells) - len(ended)
    cells = f"{done} of {len(results.cells)} cells are done"
    cells += f", {failed} failed" if failed else ""
    cells += f", {waiting} have not ended yet" if waiting else ""
    several = len({found.cell.seed for found in results.finished}) > 1
    one = "; with one seed they do not cover how one training differs from the next"
    return (
        f"{cells}. Bands, ± and ranges are 95 % intervals over questions{' and seeds' if several else one}. "
        "A seed is one random choice of traces and samples."
    )


def of_model(path: Path, results: StudyResults, model: str, *, drawn: bool) -> str:
    """Return the section of one model. drawn: its figure and its first sentence are on the first screen."""
    heading = f"<h2>{html.escape(short_name(model))}</h2>"
    curves, notes = results.curves(model), results.points(model)[1]
    if not curves:
        return f"{heading}{pages.findings(notes)}<p>Nothing to compare yet.</p>"
    lines, figure = findings(curves), "" if drawn else drawing(path, results, model)
    others = pages.bullets("The other training sets", lines[2:], level=3)
    more = reflection.section(path, results, model)
    return heading + pages.findings([*lines[drawn:2], *notes]) + figure + more + others


def why(path: Path, results: StudyResults, model: str) -> str:
    """Return why a model's accuracy moves in its first arm; nothing if no steps can be checked."""
    name, sizes = next(iter(results.points(model)[0].items()), ("", {}))
    points = [list(results.bases(model).values()), *sizes.values()]
    common = set(STEPWISE).intersection(*(found.results for seeds in points for found in seeds))
    if not sizes or not common:
        return ""
    benchmark = next(name for name in STEPWISE if name in common)
    rows = (row for seeds in points for found in seeds for row in found.results[benchmark].rows)
    if not has_steps(benchmark, rows):
        return ""
    base, *rest = (decompose(*of_seeds(seeds, benchmark), STEPWISE[benchmark]) for seeds in points)
    causes = "; ".join(f"<b>{cause}</b>: {html.escape(what)}" for cause, what in CAUSES.items())
    parts = [
        f"<h3>Why: {html.escape(name)}, answers step by step ({benchmark})</h3>",
        pages.findings(explain(base, rest)),
        embed(path / f"{short_name(model)}-causes.png", partial(causes_figure, [base, *rest])),
        embed(path / f"{short_name(model)}-steps.png", partial(steps_figure, [base, *rest])),
        WHY_NOTE.format(causes=causes),
        why_table([base, *rest]),
    ]
    return "".join(parts)


def why_table(points: Sequence[Decomposition]) -> str:
    """Return one row per size of what the answers' steps show."""
    columns = {
        "traces": lambda p: f"{p.num_traces:,}" if p.num_traces else "base model",
        "accuracy, %": lambda p: pages.share_cell(p.accuracy),
        "p, %": lambda p: pages.share_cell(p.step_accuracy),
        "p^n, %": lambda p: pages.share_cell(p.predicted),
        "accuracy - p^n": lambda p: pages.share_cell(p.residual, "+"),
        "right by luck, %": lambda p: f"{100 * p.saved:.1f}",
        "operations": lambda p: p.operations.text(".1f"),
        "checks": lambda p: f"{p.checks:.1f}",
        "corrections": lambda p: f"{p.corrections:.1f}",
        "cut off, %": lambda p: f"{100 * p.truncated:.0f}",
        "in a loop, %": lambda p: f"{100 * p.looping:.0f}",
    }
    return pages.table([*columns], [[cell(point) for cell in columns.values()] for point in points])


def rl_section(path: Path, results: StudyResults) -> str:
    """Return the section on reinforcement learning; nothing if there was none."""
    if not results.rl:
        return ""
    parts = ["<h2>Reinforcement learning</h2>"]
    parts.append(pages.findings(rl_findings(results.rl, results.length_benchmark)))
    for i, (name, starts) in enumerate(by_start(results.rl).items(), 1):
        alt = f"{name}: reward of the rollouts against the step"
        parts.append(embed(path / f"rl-{i}.png", partial(rl_figure, starts), alt))
    rows = []
    for run in results.rl:
        before, after = ({run.start.seed: shares(run.stages[stage])} for stage in (BEFORE, AFTER))
        accuracies = [f"{100 * estimate(found).mean:.1f}" for found in (before, after)]
        change = pages.share_cell(difference(after, before), "+")
        rows.append([run.start.name, *accuracies, change, f"{RL}/{run.start.name}/report.html"])
    heads = ("start", "before, %", "after, %", "change, points", "its report")
    return "".join([*parts, pages.table(heads, rows), RL_NOTE])


def table(results: StudyResults) -> str:
    """Return one row per point, over its finished seeds, the base model first; then what is not done."""
    benchmarks = list(dict.fromkeys(name for found in results.finished for name in found.results))
    length_of, rows, of_benchmarks = results.length_benchmark, [], []
    for model in results.models:
        bases, curves = list(results.bases(model).values()), results.points(model)[0].values()
        for seeds in filter(None, (bases, *(seeds for sizes in curves for seeds in sizes.values()))):
            columns = _columns(seeds[0].cell)
            rows.append([*columns, *_numbers(seeds, bases, length_of)])
            of_benchmarks.append([*columns[:3], *(_of_benchmark(seeds, name) for name in benchmarks)])
    for cell in results.cells:
        outcome = results.outcomes.get(cell.name)
        if outcome is None or outcome.status == FAILED:
            state = "not ended yet" if outcome is None else "FAILED"
            rows.append([*_columns(cell), f"seed {cell.seed}: {state}"])
    found = pages.table(HEADS, rows) + NOTES.format(length=html.escape(length_of))
    if len(benchmarks) > 1:  # one alone is the headline
        each = pages.table((*HEADS[:3], *benchmarks), of_benchmarks)
        found += f"<h3>Accuracy by benchmark, %</h3>{each}"
    return found


HEADS = (
    "model", "arm", "traces", "batch", "seeds", "steps", "accuracy, %", "minus base",
    "as the paper graded, %", "the paper ¹",
    "tokens ²", "cut off, %", "in a loop, %", "reflection, %", "training, h ³",
)  # fmt: skip


def _columns(cell: Cell) -> list[str]:
    """Return the columns up to "batch"."""
    return [short_name(cell.model), cell.curve, f"{cell.num_traces:,}", str(cell.batch_traces or "-")]


def _numbers(seeds: Sequence[Finished], bases: Sequence[Finished], length_of: str) -> list[str]:
    """Return the columns from "seeds" on. bases: the base model's seeds, which the point is compared with."""
    cell, point, base = seeds[0].cell, point_of(seeds, length_of), point_of(bases, length_of)
    trained = cell.num_traces > 0
    every = [result for found in seeds for result in headline(found.results).values()]
    names = ("truncated", "looping", "reflection")
    means = [fmean(getattr(result, name) for result in every) for name in names]
    hours = fmean(found.training_seconds for found in seeds) / 3600
    return [
        str(len(seeds)),
        f"{len(seeds[0].metrics):,}" if trained else "-",
        pages.share_cell(point.accuracy),
        pages.share_cell(difference(point.shares, base.shares), "+") if trained else "-",
        pages.share_cell(point.paper_accuracy) if point.paper_accuracy else "-",
        paper.ACCURACY.get((short_name(cell.model).lower(), cell.num_traces), "-"),
        point.length.text(",.0f"),
        *(f"{100 * mean:.0f}" for mean in means),
        f"{hours:.2f}" if trained else "-",
    ]


def _of_benchmark(seeds: Sequence[Finished], name: str) -> str:
    """Return the accuracy on one benchmark, with an interval if there is one seed."""
    found = [of_seed.results[name] for of_seed in seeds if name in of_seed.results]
    if len(found) == 1:
        return pages.share_cell(Estimate(found[0].accuracy, found[0].interval))
    return f"{100 * fmean(result.accuracy for result in found):.1f}" if found else "-"


def failures(results: StudyResults) -> str:
    """Return every run that failed, with its reason and the last lines of its log."""
    items = ""
    for outcome in results.outcomes.values():
        if outcome.status == FAILED:
            error, tail = html.escape(outcome.error), html.escape("\n".join(outcome.tail))
            items += f"<h3>{html.escape(outcome.job)}</h3><p class=wrong>{error}</p>"
            summary = f"<summary>the last lines of {html.escape(outcome.log)}</summary>"
            items += f"<details>{summary}<pre>{tail}</pre></details>" if tail else ""
    note = "<p>Nothing here counts these; --resume tries them again.</p>"
    return f"<h2>Failed</h2>{note}{items}" if items else ""


def same_problem(results: StudyResults) -> str:
    """Return one seed's first sample of the same problems at every size, for the first model."""
    found = [done for done in results.finished if done.cell.model == results.models[0]]
    seed = min((done.cell.seed for done in found), default=0)
    columns: dict[str, dict] = {}  # title of a cell -> (benchmark, question) -> its first sample
    for done in found:
        if done.cell.seed == seed:
            every = [(name, row) for name, result in done.results.items() for row in result.rows]
            title = done.cell.curve + (f", {done.cell.num_traces:,}" if done.cell.num_traces else "")
            columns[title] = {(name, row["question"]): row for name, row in every if row["sample"] == 0}
    first = next(iter(columns.values()), {})
    common = [key for key in first if all(key in rows for rows in columns.values())]
    parts = []
    for key in common[:SHOWN]:
        row = first[key]
        shown = "".join(answer(title, key[0], rows[key]) for title, rows in columns.items())
        summary = f"{html.escape(row['problem'])} <small>(answer {html.escape(row['answer'])})</small>"
        parts.append(f"<details><summary>{summary}</summary><div class=pair>{shown}</div></details>")
    return f"<h2>The same problem at every size</h2>{BROWSER_NOTE}{''.join(parts)}" if parts else ""


WHY_NOTE = f"""<p><small>p: the share of right steps among those with only right ones before them; n: the
problem's steps. "Longer answers alone": the share that would be right if every operation of these answers,
checks and all, were as reliable as the base model's. What goes wrong first, in this order: {{causes}}. Right
by luck: something in the answer is wrong, its box is not. The paper, on its synthetic arithmetic:
{paper.OPERATIONS_DONE}.</small></p>"""
RL_NOTE = """<p><small>GRPO (kit/rl/grpo.py), reward 1 for a right answer and 0 otherwise. The curve is the
reward of the rollouts; bands span the seeds. Before and after, the questions are answered with new samples,
because the lowest of several points is in part bad luck. In the paper the start after 8k traces stays below
the base model throughout, and the one after 128k ends above it.</small></p>"""
NOTES = """<p><small>Accuracy is by the strict grader, the mean of the paper's three benchmarks (or of all, if
none of them was measured), each counting the same; differences are paired by question and seed. A column of a
benchmark has an interval if there is one seed. Reflection: a keyword alone, an upper bound. ¹ Full
fine-tuning, in percent: the mean of its three benchmarks, which the figure shows (as stars) only if all three
were measured. What its text states as a number; its curves carry none. ² Mean tokens of the
responses to {length}. ³ Measured: the sum of the steps, without sampling; the mean over the seeds. A QLoRA
model is compared with the base model in its own precision, so what rounding to NF4 does is part of the
difference.</small></p>"""
BROWSER_NOTE = f"""<p><small>The first sample of the first seed. Marked: <b class=box>boxed answers</b>
and, if the steps of an answer can be checked, {STEP_MARKS}; otherwise <mark>reflection
phrases</mark>.</small></p>"""

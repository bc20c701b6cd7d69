"""Report of a sweep: its run folders -> a figure per model, sentences, every cell in a table, one self-contained report.html.

    python -m kit.report.sweep runs/valley_sweep/001

Everything is computed from the files in the folder, so a report can be made again at any time, also of an unfinished sweep.
Accuracy is the paper's headline, the unweighted mean over the benchmarks; differences are paired by question and seed.
"""

from __future__ import annotations

import argparse
import html
import json
from collections.abc import Sequence
from pathlib import Path
from statistics import fmean

from matplotlib.figure import Figure

from kit.report import page as pages
from kit.report.curve_figures import draw_line, trace_axis
from kit.report.figures import embed
from kit.run import AFTER, BEFORE
from kit.valley.curves import Curve, Estimate, Point, difference, findings
from kit.valley.finished import (
    Results,
    Sweep,
    curves_of,
    length_benchmark,
    method_name,
    rl_change,
    rl_sentences,
)
from kit.valley.jobs import DONE, FAILED, Outcome, read_outcomes
from kit.valley.sweep import PAPER, RL, Cell, short_name


def write_report(path: Path) -> Path:
    """Write the figures and report.html of the sweep in `path`; returns the report. Raises ValueError if there is no sweep."""
    sweep = Sweep.read(path)
    config = (
        json.loads((path / "config.json").read_text(encoding="utf-8"))
        if (path / "config.json").is_file()
        else {}
    )
    models = dict.fromkeys(cell.model for cell in sweep.cells)
    sections = [of_model(path, sweep, model) for model in models]
    outcomes = read_outcomes(path)
    page = PAGE.format(
        style=pages.STYLE + STYLE,
        progress=html.escape(progress(sweep, outcomes)),
        deviations="".join(f"<li>{html.escape(line)}" for line in sweep.deviations) or "<li>none",
        failures=failures(outcomes),
        sections="".join(sections),
        table=table(sweep, outcomes),
        rl=_rl(path, sweep),
        settings="".join(f"<tr><td>{html.escape(k)}<td>{html.escape(str(v))}" for k, v in config.items()),
    )
    report = path / "report.html"
    report.write_text(page, encoding="utf-8", errors="xmlcharrefreplace")
    return report


def progress(sweep: Sweep, outcomes: dict[str, Outcome]) -> str:
    cells = [outcomes.get(f"cell {cell.name}") for cell in sweep.cells]
    done, failed = (
        sum(outcome is not None and outcome.status == s for outcome in cells) for s in (DONE, FAILED)
    )
    waiting = len(cells) - done - failed
    return f"{done} of {len(cells)} cells are done" + (f", {failed} failed" if failed else "") + (
        f", {waiting} have not ended yet" if waiting else "") + "."  # fmt: skip


def of_model(path: Path, sweep: Sweep, model: str) -> str:
    """The section of one model: sentences, figure, and what could not be compared."""
    curves, refused = curves_of(sweep, model)
    heading = f"<h2>{html.escape(short_name(model))}</h2>"
    notes = "".join(f"<p class=finding>{html.escape(line)}</p>" for line in [*findings(curves), *refused])
    if not any(curve.points for curve in curves):
        return heading + notes + "<p>Nothing to compare yet.</p>"
    figure = model_figure(model, curves, length_benchmark(sweep))
    return (
        heading
        + notes
        + embed(path / f"{short_name(model)}.png", figure, alt=f"{model}: accuracy and length against traces")
    )


def model_figure(model: str, curves: Sequence[Curve], length_of: str) -> Figure:
    """Accuracy and length against the number of traces; dashed: the base model; stars: the paper's numbers."""
    figure = Figure(figsize=(8, 7), layout="constrained")
    top, bottom = figure.subplots(2, 1, sharex=True)
    sizes = sorted({point.num_traces for curve in curves for point in curve.points})
    for axes, of, scale in (
        (top, lambda point: point.accuracy, 100),
        (bottom, lambda point: point.length, 1),
    ):
        for i, curve in enumerate(curves):
            estimates = [of(point) for point in curve.points]
            draw_line(axes, curve.name, [point.num_traces for point in curve.points], estimates, i, scale)
        start = of(curves[0].base)
        axes.axhline(scale * start.mean, color="#333333", linestyle="--", linewidth=1.2, label="base model")
        high = min(100, scale * start.high) if scale == 100 else start.high
        axes.axhspan(max(0, scale * start.low), high, color="#333333", alpha=0.12, linewidth=0)
        axes.tick_params(labelsize=12)
        axes.grid(alpha=0.3)
    numbers = {
        size: float(said)
        for (name, size), said in PAPER.items()
        if name == short_name(model).lower() and said.isdigit()
    }
    if told := {size: value for size, value in numbers.items() if size in sizes}:
        top.plot(
            list(told),
            list(told.values()),
            "k*",
            markersize=14,
            linestyle="",
            label="the paper, after fine-tuning",
        )
    if 0 in numbers:
        top.axhline(numbers[0], color="#333333", linestyle=":", linewidth=1.2, label="the paper's base model")
    top.set_ylim(0, None)
    bottom.set_ylim(0, None)
    top.set_ylabel("accuracy, %", fontsize=14)
    bottom.set_ylabel(f"tokens per response, {length_of}", fontsize=14)
    trace_axis(bottom, sizes)
    top.legend(fontsize=11)
    return figure


def failures(outcomes: dict[str, Outcome]) -> str:
    """Every run that failed, with its reason and the last lines of its log."""
    failed = [outcome for outcome in outcomes.values() if outcome.status == FAILED]
    if not failed:
        return ""
    items = "".join(
        f"<h3>{html.escape(outcome.job)}</h3><p class=wrong>{html.escape(outcome.error)}</p>"
        + (f"<details><summary>the last lines of {html.escape(outcome.log)}</summary>"
           f"<pre>{html.escape(chr(10).join(outcome.tail))}</pre></details>" if outcome.tail else "")
        for outcome in failed
    )  # fmt: skip
    return f"<h2>Failed</h2><p>Nothing below counts these; --resume tries them again.</p>{items}"


def table(sweep: Sweep, outcomes: dict[str, Outcome]) -> str:
    """A row per model, method, arm and size, over the seeds that are finished, the base model first;
    then what is not done."""
    benchmarks = list(dict.fromkeys(name for found in sweep.measured for name in found.after))
    benchmarks = benchmarks if len(benchmarks) > 1 else []  # one alone is the headline
    lines = []
    for model in dict.fromkeys(cell.model for cell in sweep.cells):
        curves, _ = curves_of(sweep, model)
        if curves:
            baselines = [found for (name, _), found in sweep.baselines.items() if name == model]
            lines.append(
                [
                    short_name(model),
                    "base model",
                    "0",
                    "-",
                    *_figures(curves[0].base, None, model, baselines, benchmarks),
                ]
            )
        for curve in curves:
            for point in curve.points:
                cells = [found for found in sweep.measured if found.of(model, curve.name, point.num_traces)]
                figures = _figures(point, curve, model, [found.after for found in cells], benchmarks)
                figures[HOURS] = f"{fmean(found.training_seconds for found in cells) / 3600:.2f}"
                lines.append([*_columns(cells[0].cell), *figures])
    for cell in sweep.cells:
        outcome = outcomes.get(f"cell {cell.name}")
        if outcome is None or outcome.status == FAILED:
            state = f"seed {cell.seed}: {'not ended yet' if outcome is None else 'FAILED'}"
            lines.append([*_columns(cell), state])
    rows = "".join("<tr>" + "".join(f"<td>{html.escape(column)}" for column in line) for line in lines)
    heads = "".join(f"<th>{html.escape(head)}" for head in (*HEADS, *benchmarks))
    notes = NOTES.format(length=html.escape(length_benchmark(sweep)))
    return f"<div class=wide><table><tr>{heads}{rows}</table></div>{notes}"


def _columns(cell: Cell) -> list[str]:
    """The columns up to "batch"."""
    return [short_name(cell.model), method_name(cell), f"{cell.num_traces:,}", str(cell.batch_traces)]


HEADS = ("model", "method", "traces", "batch", "seeds", "accuracy, %", "minus base", "the paper ¹", "tokens ²", "cut off, %",
         "training, h ³")  # fmt: skip
HOURS = 6  # of the columns below


def _figures(
    point: Point, curve: Curve | None, model: str, results: Sequence[Results], benchmarks: Sequence[str]
) -> list[str]:
    """The columns from "seeds" on. curve: whose baseline the point is compared with; None = it is the baseline."""
    length = point.length
    columns = [
        str(len(results)),
        _percent(point.accuracy),
        "-" if curve is None else _percent(difference(point.shares, curve.base.shares), "+"),
        PAPER.get((short_name(model).lower(), point.num_traces), "-"),
        f"{length.mean:,.0f} ± {length.half:,.0f}",
        f"{100 * fmean(result.truncated for found in results for result in found.values()):.0f}",
        "-",
    ]
    for name in benchmarks:
        found = [of_seed[name] for of_seed in results if name in of_seed]
        spread = f" ± {100 * found[0].interval:.1f}" if len(found) == 1 else ""
        columns.append(f"{100 * fmean(result.accuracy for result in found):.1f}{spread}" if found else "-")
    return columns


def _percent(value: Estimate, sign: str = "") -> str:
    return f"{100 * value.mean:{sign}.1f} ± {100 * value.half:.1f}"


def _rl(path: Path, sweep: Sweep) -> str:
    """The section on reinforcement learning; nothing where there was none."""
    if not sweep.rl:
        return ""
    rows = ""
    for found in sweep.rl:
        cells = [f"{100 * value:.1f} %" for value in (found.accuracy(BEFORE), found.accuracy(AFTER))]
        cells += [rl_change(found), f"{RL}/{found.name}/report.html"]
        rows += f"<tr><td>{html.escape(found.name)}" + "".join(f"<td>{html.escape(cell)}" for cell in cells)
    said = "".join(f"<p class=finding>{html.escape(line)}</p>" for line in rl_sentences(sweep.rl))
    return (
        f"<h2>Reinforcement learning</h2>{said}<div class=wide><table><tr><th>start<th>before<th>after<th>change<th>its report"
        f"{rows}</table></div><p><small>In the paper the start after 8k traces stays below the base model throughout, and the "
        "one after 128k ends above it.</small></p>"
    )


STYLE = "@media (min-width: 90rem) { body { max-width: 84rem } img { max-width: 62rem } }"
NOTES = """<p><small>± are 95 % intervals over questions and, where there are several, seeds; accuracy is the mean of the
benchmarks, each counting the same; differences are paired by question and seed. A column of a benchmark has an interval where
there is one seed. ¹ Full fine-tuning, in percent; what its text states as a number, its curves carry none. ² Mean tokens of the
responses to {length}. ³ Measured: the sum of the steps, without sampling; the mean over the seeds. A QLoRA model is compared with
the base model in its own precision, so what rounding to NF4 does is part of the difference.</small></p>"""
PAGE = """<!doctype html>
<html lang=en><meta charset=utf-8><meta name=viewport content="width=device-width"><title>Through the valley: a sweep</title>
<style>{style}</style>
<h1>Through the valley: accuracy and length against the number of long traces</h1>
<p>{progress}</p>
{failures}
{sections}
<h2>Every cell</h2>
{table}
{rl}
<h2>What differs from the paper</h2>
<ul>{deviations}</ul>
<details><summary>Settings</summary><div class=wide><table>{settings}</table></div></details>
</html>
"""

if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("run", type=Path, help="the folder of a sweep")
    print(write_report(parser.parse_args().run))

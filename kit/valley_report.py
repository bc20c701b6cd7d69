"""Report of a valley: the cells of a run -> figures, sentences and one self-contained report.html.

    python -m kit.valley_report runs/valley_demo/001

Everything is computed from cells.jsonl and the samples, so a report can be made again at any time, also of an unfinished run.
"""

from __future__ import annotations

import argparse
import html
import json
from collections.abc import Sequence
from pathlib import Path

from matplotlib.figure import Figure

from kit import pages
from kit.figures import embed
from kit.valley import ARMS, BASE, Finished, curves, read_cells
from kit.valley_anatomy import CAUSES, dissect
from kit.valley_curves import Curve, Estimate, findings
from kit.valley_rl import Climb, by_start, read_climbs, rl_findings
from kit.valley_why import Decomposition, decompose, explain, length_alone

COLOURS = ("#c0392b", "#2471a3", "#b7791f", "#6c3483")  # dark enough for a projector and for grey print
MARKERS = ("o", "s", "^", "D")
FILLS = (("#2e7d4f", ""), ("#c0392b", ""), ("#e67e22", "//"), ("#7f8c8d", ""), ("#34495e", ".."), ("#8e6fb5", "xx"),
         ("#d4ac0d", ""), ("#5dade2", "--"))  # fmt: skip
SHOWN = 12  # problems in the browser


def write_report(path: Path) -> Path:
    """Write the plots and report.html of the valley in `path`; returns the report. ValueError where nothing is finished."""
    found = read_cells(path)
    drawn = curves(found)
    config = json.loads((path / "config.json").read_text(encoding="utf-8")) if (path / "config.json").is_file() else {}
    sections = [
        _sentences(findings(drawn)),
        embed(path / "valley.png", valley_figure(drawn)),
        NOTE.format(seeds=_seeds(found), questions=found[0].result.num_questions, samples=found[0].result.num_samples),
        *_why(path, found),
        *_rl(path),
        "<h2>Every point</h2>" + table(drawn, found),
        "<h2>The same problem at every size</h2>" + BROWSER_NOTE + browser(found),
    ]
    page = PAGE.format(
        style=pages.STYLE + STYLE,
        title="Through the valley, at toy scale",
        sections="\n".join(sections),
        settings="".join(f"<tr><td>{html.escape(k)}<td>{html.escape(str(v))}" for k, v in config.items()),
    )
    report = path / "report.html"
    report.write_text(page, encoding="utf-8", errors="xmlcharrefreplace")
    return report


def valley_figure(drawn: Sequence[Curve]) -> Figure:
    """Accuracy and length against the number of traces, with bands; the untouched model is the dashed line."""
    figure = Figure(figsize=(9, 8), layout="constrained")
    top, bottom = figure.subplots(2, 1, sharex=True)
    for axes, of, scale in ((top, lambda point: point.accuracy, 100), (bottom, lambda point: point.length, 1)):
        for i, curve in enumerate(drawn):
            draw_line(axes, curve.name, [p.num_traces for p in curve.points], [of(p) for p in curve.points], i, scale)
        if drawn:
            start = of(drawn[0].base)
            axes.axhline(scale * start.mean, color="#333333", linestyle="--", linewidth=1.2, label="untouched model")
            axes.axhspan(scale * start.low, scale * start.high, color="#333333", alpha=0.12, linewidth=0)
    top.set_ylabel("accuracy, %", fontsize=14)
    top.set_ylim(0, 102)
    bottom.set_ylabel("tokens an answer", fontsize=14)
    bottom.set_ylim(0, None)
    trace_axis(bottom, sorted({point.num_traces for curve in drawn for point in curve.points}))
    for axes in (top, bottom):
        axes.tick_params(labelsize=12)
        axes.grid(alpha=0.3)
    if drawn:
        top.legend(fontsize=12)
    return figure


def draw_line(axes, label: str, sizes: Sequence[int], estimates: Sequence[Estimate], i: int, scale: float) -> None:
    """A line with its band; scale 100 for shares, which are drawn in percent and stay within 0..100."""
    means = [scale * e.mean for e in estimates]
    axes.plot(sizes, means, marker=MARKERS[i], color=COLOURS[i], linewidth=2.5, markersize=8, label=label)
    low, high = [scale * max(0, e.low) for e in estimates], [scale * e.high for e in estimates]
    if scale == 100:
        high = [min(100, x) for x in high]
    axes.fill_between(sizes, low, high, color=COLOURS[i], alpha=0.18, linewidth=0)


def trace_axis(axes, sizes: Sequence[int]) -> None:
    axes.set_xscale("log", base=2)
    axes.set_xticks(sizes, [f"{size:,}" for size in sizes])
    axes.set_xticks([], minor=True)
    axes.set_xlabel("traces to learn from", fontsize=14)


def _why(path: Path, found: Sequence[Finished]) -> list[str]:
    """The section on why accuracy moves, of the first arm there is; nothing where it has no point yet."""
    bases = {cell.cell.seed: cell.result for cell in found if cell.cell.arm == BASE}
    name = next((name for name in ARMS if any(cell.cell.arm == name for cell in found)), None)
    if not bases or name is None:
        return []
    base = decompose(0, bases)
    sizes = sorted({cell.cell.num_traces for cell in found if cell.cell.arm == name})
    points = [
        decompose(size, {c.cell.seed: c.result for c in found if (c.cell.arm, c.cell.num_traces) == (name, size)})
        for size in sizes
    ]
    return [
        f"<h2>Why: {html.escape(ARMS[name].title)}, answers taken apart step by step</h2>",
        _sentences(explain(base, points)),
        embed(path / "causes.png", causes_figure(base, points)),
        embed(path / "steps.png", steps_figure(base, points)),
        WHY_NOTE.format(causes="; ".join(f"<b>{cause}</b>: {html.escape(what)}" for cause, what in CAUSES.items())),
        why_table(base, points),
    ]


def _rl(path: Path) -> list[str]:
    """The section on reinforcement learning; nothing where there was none."""
    climbs = read_climbs(path)
    if not climbs:
        return []
    return [
        "<h2>Reinforcement learning from three starts</h2>",
        _sentences(rl_findings(climbs)),
        embed(path / "rl.png", rl_figure(climbs)),
        RL_NOTE,
    ]


def rl_figure(climbs: Sequence[Climb]) -> Figure:
    """Mean reward of the rollouts against the step, a line a start; the band spans the seeds."""
    figure = Figure(figsize=(9, 4.2), layout="constrained")
    axes = figure.subplots()
    for i, (name, of_start) in enumerate(by_start(climbs).items()):
        curves_of_seeds = [climb.rewards for climb in of_start]
        steps = range(1, min(map(len, curves_of_seeds)) + 1)
        columns = [[100 * rewards[step - 1] for rewards in curves_of_seeds] for step in steps]
        axes.plot(steps, [sum(column) / len(column) for column in columns], color=COLOURS[i], linewidth=2.5, label=name)
        axes.fill_between(steps, [min(c) for c in columns], [max(c) for c in columns], color=COLOURS[i], alpha=0.18, linewidth=0)
    axes.set_ylim(0, 102)
    axes.set_xlabel("step", fontsize=14)
    axes.set_ylabel("right answers, %", fontsize=14)
    axes.tick_params(labelsize=12)
    axes.grid(alpha=0.3)
    axes.legend(fontsize=12, title="start")
    return figure


def causes_figure(base: Decomposition, points: Sequence[Decomposition]) -> Figure:
    """Of all answers at each size: the right ones, and the others by the first thing wrong in them."""
    figure = Figure(figsize=(9, 4.6), layout="constrained")
    axes = figure.subplots()
    every = [base, *points]
    bottom = [0.0] * len(every)
    bars = {"right": [point.accuracy.mean for point in every]}
    bars |= {cause: [point.causes[cause] for point in every] for cause in CAUSES}
    for (label, shares), (colour, hatch) in zip(bars.items(), FILLS, strict=True):
        if any(shares):
            heights = [100 * share for share in shares]
            axes.bar(range(len(every)), heights, bottom=bottom, color=colour, hatch=hatch, edgecolor="white", label=label)
            bottom = [b + h for b, h in zip(bottom, heights, strict=True)]
    axes.set_xticks(range(len(every)), ["untouched", *(f"{point.num_traces:,}" for point in points)])
    axes.set(ylim=(0, 100), title="What goes wrong first")
    axes.set_xlabel("traces to learn from", fontsize=14)
    axes.set_ylabel("answers, %", fontsize=14)
    axes.tick_params(labelsize=12)
    axes.legend(loc="center left", bbox_to_anchor=(1, 0.5), fontsize=12, reverse=True)
    return figure


def steps_figure(base: Decomposition, points: Sequence[Decomposition]) -> Figure:
    """Left: the chance of a step. Right: accuracy, p^n, and what longer answers alone would cost."""
    figure = Figure(figsize=(9, 4.2), layout="constrained")
    left, right = figure.subplots(1, 2)
    sizes = [point.num_traces for point in points]
    for axes, lines in (
        (left, {"a step of the chain (p)": [point.step_accuracy for point in points],
                "any equation, checks too": [point.equation_accuracy for point in points]}),
        (right, {"measured": [point.accuracy for point in points],
                 "p to the power of the steps": [point.predicted for point in points],
                 "longer answers alone": [Estimate(length_alone(base, point), 0.0) for point in points]}),
    ):  # fmt: skip
        for i, (label, estimates) in enumerate(lines.items()):
            draw_line(axes, label, sizes, estimates, i, 100)
        trace_axis(axes, sizes)
        axes.set_ylim(0, 102)
        axes.grid(alpha=0.3)
        axes.legend(fontsize=11)
        axes.tick_params(labelsize=10)
    left.set(title="How often a step is right", ylabel="%")
    right.set(title="Do errors that add up explain it?", ylabel="accuracy, %")
    return figure


def why_table(base: Decomposition, points: Sequence[Decomposition]) -> str:
    """A row a point of the decomposition."""
    rows = ""
    for point in (base, *points):
        longer, reflection = point.reflection_tokens, point.reflection
        cells = [f"{point.num_traces:,}" if point.num_traces else "untouched"]
        for e in (point.accuracy, point.step_accuracy, point.predicted, point.residual):
            cells.append(f"{100 * e.mean:.1f} ± {100 * e.half:.1f}")
        cells += [f"{100 * point.saved:.1f}", f"{point.operations.mean:.1f} ± {point.operations.half:.1f}"]
        cells += [f"{point.checks:.1f}", f"{point.corrections:.1f}"]
        cells.append(f"{100 * reflection.mean:.0f} ± {100 * reflection.half:.0f}")
        cells.append("-" if longer is None else f"{longer.mean:+.0f} ± {longer.half:.0f}")
        cells += [f"{100 * point.truncated:.0f}", f"{100 * point.looping:.0f}"]
        rows += "<tr>" + "".join(f"<td>{cell}" for cell in cells)
    heads = (
        "traces", "accuracy, %", "p, %", "p^n, %", "accuracy - p^n", "right by luck, %", "operations", "checks", "corrections",
        "rechecks, %", "tokens longer", "cut off, %", "in a loop, %",
    )  # fmt: skip
    return f"<div class=wide><table><tr>{''.join(f'<th>{head}' for head in heads)}{rows}</table></div>"


def browser(found: Sequence[Finished]) -> str:
    """The first sample of one seed to the same problems at every size, arm after arm, wrong steps marked."""
    seed = min(cell.cell.seed for cell in found)
    columns = [cell for cell in found if cell.cell.seed == seed]
    columns.sort(key=lambda cell: (cell.cell.arm != BASE, list(ARMS).index(cell.cell.arm) if cell.cell.arm in ARMS else 0))
    samples = [{row["question"]: row for row in cell.result.rows if row["sample"] == 0} for cell in columns]
    common = [question for question in samples[0] if all(question in of_cell for of_cell in samples)]
    parts = []
    for question in common[:SHOWN]:
        cells = "".join(_answer(cell, of_cell[question]) for cell, of_cell in zip(columns, samples, strict=True))
        row = samples[0][question]
        summary = f"{html.escape(row['problem'])} <small>(answer {html.escape(row['answer'])})</small>"
        parts.append(
            f"<details{' open' if not parts else ''}><summary>{summary}</summary><div class=pair>{cells}</div></details>"
        )
    return "".join(parts)


def _answer(cell: Finished, row: dict) -> str:
    found = dissect(row["problem"], row["text"], finished=row["finished"])
    title = "untouched" if cell.cell.arm == BASE else f"{ARMS[cell.cell.arm].title}, {cell.cell.num_traces:,}"
    cause = f": {found.cause}" if found.cause else ""
    spans = dict.fromkeys(found.wrong, "mark class=wrong") | dict.fromkeys(found.taken_back, "mark class=taken-back")
    return (
        f"<div><h4>{html.escape(title)}: <span class={row['verdict']}>{row['verdict']}</span>{cause}</h4>"
        f"<pre>{pages.marked(row['text'], spans)}</pre></div>"
    )


def table(drawn: Sequence[Curve], found: Sequence[Finished]) -> str:
    """A row a point."""
    if not drawn:
        return "<p>The untouched model has not been measured yet.</p>"
    titles = {arm.title: name for name, arm in ARMS.items()}
    points = [("untouched", "base", drawn[0].base)]
    points += [(curve.name, titles[curve.name], point) for curve in drawn for point in curve.points]
    rows = ""
    for title, arm, point in points:
        cells = [cell for cell in found if (cell.cell.arm, cell.cell.num_traces) == (arm, point.num_traces)]
        mean = {name: sum(cell.row[name] for cell in cells) / len(cells) for name in ("truncated", "looping", "reflection")}
        batch, steps = (f"{cells[0].row.get(name) or '-'}" for name in ("batch_traces", "steps"))
        rows += (
            f"<tr><td>{html.escape(title)}<td>{point.num_traces or '-'}<td>{batch}<td>{steps}<td>{len(cells)}"
            f"<td><b>{100 * point.accuracy.mean:.1f}</b> ± {100 * point.accuracy.half:.1f}"
            f"<td>{point.length.mean:.0f} ± {point.length.half:.0f}"
            + "".join(f"<td>{100 * mean[name]:.0f}" for name in ("truncated", "looping", "reflection"))
        )
    heads = ("arm", "traces", "batch", "steps", "seeds", "accuracy, %", "tokens", "cut off, %", "in a loop, %", "rechecks, %")
    return f"<div class=wide><table><tr>{''.join(f'<th>{head}' for head in heads)}{rows}</table></div>"


def _sentences(lines: Sequence[str]) -> str:
    return "".join(f"<p class=finding>{html.escape(line)}</p>" for line in lines)


def _seeds(found: Sequence[Finished]) -> str:
    number = len({cell.cell.seed for cell in found})
    if number > 1:
        return f"{number} seeds of traces, training and samples"
    return "one seed, so the intervals do not cover how one training differs from the next"


NOTE = """<p><small>{questions} held-out questions x {samples} samples; {seeds}. Bands are 95 % intervals over questions and,
where there are several, seeds. This is about the toy, chains of additions and subtractions and a model of 366 thousand
parameters; it is not about language models.</small></p>"""
WHY_NOTE = """<p><small>p: the share of right steps among those with only right ones before them; n: the problem's steps. "Longer
answers alone": the share that would be right if every operation of these answers, checks and all, were as reliable as the
untouched model's. What goes wrong first, in this order: {causes}. Right by luck: something in the answer is wrong, its box is
not. The paper, on its synthetic arithmetic: about 10 operations an answer before, 40 after 8k traces; on benchmarks, reflection
below 5 % before, about 75 % after (Qwen), reflective answers about 2,000 tokens longer (1.5B, 3B). It counts a recheck only where
a language model agrees; here a keyword is enough.</small></p>"""
RL_NOTE = """<p><small>GRPO (kit/rl.py), reward 1 for a right answer and 0 otherwise, temperature 1; the curve is the reward of
the rollouts, the sentences are of the held-out questions. Bands span the seeds. In the paper the start after 8k traces stays
below the untouched one throughout, and the one after 128k ends above it.</small></p>"""
BROWSER_NOTE = """<p><small>The first sample of the first seed. Marked: <mark class=wrong>steps that are not the problem's</mark>,
<mark class=taken-back>what the answer itself takes back</mark>, <mark>reflection</mark>, <b class=box>boxed answers</b>.</small>
</p>"""
STYLE = """
.finding { margin: .5rem 0 }
mark.wrong { background: #f6b8ae; color: #6d130a; text-decoration: underline } mark.taken-back { background: #e4e4e4 }
"""
PAGE = """<!doctype html>
<html lang=en><meta charset=utf-8><meta name=viewport content="width=device-width"><title>{title}</title>
<style>{style}</style>
<h1>{title}</h1>
{sections}
<details><summary>Settings</summary><div class=wide><table>{settings}</table></div></details>
</html>
"""

if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path, help="a run folder")
    print(write_report(parser.parse_args().run))

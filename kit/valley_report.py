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
from kit.report import image
from kit.valley import ARMS, Finished, curves, read_cells
from kit.valley_curves import Curve, Estimate, findings

COLOURS = ("#c0392b", "#2471a3", "#b7791f", "#6c3483")  # dark enough for a projector and for grey print
MARKERS = ("o", "s", "^", "D")


def write_report(path: Path) -> Path:
    """Write the plots and report.html of the valley in `path`; returns the report. Raises ValueError where no cell is finished."""
    found = read_cells(path)
    drawn = curves(found)
    config = json.loads((path / "config.json").read_text(encoding="utf-8")) if (path / "config.json").is_file() else {}
    sections = [
        _sentences(findings(drawn)),
        image(path / "valley.png", valley_figure(drawn)),
        NOTE.format(seeds=_seeds(found), questions=found[0].result.num_questions, samples=found[0].result.num_samples),
        "<h2>Every point</h2>" + table(drawn, found),
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
            draw_curve(axes, curve, [of(point) for point in curve.points], i, scale)
        if drawn:
            start = of(drawn[0].base)
            axes.axhline(scale * start.mean, color="#333333", linestyle="--", linewidth=1.2, label="untouched model")
            axes.axhspan(scale * start.low, scale * start.high, color="#333333", alpha=0.12, linewidth=0)
    top.set_ylabel("accuracy, %", fontsize=14)
    top.set_ylim(0, 102)
    bottom.set_ylabel("tokens an answer", fontsize=14)
    bottom.set_ylim(0, None)
    trace_axis(bottom, drawn)
    for axes in (top, bottom):
        axes.tick_params(labelsize=12)
        axes.grid(alpha=0.3)
    if drawn:
        top.legend(fontsize=12)
    return figure


def draw_curve(axes, curve: Curve, estimates: Sequence[Estimate], i: int, scale: float) -> None:
    sizes = [point.num_traces for point in curve.points]
    axes.plot(sizes, [scale * e.mean for e in estimates], marker=MARKERS[i % 4], color=COLOURS[i % 4], linewidth=2.5, markersize=8,
              label=curve.name)  # fmt: skip
    low, high = [scale * max(0, e.low) for e in estimates], [scale * e.high for e in estimates]
    if scale == 100:
        high = [min(100, x) for x in high]
    axes.fill_between(sizes, low, high, color=COLOURS[i % 4], alpha=0.18, linewidth=0)


def trace_axis(axes, drawn: Sequence[Curve]) -> None:
    sizes = sorted({point.num_traces for curve in drawn for point in curve.points})
    axes.set_xscale("log", base=2)
    axes.set_xticks(sizes, [f"{size:,}" for size in sizes])
    axes.set_xticks([], minor=True)
    axes.set_xlabel("traces to learn from", fontsize=14)


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


NOTE = """<p><small>{questions} held-out questions x {samples} samples, temperature 0.6 and top-p 0.95 unless the settings below say
otherwise; {seeds}. Bands are 95 % intervals over questions and, where there are several, seeds. This is about the toy: chains of
additions and subtractions and a model of 366 thousand parameters, not a language model.</small></p>"""
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

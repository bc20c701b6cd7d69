"""Report of a valley: the cells of a run -> figures, sentences and one self-contained report.html.

    python -m kit.report.valley runs/valley_demo/001

Everything is computed from cells.jsonl and the samples, so a report can be made again at any time, also of an unfinished run.
"""

from __future__ import annotations

import argparse
import html
import json
from collections.abc import Sequence
from pathlib import Path

from kit.report import page as pages
from kit.report.curve_figures import causes_figure, rl_figure, steps_figure, valley_figure
from kit.report.figures import embed
from kit.valley.curves import findings
from kit.valley.error_accumulation import Decomposition, decompose, explain
from kit.valley.first_error import CAUSES, dissect
from kit.valley.study import ARMS, BASE
from kit.valley.toy_cells import (
    Finished,
    by_point,
    curves,
    describe,
    first_arm,
    first_model,
    point_of,
    read_cells,
    title_of,
)
from kit.valley.toy_rl import read_rl_runs, rl_findings

SHOWN = 12  # problems in the browser


def write_report(path: Path) -> Path:
    """Write the plots and report.html of the valley in `path`; returns the report. ValueError where nothing is finished."""
    found = read_cells(path)
    drawn = curves(found)
    config = (
        json.loads((path / "config.json").read_text(encoding="utf-8"))
        if (path / "config.json").is_file()
        else {}
    )
    lines = findings(drawn)
    sections = [
        embed(path / "valley.png", valley_figure(drawn)),
        _note(found),
        _sentences(lines[:2]),  # of the first arm: its accuracy and its length
        *_others(lines[2:]),
        *_why(path, first_model(found)),
        *_rl(path),
        "<h2>Every point</h2>" + table(found),
        "<h2>The same problem at every size</h2>" + BROWSER_NOTE + browser(first_model(found)),
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


def _why(path: Path, found: Sequence[Finished]) -> list[str]:
    """The section on why accuracy moves, of the first arm there is; nothing where it has no point yet."""
    points = {key: decompose(key[2], {cell.cell.seed: cell.result for cell in cells}) for key, cells in by_point(found).items()
              if key[1] in (BASE, first_arm(found))}  # fmt: skip
    base = [point for (_, arm, _), point in points.items() if arm == BASE]
    points = [point for (_, arm, _), point in points.items() if arm != BASE]
    if not base or not points:
        return []
    base, name = base[0], first_arm(found)
    return [
        f"<h2>Why: {html.escape(ARMS[name].title)}, answers taken apart step by step</h2>",
        _sentences(explain(base, points)),
        embed(path / "causes.png", causes_figure(base, points)),
        embed(path / "steps.png", steps_figure(base, points)),
        WHY_NOTE.format(
            causes="; ".join(f"<b>{cause}</b>: {html.escape(what)}" for cause, what in CAUSES.items())
        ),
        why_table(base, points),
    ]


def _rl(path: Path) -> list[str]:
    """The section on reinforcement learning; nothing where there was none."""
    rl_runs = read_rl_runs(path)
    if not rl_runs:
        return []
    return [
        "<h2>Reinforcement learning from three starts</h2>",
        _sentences(rl_findings(rl_runs)),
        embed(path / "rl.png", rl_figure(rl_runs)),
        RL_NOTE,
    ]


def why_table(base: Decomposition, points: Sequence[Decomposition]) -> str:
    """A row a point of the decomposition."""
    rows = ""
    for point in (base, *points):
        longer, reflection = point.reflection_tokens, point.reflection
        cells = [f"{point.num_traces:,}" if point.num_traces else "base model"]
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
    columns.sort(
        key=lambda cell: (
            cell.cell.arm != BASE,
            list(ARMS).index(cell.cell.arm) if cell.cell.arm in ARMS else 0,
        )
    )
    samples = [{row["question"]: row for row in cell.result.rows if row["sample"] == 0} for cell in columns]
    common = [question for question in samples[0] if all(question in of_cell for of_cell in samples)]
    parts = []
    for question in common[:SHOWN]:
        cells = "".join(
            _answer(cell, of_cell[question]) for cell, of_cell in zip(columns, samples, strict=True)
        )
        row = samples[0][question]
        summary = f"{html.escape(row['problem'])} <small>(answer {html.escape(row['answer'])})</small>"
        parts.append(
            f"<details{' open' if not parts else ''}><summary>{summary}</summary><div class=pair>{cells}</div></details>"
        )
    return "".join(parts)


def _answer(cell: Finished, row: dict) -> str:
    found = dissect(row["problem"], row["text"], finished=row["finished"])
    title = (
        "base model" if cell.cell.arm == BASE else f"{ARMS[cell.cell.arm].title}, {cell.cell.num_traces:,}"
    )
    cause = f": {found.cause}" if found.cause else ""
    spans = dict.fromkeys(found.wrong, "mark class=wrong") | dict.fromkeys(
        found.taken_back, "mark class=taken-back"
    )
    return (
        f"<div><h4>{html.escape(title)}: <span class={row['verdict']}>{row['verdict']}</span>{cause}</h4>"
        f"<pre>{pages.marked(row['text'], spans)}</pre></div>"
    )


def table(found: Sequence[Finished]) -> str:
    """A row a point of any curve, the base models first."""
    rows = ""
    for (_, arm, size), cells in by_point(found).items():
        title = title_of(cells[0], found) if arm != BASE else f"base model, {describe(cells[0])}"
        point = point_of(cells)
        mean = {
            name: sum(cell.row[name] for cell in cells) / len(cells)
            for name in ("truncated", "looping", "reflection")
        }
        batch, steps = (f"{cells[0].row.get(name) or '-'}" for name in ("batch_traces", "steps"))
        rows += (
            f"<tr><td>{html.escape(title)}<td>{size or '-'}<td>{batch}<td>{steps}<td>{len(cells)}"
            f"<td><b>{100 * point.accuracy.mean:.1f}</b> ± {100 * point.accuracy.half:.1f}"
            f"<td>{point.length.mean:.0f} ± {point.length.half:.0f}"
            + "".join(f"<td>{100 * mean[name]:.0f}" for name in ("truncated", "looping", "reflection"))
        )
    heads = (
        "arm",
        "traces",
        "batch",
        "steps",
        "seeds",
        "accuracy, %",
        "tokens",
        "cut off, %",
        "in a loop, %",
        "rechecks, %",
    )
    return f"<div class=wide><table><tr>{''.join(f'<th>{head}' for head in heads)}{rows}</table></div>"


def _sentences(lines: Sequence[str]) -> str:
    return "".join(f"<p class=finding>{html.escape(line)}</p>" for line in lines)


def _others(lines: Sequence[str]) -> list[str]:
    """What the other arms' curves say, below that of the first."""
    return (
        ["<h2>The other arms</h2><ul>" + "".join(f"<li>{html.escape(line)}" for line in lines) + "</ul>"]
        if lines
        else []
    )


def _note(found: Sequence[Finished]) -> str:
    result = found[0].result
    return NOTE.format(
        model=describe(found[0]),
        seeds=_seeds(found),
        questions=result.num_questions,
        samples=result.num_samples,
    )


def _seeds(found: Sequence[Finished]) -> str:
    number = len({cell.cell.seed for cell in found})
    if number > 1:
        return f"{number} seeds of traces, training and samples"
    return "one seed, so the intervals do not cover how one training differs from the next"


NOTE = """<p><small>{questions} held-out questions x {samples} samples; {seeds}. Bands are 95 % intervals over questions and,
where there are several, seeds. This is about the toy, chains of additions and subtractions for a {model}; it is not about
language models.</small></p>"""
WHY_NOTE = """<p><small>p: the share of right steps among those with only right ones before them; n: the problem's steps. "Longer
answers alone": the share that would be right if every operation of these answers, checks and all, were as reliable as the
base model's. What goes wrong first, in this order: {causes}. Right by luck: something in the answer is wrong, its box is
not. The paper, on its synthetic arithmetic: about 10 operations an answer before, 40 after 8k traces; on benchmarks, reflection
below 5 % before, about 75 % after (Qwen), reflective answers about 2,000 tokens longer (1.5B, 3B). It counts a recheck only where
a language model agrees; here a keyword is enough.</small></p>"""
RL_NOTE = """<p><small>GRPO (kit/rl/grpo.py), reward 1 for a right answer and 0 otherwise, temperature 1, on other
problems of the kind above, nearly all of which the base model solves: no start can end much above it here. The curve is the
reward of the rollouts, the sentences are of the questions above, answered anew. Bands span the seeds. In the paper the start
after 8k traces stays below the base model throughout, and the one after 128k ends above it.</small></p>"""
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
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("run", type=Path, help="a run folder")
    print(write_report(parser.parse_args().run))

"""A study's section on token efficiency and reflection by number of traces, for every model."""

from __future__ import annotations

import html
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path

from matplotlib.figure import Figure

from kit import paper
from kit.report import page as pages
from kit.report.curve_figures import draw_line, trace_axis
from kit.report.figures import embed, panels
from kit.valley.curves import Estimate
from kit.valley.finished import StudyResults, of_seeds
from kit.valley.reflection import Reflection, reflection_of
from kit.valley.study import short_name


def section(path: Path, results: StudyResults, model: str) -> str:
    """Write the figure of a model whose base model and some cell are done, and return the section."""
    name, base = results.length_benchmark, list(results.bases(model).values())
    measured = {
        label: [reflection_of(*of_seeds(seeds, name)) for seeds in (base, *sizes.values())]
        for label, sizes in results.points(model)[0].items()
    }
    draw, alt = partial(reflection_figure, measured, name), "token efficiency and reflection by size"
    drawn = embed(path / f"{short_name(model)}-reflection.png", draw, alt)
    rows = [
        [
            label,
            f"{p.num_traces:,}",
            _plain(p.efficiency, ".3f"),
            pages.share_cell(p.share),
            _plain(p.tokens_longer, "+,.0f"),
        ]
        for label, points in measured.items()
        for p in points
    ]
    heads = ("training set", "traces", "right per 1,000 tokens", "reflection, %", "tokens longer")
    title = f"<h3>Token efficiency and reflection ({html.escape(name)})</h3>"
    judged = [found.results[name] for found in results.finished if found.cell.model == model]
    left = sum(result.unjudged for result in judged if result.judged_reflection is not None)
    left_open = LEFT_OPEN.format(left=left) if left else ""
    return title + drawn + pages.table(heads, rows) + left_open + NOTE


def _plain(value: Estimate | None, form: str) -> str:
    return "-" if value is None else value.text(form)


def reflection_figure(curves: Mapping[str, Sequence[Reflection]], length_of: str, narrow: bool) -> Figure:
    """Draw token efficiency, the share of reflective answers and how much longer they are, by size.

    curves: name -> points, the base model first. length_of: the benchmark.
    """
    figure, panes = panels(3, narrow, 3.7)
    kinds = {
        f"Right answers per 1,000 tokens, {length_of}": ("efficiency", 1),
        "Answers with a reflection keyword, %": ("share", 100),
        "Tokens by which those are longer": ("tokens_longer", 1),
    }
    sizes = sorted({point.num_traces for points in curves.values() for point in points} - {0})
    for axes, (title, (name, scale)) in zip(panes, kinds.items(), strict=True):
        for i, (label, points) in enumerate(curves.items()):
            known = {p.num_traces: getattr(p, name) for p in points if getattr(p, name) is not None}
            draw_line(axes, label, list(known), list(known.values()), i, scale)
        trace_axis(axes, sizes)
        axes.set(title=title)
    if len(curves) > 1:
        panes[0].legend()
    return figure


LEFT_OPEN = """<p>The judge gave no verdict on {left:,} answers with a keyword. They count as reflective, so
the shares are still an upper bound; the same command asks again.</p>"""
NOTE = f"""<p><small>Reflection: one of the paper's keywords, an upper bound, since the paper also has a
language model confirm each; here that is done if a judge was asked (kit/evaluate/judge.py). Tokens longer:
reflective answers minus the others. The paper states {paper.REFLECTION}, {paper.REFLECTION_LENGTH}.
</small></p>"""

"""Figures of a run's report: accuracy, length and loss, and what was measured during training.

A figure is drawn twice: with two panels per row for a wide screen, and with one for a narrow screen, on which
text in the wide one would be too small to read.
"""

from __future__ import annotations

import base64
import html
import io
from collections.abc import Callable, Collection, Sequence
from pathlib import Path

from matplotlib import rc_context
from matplotlib.figure import Figure

from kit.disk import write_whole
from kit.evaluate.results import Result

Stages = dict[str, dict[str, Result]]  # stage -> benchmark -> result
COLOURS = ("#4c72b0", "#dd8452", "#55a868", "#c44e52", "#8172b3", "#937860")  # of stages, or of benchmarks
FONT = 12  # points; a wide panel of 5.4 inches fills half of a page, a narrow one of 4.4 inches a phone
NARROW = 640  # pixels of a screen up to which the narrow version is shown
DURING = {  # title of a panel -> (figure of a benchmark, factor)
    "Accuracy during training, %": ("accuracy", 100),
    "Tokens per answer": ("mean_tokens", 1),
    "Answers with a reflection keyword, %": ("reflection", 100),
}


def embed(path: Path, draw: Callable[[bool], Figure], alt: str = "") -> str:
    """Write the wide figure to `path`, a PNG, and return both versions as HTML that needs no file.

    draw: takes whether the screen is narrow. alt: "" = the file's name.
    """
    with rc_context({"font.size": FONT, "legend.fontsize": FONT - 1, "axes.grid": True, "grid.alpha": 0.3}):
        wide, narrow = draw(False), draw(True)
        pngs = [_png(narrow), _png(wide)]
    write_whole(path, pngs[1])
    sources = ["data:image/png;base64," + base64.b64encode(png).decode() for png in pngs]
    width = 100 * wide.get_figwidth()
    return (
        f'<picture><source media="(max-width: {NARROW}px)" srcset="{sources[0]}">'
        f'<img alt="{html.escape(alt or path.stem)}" width={width:.0f} src="{sources[1]}"></picture>'
    )


def _png(figure: Figure) -> bytes:
    buffer = io.BytesIO()
    figure.savefig(buffer, dpi=130, format="png")
    return buffer.getvalue()


def panels(count: int, narrow: bool, height: float = 3.7) -> tuple[Figure, list]:
    """Return a figure and its panels, each `height` inches high: two per row, one if the screen is narrow."""
    columns = 1 if narrow else min(2, count)
    rows, width = -(-count // columns), 4.4 if narrow else 5.4 * columns if columns > 1 else 7.0
    figure = Figure(figsize=(width, height * rows), layout="constrained")
    axes = list(figure.subplots(rows, columns, squeeze=False).flat)
    for unused in axes[count:]:
        unused.remove()
    return figure, axes[:count]


def loss_figure(metrics: list[dict], narrow: bool) -> Figure:
    figure, (axes,) = panels(1, narrow, 3.0)
    axes.plot(
        [row["step"] for row in metrics], [row["loss"] for row in metrics], color="#333333", linewidth=1
    )
    axes.set(xlabel="optimizer step", ylabel="loss (mean over targets)", title="Training loss")
    return figure


def accuracy_figure(stages: Stages, narrow: bool) -> Figure:
    """Draw the accuracy and the mean length of answers, a bar per benchmark and stage."""
    names = _benchmarks(stages)
    figure, (top, bottom) = panels(2, narrow)
    width = 0.8 / len(stages)
    for i, (stage, found) in enumerate(stages.items()):
        shown = [name for name in names if name in found]
        shares, intervals = [found[name].accuracy for name in shown], [found[name].interval for name in shown]
        places = [names.index(name) + (i - (len(stages) - 1) / 2) * width for name in shown]
        below = [100 * min(half, share) for share, half in zip(shares, intervals, strict=True)]
        above = [100 * min(half, 1 - share) for share, half in zip(shares, intervals, strict=True)]
        style = {"width": 0.9 * width, "color": COLOURS[i], "label": stage}
        top.bar(places, [100 * share for share in shares], yerr=[below, above], capsize=4, **style)
        bottom.bar(places, [found[name].mean_tokens for name in shown], **style)
    top.set(ylabel="right answers, %", title="Accuracy, with 95 % intervals")
    bottom.set(ylabel="tokens per answer", title="Mean length of answers")
    for axes in (top, bottom):
        axes.set_xticks(range(len(names)), names)
        axes.set(ylim=(0, None), xlim=(-0.8, len(names) - 0.2))
        axes.grid(visible=False, axis="x")
        _legend(axes, stages)
    return figure


def length_figure(stages: Stages, narrow: bool) -> Figure:
    """Draw one histogram per benchmark; if there is one stage only, right and wrong answers apart."""
    names = _benchmarks(stages)
    figure, panes = panels(len(names), narrow, 3.0)
    for axes, name in zip(panes, names, strict=True):
        results = {stage: found[name] for stage, found in stages.items() if name in found}
        groups = {stage: [row["tokens"] for row in result.rows] for stage, result in results.items()}
        longest = max(max(lengths) for lengths in groups.values())
        if len(results) == 1:
            (result,) = results.values()
            groups = {"not right": [], "right": []}
            for row in result.rows:
                groups["right" if row["verdict"] == "correct" else "not right"].append(row["tokens"])
        for (kind, lengths), colour in zip(groups.items(), COLOURS, strict=False):
            label = f"{kind} ({len(lengths):,})"
            axes.hist(lengths, bins=30, range=(0, longest), alpha=0.6, color=colour, label=label)
        axes.set(xlabel="tokens per answer", ylabel="answers", title=f"Length of the answers: {name}")
        axes.legend()
    return figure


def caps_figure(stages: Stages, narrow: bool) -> Figure:
    """Draw the accuracy that smaller limits on length would have given, one panel per benchmark."""
    names = _benchmarks(stages)
    figure, panes = panels(len(names), narrow, 3.0)
    for axes, name in zip(panes, names, strict=True):
        ticks = set()
        for (stage, found), colour in zip(stages.items(), COLOURS, strict=False):
            if name not in found or not found[name].caps:
                continue
            caps = found[name].caps
            shares = [found[name].accuracy_at(cap) for cap in caps]
            widths = [found[name].interval_at(cap) for cap in caps]
            axes.plot(caps, [100 * x for x in shares], "o-", color=colour, label=stage)
            _band(axes, caps, shares, widths, colour)
            ticks |= set(caps)
        axes.set_xscale("log", base=2)
        axes.set_xticks(sorted(ticks), [f"{cap:,}" for cap in sorted(ticks)])
        axes.set_xticks([], minor=True)
        axes.set(xlabel="limit on tokens per answer", ylabel="accuracy, %", title=f"Shorter limits: {name}")
        axes.set_ylim(0, None)
        _legend(axes, stages)
    return figure


def steps_figure(measured: Sequence[dict], metrics: Sequence[dict], narrow: bool) -> Figure:
    """Draw accuracy, length, reflection and loss against the step, as measured during training.

    measured: rows of during.jsonl. metrics: one row per step of training.
    """
    figure, panes = panels(len(DURING) + 1, narrow, 3.4)
    steps = [row["step"] for row in measured]
    names = list(dict.fromkeys(name for row in measured for name in row["benchmarks"]))
    for axes, (title, (figure_name, factor)) in zip(panes, DURING.items(), strict=False):
        for name, colour in zip(names, COLOURS * len(names), strict=False):
            rows = [row["benchmarks"][name] for row in measured]
            values = [factor * row[figure_name] for row in rows]
            axes.plot(steps, values, "o-", color=colour, label=name)
            if figure_name == "accuracy":
                shares, widths = ([row[key] for row in rows] for key in ("accuracy", "interval"))
                _band(axes, steps, shares, widths, colour)
        axes.set(title=title, xlabel="optimizer step", ylim=(0, None))
        _legend(axes, names)

    loss = panes[-1]
    trained = [row["step"] for row in metrics], [row["loss"] for row in metrics]
    loss.plot(*trained, color="#999999", linewidth=1, label="of each step")
    held_out = [(row["step"], row["held_out_loss"]) for row in measured if row["held_out_loss"] is not None]
    if held_out:
        loss.plot(*zip(*held_out, strict=True), "o-", color="#333333", label="of held-out traces")
    loss.set(title="Loss (mean over targets)", xlabel="optimizer step")
    loss.legend()
    return figure


def _band(axes, places: Sequence[int], shares: Sequence[float], halves: Sequence[float], colour: str) -> None:
    """Draw the intervals of shares, in percent, as a band."""
    low = [100 * max(0, share - half) for share, half in zip(shares, halves, strict=True)]
    high = [100 * min(1, share + half) for share, half in zip(shares, halves, strict=True)]
    axes.fill_between(places, low, high, color=colour, alpha=0.15, linewidth=0)


def _benchmarks(stages: Stages) -> list[str]:
    return list(dict.fromkeys(name for found in stages.values() for name in found))


def _legend(axes, lines: Collection[str]) -> None:
    if len(lines) > 1:
        axes.legend()

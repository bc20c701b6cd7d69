"""Figures of a run's report: loss, accuracy, length of the answers, accuracy against the limit on length."""

from __future__ import annotations

import base64
import html
import io
from pathlib import Path

from matplotlib.figure import Figure

from kit.evaluate.results import Result

Stages = dict[str, dict[str, Result]]  # stage -> benchmark -> result
COLOURS = ("#4c72b0", "#dd8452")  # of the first stage and the second


def embed(path: Path, figure: Figure, alt: str = "") -> str:
    """Write the figure to `path`, a PNG, and return it as an <img> that needs no file. alt: "" = its name."""
    buffer = io.BytesIO()
    figure.savefig(buffer, dpi=130, format="png")
    path.write_bytes(buffer.getvalue())
    data = base64.b64encode(buffer.getvalue()).decode()
    return f'<img alt="{html.escape(alt or path.stem)}" src="data:image/png;base64,{data}">'


def loss_figure(metrics: list[dict]) -> Figure:
    figure = Figure(figsize=(7, 3.2), layout="constrained")
    axes = figure.subplots()
    axes.plot(
        [row["step"] for row in metrics], [row["loss"] for row in metrics], color="#333333", linewidth=1
    )
    axes.set(xlabel="optimizer step", ylabel="loss (mean over targets)", title="Training loss")
    return figure


def accuracy_figure(stages: Stages) -> Figure:
    names = _benchmarks(stages)
    figure = Figure(figsize=(7, 3.2), layout="constrained")
    axes = figure.subplots()
    width = 0.36
    for i, (stage, found) in enumerate(stages.items()):
        shown = [name for name in names if name in found]
        shares, intervals = [found[name].accuracy for name in shown], [found[name].interval for name in shown]
        places = [names.index(name) + (i - (len(stages) - 1) / 2) * 1.1 * width for name in shown]
        below = [100 * min(half, share) for share, half in zip(shares, intervals, strict=True)]
        above = [100 * min(half, 1 - share) for share, half in zip(shares, intervals, strict=True)]
        style = {"color": COLOURS[i], "label": stage, "capsize": 3}
        axes.bar(places, [100 * share for share in shares], width, yerr=[below, above], **style)
    axes.set_xticks(range(len(names)), names)
    axes.set(
        ylabel="accuracy, % (95 % interval)", title="Accuracy", ylim=(0, None), xlim=(-0.8, len(names) - 0.2)
    )
    _legend(axes, stages)
    return figure


def length_figure(stages: Stages) -> Figure:
    """Draw one histogram per benchmark; if there is one stage only, right and wrong answers apart."""
    names = _benchmarks(stages)
    figure = Figure(figsize=(7, 2.8 * len(names)), layout="constrained")
    for axes, name in zip(figure.subplots(len(names), squeeze=False)[:, 0], names, strict=True):
        groups = {
            stage: [row["tokens"] for row in found[name].rows]
            for stage, found in stages.items()
            if name in found
        }
        if len(groups) == 1:
            (stage,) = groups
            rows = stages[stage][name].rows
            groups = {
                kind: [row["tokens"] for row in rows if (row["verdict"] == "correct") == (kind == "right")]
                for kind in ("not right", "right")
            }
        longest = max(max(lengths, default=0) for lengths in groups.values())
        for (kind, lengths), colour in zip(groups.items(), COLOURS, strict=False):
            label = f"{kind} ({len(lengths):,})"
            axes.hist(lengths, bins=30, range=(0, longest), alpha=0.6, color=colour, label=label)
        axes.set(xlabel="tokens per response", ylabel="responses", title=f"Length of the answers: {name}")
        axes.legend()
    return figure


def caps_figure(stages: Stages) -> Figure:
    """Draw the accuracy that smaller limits on length would have given, one panel per benchmark."""
    names = _benchmarks(stages)
    figure = Figure(figsize=(7, 2.8 * len(names)), layout="constrained")
    for axes, name in zip(figure.subplots(len(names), squeeze=False)[:, 0], names, strict=True):
        ticks = set()
        for (stage, found), colour in zip(stages.items(), COLOURS, strict=False):
            if name not in found or not found[name].caps:
                continue
            caps = found[name].caps
            shares = [found[name].accuracy_at(cap) for cap in caps]
            widths = [found[name].interval_at(cap) for cap in caps]
            axes.plot(caps, [100 * x for x in shares], "o-", color=colour, label=stage)
            low = [100 * max(0, share - half) for share, half in zip(shares, widths, strict=True)]
            high = [100 * min(1, share + half) for share, half in zip(shares, widths, strict=True)]
            axes.fill_between(caps, low, high, color=colour, alpha=0.15, linewidth=0)
            ticks |= set(caps)
        axes.set_xscale("log", base=2)
        axes.set_xticks(sorted(ticks), [f"{cap:,}" for cap in sorted(ticks)])
        axes.set_xticks([], minor=True)
        axes.set(
            xlabel="limit on the tokens of a response",
            ylabel="accuracy, %",
            title=f"Accuracy against length: {name}",
        )
        axes.set_ylim(0, None)
        _legend(axes, stages)
    return figure


def _benchmarks(stages: Stages) -> list[str]:
    return list(dict.fromkeys(name for found in stages.values() for name in found))


def _legend(axes, stages: Stages) -> None:
    if len(stages) > 1:
        axes.legend()

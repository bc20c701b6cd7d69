"""Figures of a report: loss, accuracy, length of the answers, accuracy against the limit on length. All matplotlib is here."""

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
    """Write the figure to `path`, a PNG; returns it as an <img> that needs no file. alt: "" = the file's name."""
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
        axes.bar(
            [names.index(name) + (i - (len(stages) - 1) / 2) * 1.1 * width for name in shown], [100 * x for x in shares], width,
            yerr=[[100 * min(h, x) for x, h in zip(shares, intervals, strict=True)],
                  [100 * min(h, 1 - x) for x, h in zip(shares, intervals, strict=True)]],
            color=COLOURS[i], label=stage, capsize=3,
        )  # fmt: skip
    axes.set_xticks(range(len(names)), names)
    axes.set(
        ylabel="accuracy, % (95 % interval)", title="Accuracy", ylim=(0, None), xlim=(-0.8, len(names) - 0.2)
    )
    _legend(axes, stages)
    return figure


def length_figure(stages: Stages) -> Figure:
    """A histogram a benchmark; right and wrong answers apart where there is one stage only."""
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
            axes.hist(
                lengths,
                bins=30,
                range=(0, longest),
                alpha=0.6,
                color=colour,
                label=f"{kind} ({len(lengths):,})",
            )
        axes.set(xlabel="tokens per response", ylabel="responses", title=f"Length of the answers: {name}")
        axes.legend()
    return figure


def caps_figure(stages: Stages) -> Figure:
    """Accuracy had the limit on length been smaller, a panel a benchmark."""
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
            axes.fill_between(
                caps, [100 * max(0, x - h) for x, h in zip(shares, widths, strict=True)],
                [100 * min(1, x + h) for x, h in zip(shares, widths, strict=True)], color=colour, alpha=0.15, linewidth=0,
            )  # fmt: skip
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

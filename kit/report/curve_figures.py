"""Figures of a study: accuracy and length by number of traces, why accuracy moves, reinforcement learning."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from operator import attrgetter
from statistics import fmean

from matplotlib.figure import Figure

from kit.valley.curves import Curve, Estimate
from kit.valley.error_accumulation import Decomposition, length_alone
from kit.valley.finished import RLRun
from kit.valley.first_error import CAUSES

# dark enough for a projector; the markers are distinct in grey print
COLOURS = ("#c0392b", "#2471a3", "#b7791f", "#6c3483", "#1e8449", "#784212", "#34495e")
MARKERS = ("o", "s", "^", "D", "v", "P", "X")
FILLS = {  # colour -> hatch, of the right answers and then of CAUSES
    "#2e7d4f": "",
    "#c0392b": "",
    "#e67e22": "//",
    "#7f8c8d": "",
    "#34495e": "..",
    "#8e6fb5": "xx",
    "#d4ac0d": "",
    "#5dade2": "--",
}


def valley_figure(curves: Sequence[Curve], length_of: str, paper: Mapping[int, float]) -> Figure:
    """Draw one model's accuracy and length against the number of traces, with bands. Dashed: the base model.

    length_of: the benchmark whose responses' length is drawn. paper: traces (0 = the base model) -> its
    accuracy in percent.
    """
    figure = Figure(figsize=(9, 9), layout="constrained")
    top, bottom = figure.subplots(2, 1, sharex=True)
    sizes = sorted({point.num_traces for curve in curves for point in curve.points})
    for axes, of, scale in ((top, attrgetter("accuracy"), 100), (bottom, attrgetter("length"), 1)):
        for i, curve in enumerate(curves):
            label, places = curve.name.partition(", ")[2], [point.num_traces for point in curve.points]
            draw_line(axes, label, places, list(map(of, curve.points)), i, scale)
        start = of(curves[0].base)
        high = min(100, scale * start.high) if scale == 100 else start.high
        axes.axhline(scale * start.mean, color="#333333", linestyle="--", linewidth=1.2, label="base model")
        axes.axhspan(max(0, scale * start.low), high, color="#333333", alpha=0.12, linewidth=0)
        axes.tick_params(labelsize=12)
        axes.grid(alpha=0.3)

    if stars := {size: value for size, value in paper.items() if size in sizes}:
        label = "the paper, after fine-tuning"
        top.plot(list(stars), list(stars.values()), "k*", markersize=14, linestyle="", label=label)
    if 0 in paper:
        top.axhline(paper[0], color="#333333", linestyle=":", linewidth=1.2, label="the paper's base model")
    top.set_ylim(0, 102 if curves[0].base.accuracy.mean > 0.5 else None)
    bottom.set_ylim(0, None)
    top.set_ylabel("accuracy, %", fontsize=14)
    bottom.set_ylabel(f"tokens per response, {length_of}", fontsize=14)
    trace_axis(bottom, sizes)
    figure.legend(*top.get_legend_handles_labels(), loc="outside upper center", ncols=2, fontsize=12)
    return figure


def draw_line(
    axes, label: str, sizes: Sequence[int], estimates: Sequence[Estimate], i: int, scale: float
) -> None:
    """Draw line i with its band. scale: 100 for shares, which are drawn in percent and stay within 0..100."""
    colour, marker = COLOURS[i % len(COLOURS)], MARKERS[i % len(MARKERS)]
    means, low = [scale * e.mean for e in estimates], [scale * max(0, e.low) for e in estimates]
    high = [min(100, scale * e.high) if scale == 100 else scale * e.high for e in estimates]
    axes.plot(sizes, means, marker=marker, color=colour, linewidth=2.5, markersize=8, label=label)
    axes.fill_between(sizes, low, high, color=colour, alpha=0.18, linewidth=0)


def trace_axis(axes, sizes: Sequence[int]) -> None:
    axes.set_xscale("log", base=2)
    axes.set_xticks(sizes, [f"{size:,}" for size in sizes])
    axes.set_xticks([], minor=True)
    axes.set_xlabel("traces to learn from", fontsize=14)


def rl_figure(starts: Mapping[str, Sequence[RLRun]]) -> Figure:
    """Draw the mean reward of the rollouts against the step, a line per start; the band spans the seeds."""
    figure = Figure(figsize=(9, 4.2), layout="constrained")
    axes = figure.subplots()
    for (name, runs), colour in zip(starts.items(), COLOURS, strict=False):
        columns = zip(*(run.rewards for run in runs), strict=False)
        rewards = [[100 * reward for reward in column] for column in columns]
        steps, low, high = range(1, len(rewards) + 1), list(map(min, rewards)), list(map(max, rewards))
        axes.plot(steps, list(map(fmean, rewards)), color=colour, linewidth=2.5, label=name)
        axes.fill_between(steps, low, high, color=colour, alpha=0.18, linewidth=0)
    axes.set_ylim(0, 102)
    axes.set_xlabel("step", fontsize=14)
    axes.set_ylabel("right answers, %", fontsize=14)
    axes.tick_params(labelsize=12)
    axes.grid(alpha=0.3)
    axes.legend(fontsize=12, title="start")
    return figure


def causes_figure(base: Decomposition, points: Sequence[Decomposition]) -> Figure:
    """Draw the share of right answers at each size, and of the others by the first thing wrong in them."""
    figure = Figure(figsize=(9, 4.6), layout="constrained")
    axes = figure.subplots()
    every = [base, *points]
    bottom = [0.0] * len(every)
    bars = {"right": [point.accuracy.mean for point in every]}
    bars |= {cause: [point.causes[cause] for point in every] for cause in CAUSES}
    for (label, shares), (colour, hatch) in zip(bars.items(), FILLS.items(), strict=True):
        if any(shares):
            style = {"color": colour, "hatch": hatch, "edgecolor": "white", "label": label}
            heights = [100 * share for share in shares]
            axes.bar(range(len(every)), heights, bottom=bottom, **style)
            bottom = [b + h for b, h in zip(bottom, heights, strict=True)]

    axes.set_xticks(range(len(every)), ["base model", *(f"{point.num_traces:,}" for point in points)])
    axes.set(ylim=(0, 100), title="What goes wrong first")
    axes.set_xlabel("traces to learn from", fontsize=14)
    axes.set_ylabel("answers, %", fontsize=14)
    axes.tick_params(labelsize=12)
    axes.legend(loc="center left", bbox_to_anchor=(1, 0.5), fontsize=12, reverse=True)
    return figure


def steps_figure(base: Decomposition, points: Sequence[Decomposition]) -> Figure:
    """Draw the chance of a step, and beside it accuracy, p^n and what longer answers alone would cost."""
    figure = Figure(figsize=(9, 4.2), layout="constrained")
    left, right = figure.subplots(1, 2)
    sizes = [point.num_traces for point in points]
    steps = {
        "a step of the chain (p)": [point.step_accuracy for point in points],
        "any equation, checks too": [point.equation_accuracy for point in points],
    }
    accuracies = {
        "measured": [point.accuracy for point in points],
        "p to the power of the steps": [point.predicted for point in points],
        "longer answers alone": [Estimate(length_alone(base, point), 0.0) for point in points],
    }
    for axes, lines in ((left, steps), (right, accuracies)):
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

"""Figures of a study: accuracy and length by number of traces, why accuracy moves, reinforcement learning."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from operator import attrgetter
from statistics import fmean

from matplotlib.figure import Figure

from kit.paper import REWARD
from kit.report.figures import panels
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


def valley_figure(
    curves: Sequence[Curve], length_of: str, paper: Mapping[int, float], narrow: bool
) -> Figure:
    """Draw one model's accuracy and length from the base model (0 traces) to the most traces, with bands.

    length_of: the benchmark whose responses' length is drawn. paper: traces (0 = the base model) -> its
    accuracy in percent. Beside these, accuracy is by the paper's grading, and the strict one is drawn thinly.
    """
    figure, (left, right) = panels(2, narrow, 4.0)
    sizes = sorted({point.num_traces for curve in curves for point in curve.points})
    stars = {size: value for size, value in paper.items() if size in (0, *sizes)}
    as_paper = bool(stars) and all(p.paper_shares for curve in curves for p in (curve.base, *curve.points))
    accuracy = attrgetter("paper_accuracy" if as_paper else "accuracy")
    for axes, of, scale in ((left, accuracy, 100), (right, attrgetter("length"), 1)):
        for i, curve in enumerate(curves):
            label, points = curve.name.partition(", ")[2], [curve.base, *curve.points]
            draw_line(axes, label, [point.num_traces for point in points], list(map(of, points)), i, scale)
        start = scale * of(curves[0].base).mean
        axes.axhline(start, color="#333333", linestyle="--", linewidth=1.2, label="base model")
        trace_axis(axes, sizes)

    if as_paper:
        for i, curve in enumerate(curves):
            points = [curve.base, *curve.points]
            strict = [100 * point.accuracy.mean for point in points]
            style = {"color": COLOURS[i % len(COLOURS)], "linestyle": ":", "linewidth": 1.2}
            left.plot(
                [p.num_traces for p in points], strict, label="strict grading" if i == 0 else "", **style
            )
    if stars:
        left.plot(list(stars), list(stars.values()), "k*", markersize=14, linestyle="", label="the paper")
    left.set_ylim(0, 102 if curves[0].base.accuracy.mean > 0.5 else None)
    right.set_ylim(0, None)
    graded = " as the paper graded" if as_paper else " (strict grading)" if stars else ""
    left.set(title=f"Accuracy{graded}", ylabel="right answers, %")
    right.set(title=f"Length of answers, {length_of}", ylabel="tokens per answer")
    figure.legend(*left.get_legend_handles_labels(), loc="outside upper center", ncols=1 if narrow else 3)
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
    """Let the axis begin at 0 traces, which has no logarithm: up to the smallest size it is linear."""
    axes.set_xscale("symlog", base=2, linthresh=sizes[0], linscale=1)
    places = [0, *sizes]
    axes.set_xticks(places, [f"{size:,}" for size in places], rotation=45, ha="right", rotation_mode="anchor")
    axes.set_xticks([], minor=True)
    axes.set(xlabel="traces to learn from (0: the base model)", xlim=(-sizes[0] / 4, 1.4 * sizes[-1]))


def rl_figure(starts: Mapping[str, Sequence[RLRun]], narrow: bool) -> Figure:
    """Draw the mean reward of the rollouts against the step, a line per start; the band spans the seeds."""
    figure, (axes,) = panels(1, narrow)
    named = sorted({run.reward for runs in starts.values() for run in runs})
    is_accuracy = named == [REWARD]
    scale = 100 if is_accuracy else 1
    for (name, runs), colour in zip(starts.items(), COLOURS, strict=False):
        columns = zip(*(run.rewards for run in runs), strict=False)
        rewards = [[scale * reward for reward in column] for column in columns]
        steps, low, high = range(1, len(rewards) + 1), list(map(min, rewards)), list(map(max, rewards))
        axes.plot(steps, list(map(fmean, rewards)), color=colour, linewidth=2.5, label=name)
        axes.fill_between(steps, low, high, color=colour, alpha=0.18, linewidth=0)
    axes.set(xlabel="step", ylabel="right answers, %" if is_accuracy else f"reward: {', '.join(named)}")
    if is_accuracy:
        axes.set_ylim(0, 102)
    axes.legend(title="start")
    return figure


def causes_figure(points: Sequence[Decomposition], narrow: bool) -> Figure:
    """Draw the share of right answers at each size, and of the others by the first thing wrong in them."""
    figure, (axes,) = panels(1, narrow, 4.4)
    bottom = [0.0] * len(points)
    bars = {"right": [point.accuracy.mean for point in points]}
    bars |= {cause: [point.causes[cause] for point in points] for cause in CAUSES}
    for (label, shares), (colour, hatch) in zip(bars.items(), FILLS.items(), strict=True):
        if any(shares):
            style = {"color": colour, "hatch": hatch, "edgecolor": "white", "label": label}
            heights = [100 * share for share in shares]
            axes.bar(range(len(points)), heights, bottom=bottom, **style)
            bottom = [b + h for b, h in zip(bottom, heights, strict=True)]

    axes.set_xticks(range(len(points)), [f"{point.num_traces:,}" for point in points])
    axes.set(ylim=(0, 100), xlabel="traces to learn from (0: the base model)", ylabel="answers, %")
    axes.grid(visible=False, axis="x")
    figure.legend(loc="outside upper center", ncols=2 if narrow else 4, title="What goes wrong first")
    return figure


def steps_figure(points: Sequence[Decomposition], narrow: bool) -> Figure:
    """Draw the chance of a step, and beside it accuracy, p^n and what longer answers alone would cost.

    points: the base model first.
    """
    figure, (left, right) = panels(2, narrow)
    sizes = [point.num_traces for point in points]
    steps = {
        "a step of the chain (p)": [point.step_accuracy for point in points],
        "any equation, checks too": [point.equation_accuracy for point in points],
    }
    accuracies = {
        "measured": [point.accuracy for point in points],
        "p to the power of the steps": [point.predicted for point in points],
        "longer answers alone": [Estimate(length_alone(points[0], point), 0.0) for point in points],
    }
    for axes, lines in ((left, steps), (right, accuracies)):
        for i, (label, estimates) in enumerate(lines.items()):
            draw_line(axes, label, sizes, estimates, i, 100)
        trace_axis(axes, sizes[1:])
        axes.set_ylim(0, 102)
        axes.legend()

    left.set(title="How often a step is right", ylabel="%")
    right.set(title="Do errors that add up explain it?", ylabel="accuracy, %")
    return figure

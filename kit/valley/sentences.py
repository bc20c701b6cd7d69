"""Sentences that say what the curves of a study show, and what reinforcement learning from its starts does.

Every sentence is computed: an arm falls, rises or recovers only if an interval says so.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from statistics import fmean

from kit.run import AFTER, BEFORE
from kit.valley.curves import ByQuestion, Curve, difference, estimate, percent, points
from kit.valley.finished import RLRun, StudyResults, shares, tokens
from kit.valley.study import QLORA, short_name


def sentences(results: StudyResults) -> list[str]:
    """Return what a study says, model by model."""
    of_curves = [line for model in results.models for line in findings(results.curves(model))]
    return of_curves + rl_findings(results.rl, results.length_benchmark)


def findings(curves: Sequence[Curve]) -> list[str]:
    """What the curves say, a few sentences an arm, and of every other arm how it compares with the first."""
    sentences = []
    for curve in curves:
        if curve.points:
            sentences += [accuracy_sentence(curve), length_sentence(curve)]
    for other in curves[1:]:
        if curves[0].points and other.points:
            sentences.append(comparison_sentence(curves[0], other))
    return sentences


def _capital(text: str) -> str:
    return text[0].upper() + text[1:]


def accuracy_sentence(curve: Curve) -> str:
    """What accuracy does as the traces grow in number, named by the curve's shape."""
    changes, low, last = curve.changes(), curve.points[curve.lowest], curve.points[-1]
    start, subject, shape = percent(curve.base.accuracy), _capital(curve.name), curve.shape
    if shape == "flat":
        most = max(changes, key=lambda change: abs(change.mean))
        at = curve.points[changes.index(most)].num_traces
        return (
            f"{subject}: accuracy does not change beyond chance at any number of traces (base model {start}; the largest "
            f"difference is {points(most)}, at {at:,})."
        )
    if shape == "rising":
        best = max(range(len(changes)), key=lambda i: changes[i].mean)
        return (
            f"{subject}: accuracy rises from {start} to {percent(curve.points[best].accuracy)} at "
            f"{curve.points[best].num_traces:,} traces ({points(changes[best])}) and falls below the base model at no size."
        )
    fall = (
        f"{subject}: accuracy falls from {start} to {percent(low.accuracy)} at {low.num_traces:,} traces "
        f"({points(changes[curve.lowest])})"
    )
    if shape == "falling":
        if low is last:
            return f"{fall}, the most that were tried: there is no recovery in this range."
        return (
            f"{fall} and does not climb back beyond chance: {percent(last.accuracy)} at {last.num_traces:,} "
            f"({points(curve.climb)} from the lowest)."
        )
    climb = f"{fall}, then climbs to {percent(last.accuracy)} at {last.num_traces:,} ({points(curve.climb)} from the lowest)"
    if shape == "crossing":
        return f"{climb}, still below the base model ({points(changes[-1])})."
    if shape == "unclear":
        return (
            f"{climb}; whether it is back at the base model's is not known ({points(changes[-1])}): that takes more seeds "
            "or questions."
        )
    if changes[-1].above_zero():
        return f"{climb}, above the base model ({points(changes[-1])}): the valley is crossed."
    return f"{climb}, where it cannot be told from the base model ({points(changes[-1])}): the valley is crossed."


def length_sentence(curve: Curve) -> str:
    """Whether answers get longer, and shorter again."""
    start, looks = curve.base.length, len(curve.points)
    ratios = [point.length.mean / start.mean for point in curve.points]
    longer = [
        i
        for i, point in enumerate(curve.points)
        if difference(point.tokens, curve.base.tokens, ()).above_zero(looks)
    ]
    longest = max(longer or range(looks), key=lambda i: ratios[i])
    peak, last = curve.points[longest], curve.points[-1]
    shrank = difference(peak.tokens, last.tokens, ()).above_zero(looks)
    subject = f"{_capital(curve.name)}: answers"
    if not longer:
        return (
            f"{subject} get longer at no size beyond chance ({start.mean:.0f} tokens before, at most {peak.length.mean:.0f} ± "
            f"{peak.length.half:.0f}, at {peak.num_traces:,} traces)."
        )
    rise = (
        f"{subject} get {ratios[longest]:.1f} times as long, at {peak.num_traces:,} traces "
        f"({start.mean:.0f} to {peak.length.mean:.0f} tokens)"
    )
    if peak is last:
        return f"{rise}, the most that were tried."
    end = f"{ratios[-1]:.1f} times at {last.num_traces:,} ({last.length.mean:.0f} tokens)"
    return (
        f"{rise}, and shorter again: {end}."
        if shrank
        else f"{rise}, and not shorter again beyond chance: {end}."
    )


def comparison_sentence(first: Curve, other: Curve) -> str:
    """At which sizes the other arm's accuracy is above the first's, and at which below."""
    at = {point.num_traces: point for point in first.points}
    pairs = [(point, at[point.num_traces]) for point in other.points if point.num_traces in at]
    pairs = [(point.num_traces, difference(point.shares, same.shares)) for point, same in pairs]
    if not pairs:
        return f"{_capital(other.name)} and {first.name} have no size in common yet."
    looks = len(pairs)
    above = [f"{size:,} ({points(change)})" for size, change in pairs if change.above_zero(looks)]
    below = [f"{size:,} ({points(change)})" for size, change in pairs if change.below_zero(looks)]
    parts = [
        f"{side} that of {first.name} at {', '.join(sizes)} traces"
        for side, sizes in (("above", above), ("below", below))
        if sizes
    ]
    if not parts:
        return f"{_capital(other.name)}: accuracy cannot be told from that of {first.name} at any size."
    rest = " and not to be told apart at the others" if len(above) + len(below) < looks else ""
    return f"{_capital(other.name)}: accuracy is {' and '.join(parts)}{rest}."


def by_start(rl_runs: Sequence[RLRun]) -> dict[str, dict[str, list[RLRun]]]:
    """Return model and method -> start -> its seeds, in the order of the runs."""
    groups: dict[str, dict[str, list[RLRun]]] = {}
    for run in rl_runs:
        start = f"{run.start.num_traces:,} traces" if run.start.num_traces else "the base model"
        name = short_name(run.start.model) + (", QLoRA" if run.start.method == QLORA else "")
        groups.setdefault(name, {}).setdefault(start, []).append(run)
    return groups


def rl_findings(rl_runs: Sequence[RLRun], length_of: str) -> list[str]:
    """Say of every start how accuracy and length change, and whether it ends below or above the base model.

    Seeds are paired. length_of: the benchmark whose responses' length counts.
    """
    lines = []
    for name, starts in by_start(rl_runs).items():
        reference = _shares(starts.get("the base model", ()), AFTER)
        for start, runs in starts.items():
            before, after = _shares(runs, BEFORE), _shares(runs, AFTER)
            gain = difference(after, before)
            change = (
                "rises"
                if gain.above_zero()
                else "falls"
                if gain.below_zero()
                else "does not change beyond chance"
            )
            lengths = [
                fmean(fmean(tokens(run.stages[stage], length_of).values()) for run in runs)
                for stage in (BEFORE, AFTER)
            ]
            line = (
                f"{_capital(name)}, reinforcement learning from {start}: accuracy {change}, {_mean(before)} to {_mean(after)}, and "
                f"the mean length of answers goes from {lengths[0]:,.0f} to {lengths[1]:,.0f} tokens"
            )
            if runs[0].start.num_traces and set(after) & set(reference):
                gap, looks = difference(after, reference), len(starts) - 1
                side = "above" if gap.above_zero(looks) else "below" if gap.below_zero(looks) else ""
                unknown = "whether it ends above or below the base model is not known"
                line += f"; {f'it ends {side} the base model' if side else unknown} ({points(gap)})"
            lines.append(f"{line}.")
    return lines


def _shares(rl_runs: Sequence[RLRun], stage: str) -> Mapping[int, ByQuestion]:
    return {run.start.seed: shares(run.stages[stage]) for run in rl_runs}


def _mean(seeds: Mapping[int, ByQuestion]) -> str:
    return percent(estimate(seeds, (0.0, 0.0, 1.0, 1.0)))

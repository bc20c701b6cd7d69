"""Sentences about a study: what was done, what its curves show, what reinforcement learning does.

Every sentence is computed: an arm falls, rises or recovers only if an interval says so.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from statistics import fmean

from kit.command_line import command_of
from kit.run import AFTER, BEFORE
from kit.valley.curves import ByQuestion, Curve, difference, estimate, percent, points
from kit.valley.finished import RLRun, StudyResults, shares, tokens
from kit.valley.study import ARMS, TITLES, short_name

BASE_START = "the base model"
LISTED = 4  # numbers of traces named one by one; of more, the smallest and the largest


def sentences(results: StudyResults) -> list[str]:
    """Return what a study says, model by model."""
    of_curves = [line for model in results.models for line in findings(results.curves(model))]
    of_rl = rl_findings(results.rl, results.length_benchmark)
    return of_curves + of_rl + ([smoke_hint()] if of_curves and results.is_short else [])


def what_was_done(results: StudyResults) -> str:
    """Describe a study in a sentence."""
    cells, models = results.cells, listed([short_name(model) for model in results.models])
    sizes = sorted({cell.num_traces for cell in cells if cell.arm == cells[0].arm})
    counts = f"{sizes[0]:,} to {sizes[-1]:,}"
    if len(sizes) <= LISTED:
        counts = listed([f"{size:,}" for size in sizes])
    be = "was" if len(results.models) == 1 else "were"
    if not {found.cell for found in results.finished}.issuperset(cells):
        be = "is being" if be == "was" else "are being"
    num_seeds = len({cell.seed for cell in cells})
    seeds = f", {num_seeds} times with other random choices (seeds)" if num_seeds > 1 else ""
    arms = listed([f"“{ARMS[arm].title}”" for arm in dict.fromkeys(cell.arm for cell in cells)])
    base = results.finished[0].results.values() if results.finished else ()
    asked = f" {sum(result.num_questions for result in base):,}" if base else ""
    return (
        f"{_capital(models)} {be} fine-tuned on {counts} traces (worked solutions to learn from: {arms})"
        f"{seeds}, with the same{asked} problems to answer before and after."
    )


def smoke_hint() -> str:
    """Return what to run after --smoke, which has too few traces for more than the fall."""
    return f"This was --smoke; `{command_of('demo')} --quick` tries more traces and shows the climb."


def what_came_out(curve: Curve, *, is_short: bool) -> str:
    """Describe what accuracy does along the first curve. is_short: the study is one of --smoke."""
    return accuracy_sentence(curve) + (f" {smoke_hint()}" if is_short else "")


def listed(words: Sequence[str]) -> str:
    """Join words for a sentence: a, b and c."""
    return " and ".join(filter(None, (", ".join(words[:-1]), *words[-1:])))


def findings(curves: Sequence[Curve]) -> list[str]:
    """Return two sentences per arm of one model, then how the other arms compare with the first."""
    lines = [line for curve in curves for line in (accuracy_sentence(curve), length_sentence(curve))]
    return lines + [comparison_sentence(curves[0], other) for other in curves[1:]]


def _capital(text: str) -> str:
    return text[0].upper() + text[1:]


def accuracy_sentence(curve: Curve) -> str:
    """Describe what accuracy does as the number of traces grows, by the curve's shape."""
    changes, low, last = curve.changes(), curve.points[curve.lowest], curve.points[-1]
    start, subject, shape = percent(curve.base.accuracy), f"{_capital(curve.name)}: accuracy", curve.shape

    if shape == "flat":
        most = max(changes, key=lambda change: abs(change.mean))
        at = curve.points[changes.index(most)].num_traces
        detail = f"{start} in the base model, and the largest difference is {points(most)}, at {at:,}"
        return f"{subject} does not change beyond chance at any number of traces: {detail}."

    if shape == "rising":
        best = max(range(len(changes)), key=lambda i: changes[i].mean)
        top, gain = curve.points[best], points(changes[best])
        rise = f"rises from {start} to {percent(top.accuracy)} at {top.num_traces:,} traces ({gain})"
        return f"{subject} {rise} and does not fall below the base model at any size."

    end, gap = f"{percent(last.accuracy)} at {last.num_traces:,}", points(changes[-1])
    fall = f"{subject} falls from {start} to {percent(low.accuracy)} at {low.num_traces:,} traces"
    if shape == "falling" and low is last:
        return f"{fall}, the most that were tried: there is no recovery in this range."
    if shape == "falling":
        return f"{fall} and does not climb back beyond chance: {end}."

    climb = f"{fall}, then climbs to {end}"
    if shape == "crossing":
        return f"{climb}, still below the base model ({gap})."
    if shape == "unclear":
        unknown = f"whether it is back at the base model's is not known ({gap})"
        return f"{climb}; {unknown}: that takes more seeds or questions."
    where = "above" if changes[-1].above_zero() else "indistinguishable from"
    return f"{climb}, {where} the base model ({gap}): the valley is crossed."


def length_sentence(curve: Curve) -> str:
    """Describe whether answers get longer, and shorter again."""
    start, looks = curve.base.length, len(curve.points)
    ratios = [point.length.mean / start.mean for point in curve.points]
    changes = [difference(point.tokens, curve.base.tokens, ()) for point in curve.points]
    longer = [i for i, change in enumerate(changes) if change.above_zero(looks)]
    longest = max(longer or range(looks), key=lambda i: ratios[i])
    peak, last, subject = curve.points[longest], curve.points[-1], f"{_capital(curve.name)}: answers"

    if not longer:
        most = f"at most {peak.length.text('.0f')}, at {peak.num_traces:,} traces"
        return (
            f"{subject} do not get longer beyond chance at any size ({start.mean:.0f} tokens before, {most})."
        )

    tokens_then = f"{start.mean:.0f} to {peak.length.mean:.0f} tokens"
    rise = f"{subject} get {ratios[longest]:.1f} times as long, at {peak.num_traces:,} traces ({tokens_then})"
    if peak is last:
        return f"{rise}, the most that were tried."
    end = f"{ratios[-1]:.1f} times at {last.num_traces:,} ({last.length.mean:.0f} tokens)"
    shrank = difference(peak.tokens, last.tokens, ()).above_zero(looks)
    return f"{rise}, and {'shorter again' if shrank else 'not shorter again beyond chance'}: {end}."


def comparison_sentence(first: Curve, other: Curve) -> str:
    """Name the sizes at which the other arm's accuracy is above or below the first's."""
    at = {point.num_traces: point for point in first.points}
    pairs = [(point, at[point.num_traces]) for point in other.points if point.num_traces in at]
    changes = {point.num_traces: difference(point.shares, same.shares) for point, same in pairs}
    if not changes:
        return f"{_capital(other.name)} and {first.name} have no size in common yet."

    looks, subject = len(changes), f"{_capital(other.name)}: accuracy"
    above = [f"{size:,} ({points(change)})" for size, change in changes.items() if change.above_zero(looks)]
    below = [f"{size:,} ({points(change)})" for size, change in changes.items() if change.below_zero(looks)]
    if not above and not below:
        return f"{subject} is indistinguishable from that of {first.name} at every size."
    sides = [("above", above), ("below", below)]
    parts = [f"{side} that of {first.name} at {', '.join(sizes)} traces" for side, sizes in sides if sizes]
    rest = " and indistinguishable at the others" if len(above) + len(below) < looks else ""
    return f"{subject} is {' and '.join(parts)}{rest}."


def by_start(rl_runs: Sequence[RLRun]) -> dict[str, dict[str, list[RLRun]]]:
    """Return model and method -> start -> its seeds, in the order of the runs."""
    groups: dict[str, dict[str, list[RLRun]]] = {}
    for run in rl_runs:
        start = f"{run.start.num_traces:,} traces" if run.start.num_traces else BASE_START
        name = short_name(run.start.model) + TITLES[run.start.method]
        groups.setdefault(name, {}).setdefault(start, []).append(run)
    return groups


def rl_findings(rl_runs: Sequence[RLRun], length_of: str) -> list[str]:
    """Describe how accuracy and length change from each start, and where it ends beside the base model.

    Seeds are paired. length_of: the benchmark whose responses' length counts.
    """
    lines = []
    for name, starts in by_start(rl_runs).items():
        reference = _shares(starts.get(BASE_START, ()), AFTER)
        for start, runs in starts.items():
            before, after = _shares(runs, BEFORE), _shares(runs, AFTER)
            gain = difference(after, before)
            change = "does not change beyond chance"
            change = "rises" if gain.above_zero() else "falls" if gain.below_zero() else change
            lengths = [_mean_length(runs, stage, length_of) for stage in (BEFORE, AFTER)]
            line = (
                f"{_capital(name)}, reinforcement learning from {start}: accuracy {change}, "
                f"{_mean(before)} to {_mean(after)}, and the mean length of answers goes from "
                f"{lengths[0]:,.0f} to {lengths[1]:,.0f} tokens"
            )

            if start != BASE_START and set(after) & set(reference):
                gap, looks = difference(after, reference), len(starts) - 1
                side = "above" if gap.above_zero(looks) else "below" if gap.below_zero(looks) else ""
                end = f"it ends {side}" if side else "it is not known whether it ends above or below"
                line += f"; {end} the base model ({points(gap)})"
            lines.append(f"{line}.")
    return lines


def _mean_length(runs: Sequence[RLRun], stage: str, length_of: str) -> float:
    return fmean(fmean(tokens(run.stages[stage], length_of).values()) for run in runs)


def _shares(rl_runs: Sequence[RLRun], stage: str) -> Mapping[int, ByQuestion]:
    return {run.start.seed: shares(run.stages[stage]) for run in rl_runs}


def _mean(seeds: Mapping[int, ByQuestion]) -> str:
    return percent(estimate(seeds, (0.0, 0.0, 1.0, 1.0)))

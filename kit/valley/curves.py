"""Curves over the number of traces, with intervals, and the sentences that follow from them.

A curve is said to fall, rise or recover only where an interval says so. Intervals are 95 %, over questions and seeds; where the
one of several sizes is looked at that differs most, what is called a change is held to a wider one (Bonferroni).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import NormalDist, fmean, stdev

from kit.evaluate.uncertainty import half_width

# question, or (benchmark, question) -> the mean over its samples: a share of right ones, or tokens
ByQuestion = Mapping[str | tuple[str, str], float]
# Student's t, 97.5th percentile, by degrees of freedom: the spread of two or three seeds is itself hardly known
STUDENT = {1: 12.706, 2: 4.303, 3: 3.182, 4: 2.776, 5: 2.571, 6: 2.447, 7: 2.365, 8: 2.306, 9: 2.262}


@dataclass(frozen=True)
class Estimate:
    """A mean with half the width of its 95 % interval."""

    mean: float
    half: float

    @property
    def low(self) -> float:
        return self.mean - self.half

    @property
    def high(self) -> float:
        return self.mean + self.half

    def __str__(self) -> str:
        return f"{self.mean:.3f} ± {self.half:.3f}"

    def above_zero(self, num_looks: int = 1) -> bool:
        """Whether it is above zero for certain; num_looks: how many such differences were looked at to pick this one."""
        return self.mean > widened(num_looks) * self.half

    def below_zero(self, num_looks: int = 1) -> bool:
        return -self.mean > widened(num_looks) * self.half


def widened(num_looks: int) -> float:
    """By how much a 95 % interval grows when it is one of num_looks that must all hold at once."""
    return NormalDist().inv_cdf(1 - 0.025 / num_looks) / 1.96


@dataclass(frozen=True)
class Point:
    """What was measured at one number of traces: a value a question for every seed, and the tokens of the answers likewise."""

    num_traces: int
    shares: Mapping[int, ByQuestion]  # seed -> question -> share of right samples
    tokens: Mapping[int, ByQuestion]  # seed -> question -> mean tokens

    @property
    def accuracy(self) -> Estimate:
        return estimate(self.shares, added=(0.0, 0.0, 1.0, 1.0))

    @property
    def length(self) -> Estimate:
        return estimate(self.tokens)


@dataclass(frozen=True)
class Curve:
    """One arm: the base model and a point per size, smallest first."""

    name: str  # as a sentence's subject: "long traces"
    base: Point
    points: Sequence[Point]

    def changes(self) -> list[Estimate]:
        """Accuracy minus the base model's, a size each."""
        return [difference(point.shares, self.base.shares) for point in self.points]

    @property
    def lowest(self) -> int:
        """Index of the size with the lowest accuracy, of those where it is known to be below the base model's if there are
        such: a size where the seeds disagree may have a lower mean. Of equals the smallest."""
        changes = self.changes()
        known = [i for i, change in enumerate(changes) if change.below_zero(len(changes))]
        return min(known or range(len(changes)), key=lambda i: self.points[i].accuracy.mean)

    @property
    def shape(self) -> str:
        """flat, rising, falling (ends where it is lowest, within chance), crossing (climbs, still below the start), valley (falls
        and climbs back to the start or above) or unclear (climbs, and its end is known too roughly to say whether it is back)."""
        changes = self.changes()
        looks = len(changes)
        if not changes[self.lowest].below_zero(looks):
            return "rising" if any(change.above_zero(looks) for change in changes) else "flat"
        if not self.climb.above_zero(looks):
            return "falling"
        if changes[-1].below_zero():
            return "crossing"
        return (
            "valley" if changes[-1].low > changes[self.lowest].mean / 2 else "unclear"
        )  # more than half is back for certain

    @property
    def climb(self) -> Estimate:
        """Accuracy at the last size minus that at the lowest."""
        return difference(self.points[-1].shares, self.points[self.lowest].shares)


def estimate(seeds: Mapping[int, ByQuestion], added: Sequence[float] = ()) -> Estimate:
    """The mean over seeds and questions. added: what is added to the questions for the width alone (kit.evaluate.uncertainty).

    A question named by a pair (benchmark, question) counts within its benchmark, and every benchmark counts the same.

    Its variance is the sum of two: over questions (of their means over the seeds) and, where there are several seeds, over seeds
    (of their means over the questions). What chance adds to both is counted twice: the interval errs on the wide side.
    """
    strata: dict[str, list] = {}
    for question in next(iter(seeds.values())):
        strata.setdefault(question[0] if isinstance(question, tuple) else "", []).append(question)
    of_seeds = [
        fmean(fmean(values[q] for q in stratum) for stratum in strata.values()) for values in seeds.values()
    ]
    halves = [
        half_width([fmean(values[q] for values in seeds.values()) for q in stratum], added)
        for stratum in strata.values()
    ]
    spread = 0.0
    if len(of_seeds) > 1:
        spread = STUDENT.get(len(of_seeds) - 1, 1.96) * stdev(of_seeds) / math.sqrt(len(of_seeds))
    return Estimate(fmean(of_seeds), math.hypot(math.hypot(*halves) / len(halves), spread))


def difference(
    after: Mapping[int, ByQuestion], before: Mapping[int, ByQuestion], added: Sequence[float] = (-1.0, 1.0)
) -> Estimate:
    """after - before, paired by question and seed. added: as in `estimate`; the default is for shares.

    Raises ValueError if they share no seed, or answered other questions.
    """
    common = [seed for seed in after if seed in before]
    if not common:
        raise ValueError(
            f"seeds {list(after)} and {list(before)} have none in common; measure both with the same seeds"
        )
    for seed in common:
        if after[seed].keys() != before[seed].keys():
            raise ValueError(
                f"seed {seed} answered {len(after[seed])} questions after and {len(before[seed])} before, not the same"
            )
    paired = {seed: {q: value - before[seed][q] for q, value in after[seed].items()} for seed in common}
    return estimate(paired, added)


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


def percent(value: Estimate) -> str:
    """A share with its interval."""
    return f"{100 * value.mean:.1f} % ± {100 * value.half:.1f}"


def _change(value: Estimate) -> str:
    return f"{100 * value.mean:+.1f} points ± {100 * value.half:.1f}"


def accuracy_sentence(curve: Curve) -> str:
    """What accuracy does as the traces grow in number, named by the curve's shape."""
    changes, low, last = curve.changes(), curve.points[curve.lowest], curve.points[-1]
    start, subject, shape = percent(curve.base.accuracy), _capital(curve.name), curve.shape
    if shape == "flat":
        most = max(changes, key=lambda change: abs(change.mean))
        at = curve.points[changes.index(most)].num_traces
        return (
            f"{subject}: accuracy does not change beyond chance at any number of traces (base model {start}; the largest "
            f"difference is {_change(most)}, at {at:,})."
        )
    if shape == "rising":
        best = max(range(len(changes)), key=lambda i: changes[i].mean)
        return (
            f"{subject}: accuracy rises from {start} to {percent(curve.points[best].accuracy)} at "
            f"{curve.points[best].num_traces:,} traces ({_change(changes[best])}) and falls below the base model at no size."
        )
    fall = (
        f"{subject}: accuracy falls from {start} to {percent(low.accuracy)} at {low.num_traces:,} traces "
        f"({_change(changes[curve.lowest])})"
    )
    if shape == "falling":
        if low is last:
            return f"{fall}, the most that were tried: there is no recovery in this range."
        return (
            f"{fall} and does not climb back beyond chance: {percent(last.accuracy)} at {last.num_traces:,} "
            f"({_change(curve.climb)} from the lowest)."
        )
    climb = f"{fall}, then climbs to {percent(last.accuracy)} at {last.num_traces:,} ({_change(curve.climb)} from the lowest)"
    if shape == "crossing":
        return f"{climb}, still below the base model ({_change(changes[-1])})."
    if shape == "unclear":
        return (
            f"{climb}; whether it is back at the base model's is not known ({_change(changes[-1])}): that takes more seeds "
            "or questions."
        )
    if changes[-1].above_zero():
        return f"{climb}, above the base model ({_change(changes[-1])}): the valley is crossed."
    return f"{climb}, where it cannot be told from the base model ({_change(changes[-1])}): the valley is crossed."


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
    above = [f"{size:,} ({_change(change)})" for size, change in pairs if change.above_zero(looks)]
    below = [f"{size:,} ({_change(change)})" for size, change in pairs if change.below_zero(looks)]
    parts = [
        f"{side} that of {first.name} at {', '.join(sizes)} traces"
        for side, sizes in (("above", above), ("below", below))
        if sizes
    ]
    if not parts:
        return f"{_capital(other.name)}: accuracy cannot be told from that of {first.name} at any size."
    rest = " and not to be told apart at the others" if len(above) + len(below) < looks else ""
    return f"{_capital(other.name)}: accuracy is {' and '.join(parts)}{rest}."

"""Curves over the number of traces, with intervals, and their shapes.

A curve falls, rises or recovers only if an interval says so. Intervals are 95 %, over questions and seeds. If
the size that differs most is picked from several, a change must clear a wider interval (Bonferroni).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import NormalDist, fmean

from kit.evaluate.uncertainty import half_width, in_percent

# question, or (benchmark, question) -> the mean over its samples: the share of right ones, or tokens
ByQuestion = Mapping[str | tuple[str, str], float]


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

    def text(self, form: str) -> str:
        """Return it as 12.3 ± 4.5; without the ± if that is infinite, as for a single question."""
        half = f" ± {self.half:{form.removeprefix('+')}}" if math.isfinite(self.half) else ""
        return f"{self.mean:{form}}{half}"

    def above_zero(self, num_looks: int = 1) -> bool:
        """Return whether it is certainly above zero. num_looks: differences that it was picked from."""
        return self.mean > widened(num_looks) * self.half

    def below_zero(self, num_looks: int = 1) -> bool:
        return -self.mean > widened(num_looks) * self.half


def widened(num_looks: int) -> float:
    """Return the factor by which a 95 % interval grows if num_looks of them must hold at once."""
    return NormalDist().inv_cdf(1 - 0.025 / num_looks) / 1.96


@dataclass(frozen=True)
class Point:
    """What was measured at one number of traces: accuracy and length, per question and seed."""

    num_traces: int
    shares: Mapping[int, ByQuestion]  # seed -> question -> share of right samples
    tokens: Mapping[int, ByQuestion]  # seed -> question -> mean tokens
    paper_shares: Mapping[int, ByQuestion] | None = None  # as shares, by the paper's grading; None: not known

    @property
    def accuracy(self) -> Estimate:
        return estimate(self.shares, added=(0.0, 0.0, 1.0, 1.0))

    @property
    def paper_accuracy(self) -> Estimate | None:
        """Accuracy as the paper graded; None if the logs do not have that verdict."""
        return estimate(self.paper_shares, added=(0.0, 0.0, 1.0, 1.0)) if self.paper_shares else None

    @property
    def length(self) -> Estimate:
        return estimate(self.tokens)


@dataclass(frozen=True)
class Curve:
    """One arm of one model: the base model and a point per size, at least one, smallest first."""

    name: str  # as a sentence's subject: "tiny, long traces"
    base: Point
    points: Sequence[Point]

    def changes(self) -> list[Estimate]:
        """Return accuracy minus the base model's, per size."""
        return [difference(point.shares, self.base.shares) for point in self.points]

    @property
    def lowest(self) -> int:
        """Index of the size with the lowest accuracy; of equals, the smallest size.

        Sizes that are certainly below the base model come first: one at which the seeds disagree may have a
        lower mean.
        """
        changes = self.changes()
        known = [i for i, change in enumerate(changes) if change.below_zero(len(changes))]
        return min(known or range(len(changes)), key=lambda i: self.points[i].accuracy.mean)

    @property
    def shape(self) -> str:
        """flat, rising, falling, crossing, valley or unclear.

        falling: ends at its lowest, within chance. crossing: climbs, but is still below the start. valley:
        climbs back to the start or above. unclear: climbs, but its end is known too roughly to say whether
        it is back.
        """
        changes = self.changes()
        looks = len(changes)
        if not changes[self.lowest].below_zero(looks):
            return "rising" if any(change.above_zero(looks) for change in changes) else "flat"
        if not self.recovery.above_zero(looks):
            return "falling"
        if changes[-1].below_zero():
            return "crossing"
        # more than half of the loss, for certain
        mostly_back = changes[-1].low > changes[self.lowest].mean / 2
        return "valley" if mostly_back else "unclear"

    @property
    def recovery(self) -> Estimate:
        """Accuracy at the last size minus that at the lowest."""
        return difference(self.points[-1].shares, self.points[self.lowest].shares)


def estimate(seeds: Mapping[int, ByQuestion], added: Sequence[float] = ()) -> Estimate:
    """Return the mean over seeds and questions, with its interval.

    A question named by a pair (benchmark, question) counts within its benchmark, and every benchmark counts
    the same. added: values that widen the interval (kit.evaluate.uncertainty).

    The variance is the sum of two: over questions (of their means over the seeds) and, if there are several
    seeds, over seeds (of their means over the questions). Chance is counted in both, so the interval errs on
    the wide side.
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
    spread = half_width(of_seeds, ()) if len(of_seeds) > 1 else 0.0
    return Estimate(fmean(of_seeds), math.hypot(math.hypot(*halves) / len(halves), spread))


def difference(
    after: Mapping[int, ByQuestion], before: Mapping[int, ByQuestion], added: Sequence[float] = (-1.0, 1.0)
) -> Estimate:
    """Return after - before, paired by question and seed. added: as in `estimate`; the default is for shares.

    Raises ValueError if they share no seed, or answered other questions.
    """
    common = [seed for seed in after if seed in before]
    if not common:
        raise ValueError(
            f"seeds {list(after)} and {list(before)} have none in common; measure both with the same seeds"
        )
    for seed in common:
        if after[seed].keys() != before[seed].keys():
            counts = f"{len(after[seed])} questions after and {len(before[seed])} before"
            raise ValueError(f"seed {seed} answered {counts}, not the same")
    paired = {seed: {q: value - before[seed][q] for q, value in after[seed].items()} for seed in common}
    return estimate(paired, added)


def percent(value: Estimate) -> str:
    """Return a share with its interval, in percent."""
    return in_percent(value.mean, value.half)


def points(value: Estimate) -> str:
    """Return a difference of shares with its interval, in points: -87.0 points, -95.9 to -78.1."""
    low, high = max(-1.0, value.low), min(1.0, value.high)
    return f"{100 * value.mean:+.1f} points, {100 * low:+.1f} to {100 * high:+.1f}"

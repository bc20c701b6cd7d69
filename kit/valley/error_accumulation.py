"""Why accuracy moves: the steps of one arm's answers, the fit accuracy ~ p^n, and sentences about both.

The paper's account is that longer answers give errors more places to accumulate. Here a step's chance p of
being right is counted from the steps themselves, so that accumulation can be told apart from what else goes
wrong: format, truncation, loops.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean, median

from kit.evaluate.results import Result
from kit.valley.curves import ByQuestion, Estimate, estimate, percent, points
from kit.valley.first_error import CAUSES, Anatomy, dissect

WRONG_STEP = ("a sum is wrong", "another step")  # of CAUSES: what p counts
Rows = Sequence[tuple[int, dict, Anatomy]]  # (seed, row of the log, what its answer shows)


@dataclass(frozen=True)
class Decomposition:
    """What the answers at one point show, over questions and seeds; shares in 0..1."""

    num_traces: int
    accuracy: Estimate
    step_accuracy: Estimate  # p: the share of right steps among those with only right ones before them
    predicted: Estimate  # accuracy if nothing else went wrong: the mean of p^n, n the problem's steps
    residual: Estimate  # accuracy - predicted
    equation_accuracy: Estimate  # share of true equations, including checks and what was taken back
    operations: Estimate  # per answer, including checks
    rows: Rows  # what all of this is computed from
    causes: Mapping[str, float]  # share of all answers that are wrong and have this first, of CAUSES
    saved: float  # share of all answers that are right although something in them is wrong
    looping: float
    truncated: float
    corrections: float  # per answer
    checks: float  # per answer

    @property
    def num_needed(self) -> float:
        """Mean operations of a problem."""
        return fmean(found.num_steps for _, _, found in self.rows)

    @property
    def with_wrong(self) -> float:
        """Share of the answers with a wrong operation."""
        return fmean(bool(found.wrong) for _, _, found in self.rows)

    @property
    def right_all_the_same(self) -> float:
        """Share of the answers that are right although an operation in them is wrong."""
        return fmean(row["verdict"] == "correct" and bool(found.wrong) for _, row, found in self.rows)

    @property
    def first_wrong(self) -> float | None:
        """Which operation of an answer is the first wrong one, as a median over answers; None without any."""
        places = [found.right_steps + 1 for _, _, found in self.rows if found.wrong]
        return median(places) if places else None

    @property
    def has_steps(self) -> bool:
        return any(found.equations for _, _, found in self.rows)


def decompose(
    num_traces: int, results: Mapping[int, Result], dissect: Callable[..., Anatomy] = dissect
) -> Decomposition:
    """Check the steps of all answers at one point.

    results: seed -> its samples. dissect: reads one answer, as kit.valley.first_error's do; the default is
    the toy's.
    """
    rows = [
        (seed, row, dissect(row["problem"], row["text"], finished=row["finished"]))
        for seed, result in results.items()
        for row in result.rows
    ]

    def by_question(value_of) -> dict[int, dict[str, float]]:
        return _sums(rows, value_of, mean=True)

    def tried_steps(_, found: Anatomy) -> int:
        return found.right_steps + (found.cause in WRONG_STEP)

    step_accuracy = ratio(rows, lambda _, found: found.right_steps, tried_steps)
    right = by_question(lambda row, _: row["verdict"] == "correct")
    guess = by_question(lambda _, found: step_accuracy.mean**found.num_steps)
    rest = {seed: {name: right[seed][name] - guess[seed][name] for name in right[seed]} for seed in right}
    wrong = Counter(found.cause for _, row, found in rows if row["verdict"] != "correct")
    return Decomposition(
        num_traces=num_traces,
        accuracy=estimate(right, (0.0, 0.0, 1.0, 1.0)),
        step_accuracy=step_accuracy,
        predicted=estimate(guess),
        residual=estimate(rest, (-1.0, 1.0)),
        equation_accuracy=ratio(
            rows, lambda _, found: found.num_right, lambda _, found: len(found.equations)
        ),
        operations=estimate(by_question(lambda _, found: found.num_operations)),
        rows=rows,
        causes={cause: wrong[cause] / len(rows) for cause in CAUSES},
        saved=fmean(row["verdict"] == "correct" and found.cause != "" for _, row, found in rows),
        looping=fmean(found.looping for _, _, found in rows),
        truncated=fmean(not row["finished"] for _, row, _ in rows),
        corrections=fmean(found.num_corrections for _, _, found in rows),
        checks=fmean(found.num_checks for _, _, found in rows),
    )


def _sums(rows: Rows, value_of, *, mean: bool) -> dict[int, dict[str, float]]:
    """Return seed -> question -> the sum, or the mean, over its samples."""
    groups: dict[int, dict[str, list[float]]] = {}
    for seed, row, found in rows:
        groups.setdefault(seed, {}).setdefault(row["question"], []).append(float(value_of(row, found)))
    total = fmean if mean else sum
    return {seed: {q: total(values) for q, values in of_seed.items()} for seed, of_seed in groups.items()}


def deviations(rows: Rows, top_of, bottom_of) -> tuple[float, dict[int, ByQuestion]]:
    """Return sum(top) / sum(bottom), and by how much each question moves it (its linearisation).

    The ratio is 0 if bottom is 0 throughout.
    """
    top, bottom = _sums(rows, top_of, mean=False), _sums(rows, bottom_of, mean=False)
    total = sum(sum(values.values()) for values in bottom.values())
    share = sum(sum(values.values()) for values in top.values()) / total if total else 0.0
    each = total / sum(map(len, bottom.values())) or 1.0
    moves = {seed: {q: (top[seed][q] - share * bottom[seed][q]) / each for q in top[seed]} for seed in top}
    return share, moves


def ratio(rows: Rows, top_of, bottom_of) -> Estimate:
    """Return the ratio of two totals, such as right steps over steps, with its interval."""
    share, moves = deviations(rows, top_of, bottom_of)
    return Estimate(share, estimate(moves).half)


def length_alone(base: Decomposition, point: Decomposition) -> float:
    """Return this point's accuracy if each of its operations were as reliable as the base model's.

    That is what longer answers by themselves would make of it.
    """
    return fmean(base.equation_accuracy.mean**found.num_operations for _, _, found in point.rows)


def explain(base: Decomposition, points: Sequence[Decomposition]) -> list[str]:
    """Return why the accuracy of one arm moves, in sentences. points: one per size, smallest first."""
    low = min(points, key=lambda point: point.accuracy.mean)
    sentences = [_fit_sentence(base, low)]
    if low.accuracy.high < base.accuracy.low:
        sentences.append(_length_sentence(base, low))
    if any(sum(point.causes.values()) for point in points):
        sentences.append(_cause_sentence(points))
    return sentences


def _fit_sentence(base: Decomposition, low: Decomposition) -> str:
    certain = low.residual.above_zero() or low.residual.below_zero()
    return (
        f"A step is right with p = {percent(base.step_accuracy)} in the base model and "
        f"{percent(low.step_accuracy)} at {low.num_traces:,} traces, where accuracy is lowest. If all steps "
        f"were alike and nothing else went wrong, all n steps of a problem would be right with probability "
        f"p^n: {percent(low.predicted)}. Measured is {percent(low.accuracy)}, "
        f"{'a difference' if certain else 'the same within chance'} ({points(low.residual)})."
    )


def _length_sentence(base: Decomposition, low: Decomposition) -> str:
    lost = base.accuracy.mean - low.accuracy.mean
    rest = "Single operations have become worse, or something else has"
    performed = f"{low.operations.text('.1f')} operations"
    if low.operations.mean <= base.operations.mean:
        return (
            f"Length explains nothing of the fall: answers perform {performed}, no more than the "
            f"{base.operations.mean:.1f} before. {rest}."
        )
    by_length = base.accuracy.mean - min(base.accuracy.mean, length_alone(base, low))
    share = (
        "most" if by_length > lost / 2 else "the smaller part" if by_length > lost / 10 else "next to nothing"
    )
    return (
        f"Longer answers by themselves explain {share} of the fall. Answers perform {performed}, against "
        f"{base.operations.mean:.1f} before. If these were as reliable as the base model's "
        f"({100 * base.equation_accuracy.mean:.1f} % of its equations are true), this would cost "
        f"{100 * by_length:.1f} of the {100 * lost:.1f} points that were lost. {rest}, too."
    )


def _cause_sentence(points: Sequence[Decomposition]) -> str:
    parts = []
    for point in points:
        if wrong := sum(point.causes.values()):
            share, cause = max((share, cause) for cause, share in point.causes.items())
            parts.append(f"{cause} at {point.num_traces:,} ({100 * share / wrong:.0f} %)")
    cut, looping = max(point.truncated for point in points), max(point.looping for point in points)
    return (
        f"What most often goes wrong first, and its share of the wrong answers: {', '.join(parts)}. "
        f"At any size at most {100 * cut:.0f} % of the answers are cut off, and at most "
        f"{100 * looping:.0f} % end in a loop."
    )

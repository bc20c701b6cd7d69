"""Why accuracy moves: the answers of one arm taken apart, the fit acc ~ p^n and what it leaves over, and sentences about both.

The paper's account is that longer answers give errors more places to accumulate. Here a step's chance p of
being right is counted from the steps themselves, so that what accumulates can be told from what else goes
wrong: format, truncation, loops.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean

from kit.evaluate.results import Result
from kit.valley.curves import ByQuestion, Estimate, estimate, percent
from kit.valley.first_error import CAUSES, Anatomy, dissect

WRONG_STEP = ("a sum is wrong", "another step")  # of CAUSES: what p counts


@dataclass(frozen=True)
class Decomposition:
    """What the answers at one point show, over questions and seeds; shares in 0..1."""

    num_traces: int
    accuracy: Estimate
    step_accuracy: Estimate  # p: right steps, of those that had only right ones before them
    predicted: (
        Estimate  # accuracy if that were all, and every step alike: the mean of p^n, n the problem's steps
    )
    residual: Estimate  # accuracy - predicted
    equation_accuracy: Estimate  # share of true equations, checks and what was taken back and all
    operations: Estimate  # that an answer performs, checks and all
    counts: Sequence[int]  # the same, an answer each
    causes: Mapping[str, float]  # share of all answers that are wrong and have this first, of CAUSES
    saved: float  # share of all answers that are right although something in them is wrong
    reflection: Estimate
    reflection_tokens: (
        Estimate | None
    )  # mean length of answers with a recheck minus that of those without; None without both
    looping: float
    truncated: float
    corrections: float  # an answer
    checks: float  # an answer


def decompose(
    num_traces: int, results: Mapping[int, Result], dissect: Callable[..., Anatomy] = dissect
) -> Decomposition:
    """Take apart all answers of one point. results: seed -> its samples. dissect: for other problems than the toy's."""
    rows = [(seed, row, dissect(row["problem"], row["text"], finished=row["finished"]))
            for seed, result in results.items() for row in result.rows]  # fmt: skip

    def by_question(value_of) -> dict[int, dict[str, float]]:
        return _sums(rows, value_of, mean=True)

    step_accuracy = ratio(rows, lambda _, found: found.right_steps,
                          lambda _, found: found.right_steps + (found.cause in WRONG_STEP))  # fmt: skip
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
        equation_accuracy=ratio(rows, lambda _, found: found.num_equations - found.num_false,
                                lambda _, found: found.num_equations),
        operations=estimate(by_question(lambda _, found: found.num_operations)),
        counts=[found.num_operations for _, _, found in rows],
        causes={cause: wrong[cause] / len(rows) for cause in CAUSES},
        saved=fmean(row["verdict"] == "correct" and found.cause != "" for _, row, found in rows),
        reflection=estimate(by_question(lambda _, found: found.reflects), (0.0, 0.0, 1.0, 1.0)),
        reflection_tokens=_reflection_tokens(rows),
        looping=fmean(found.looping for _, _, found in rows),
        truncated=fmean(not row["finished"] for _, row, _ in rows),
        corrections=fmean(found.num_corrections for _, _, found in rows),
        checks=fmean(found.num_checks for _, _, found in rows),
    )  # fmt: skip


Rows = Sequence[tuple[int, dict, Anatomy]]  # (seed, row of the log, the answer taken apart)


def _sums(rows: Rows, value_of, *, mean: bool) -> dict[int, dict[str, float]]:
    """seed -> question -> the sum, or the mean, over its samples."""
    groups: dict[int, dict[str, list[float]]] = {}
    for seed, row, found in rows:
        groups.setdefault(seed, {}).setdefault(row["question"], []).append(float(value_of(row, found)))
    return {
        seed: {q: fmean(v) if mean else sum(v) for q, v in of_seed.items()}
        for seed, of_seed in groups.items()
    }


def _deviations(rows: Rows, top_of, bottom_of) -> tuple[float, dict[int, ByQuestion]]:
    """sum(top) / sum(bottom), and by how much each question moves it (its linearisation); 0 where bottom is 0 throughout."""
    top, bottom = _sums(rows, top_of, mean=False), _sums(rows, bottom_of, mean=False)
    total = sum(sum(values.values()) for values in bottom.values())
    share = sum(sum(values.values()) for values in top.values()) / total if total else 0.0
    each = total / sum(map(len, bottom.values())) or 1.0
    return share, {
        seed: {q: (top[seed][q] - share * bottom[seed][q]) / each for q in top[seed]} for seed in top
    }


def ratio(rows: Rows, top_of, bottom_of) -> Estimate:
    """The ratio of two totals, such as right steps over steps, with its interval over questions and seeds."""
    share, deviations = _deviations(rows, top_of, bottom_of)
    return Estimate(share, estimate(deviations).half)


def _reflection_tokens(rows: Rows) -> Estimate | None:
    if len({found.reflects for _, _, found in rows}) < 2:
        return None
    means, moves = zip(*(
        _deviations(rows, lambda row, found, kind=kind: row["tokens"] * (found.reflects == kind),
                    lambda _, found, kind=kind: found.reflects == kind)
        for kind in (True, False)
    ), strict=True)  # fmt: skip
    both = {seed: {q: moves[0][seed][q] - moves[1][seed][q] for q in moves[0][seed]} for seed in moves[0]}
    return Estimate(means[0] - means[1], estimate(both).half)


def length_alone(base: Decomposition, point: Decomposition) -> float:
    """Accuracy of answers with as many operations as this point's, were each as reliable as the base model's: what longer
    answers by themselves make of it."""
    return fmean(base.equation_accuracy.mean**count for count in point.counts)


def explain(base: Decomposition, points: Sequence[Decomposition]) -> list[str]:
    """What the answers of one arm say about why its accuracy moves; points: a size each, smallest first."""
    low = min(points, key=lambda point: point.accuracy.mean)
    at = f"at {low.num_traces:,} traces, where accuracy is lowest"
    sentences = [_fit_sentence(base, low, at)]
    if low.accuracy.high < base.accuracy.low:
        sentences.append(_length_sentence(base, low))
    if any(sum(point.causes.values()) for point in points):
        sentences.append(_cause_sentence(points))
    sentences.append(_reflection_sentence(base, points))
    return sentences


def _fit_sentence(base: Decomposition, low: Decomposition, at: str) -> str:
    certain = low.residual.above_zero() or low.residual.below_zero()
    return (
        f"A step is right with p = {base.step_accuracy} in the base model and {low.step_accuracy} {at}. Were every step "
        f"alike and nothing else wrong, answers would be right with p^n, n the problem's steps: {percent(low.predicted)}; "
        f"measured {percent(low.accuracy)}, {'a difference of' if certain else 'the same within chance:'} "
        f"{100 * low.residual.mean:+.1f} points ± {100 * low.residual.half:.1f}."
    )


def _length_sentence(base: Decomposition, low: Decomposition) -> str:
    lost = base.accuracy.mean - low.accuracy.mean
    if low.operations.mean <= base.operations.mean:
        return (
            f"Length explains nothing of the fall: answers perform {low.operations.mean:.1f} operations "
            f"(± {low.operations.half:.1f}), no more than the {base.operations.mean:.1f} before. Each operation has become "
            "worse, or something else."
        )
    by_length = base.accuracy.mean - min(base.accuracy.mean, length_alone(base, low))
    share = (
        "most" if by_length > lost / 2 else "the smaller part" if by_length > lost / 10 else "next to nothing"
    )
    return (
        f"Longer answers by themselves explain {share} of the fall: {low.operations.mean:.1f} operations an answer "
        f"(± {low.operations.half:.1f}) against {base.operations.mean:.1f} before, were they as reliable as the base "
        f"model's ({percent(base.equation_accuracy)} of its equations are true), would cost {100 * by_length:.1f} of the "
        f"{100 * lost:.1f} points that were lost. The rest is that each operation has become worse, or something else."
    )


def _cause_sentence(points: Sequence[Decomposition]) -> str:
    parts = []
    for point in points:
        wrong = sum(point.causes.values())
        if wrong:
            share, cause = max((share, cause) for cause, share in point.causes.items())
            parts.append(f"{cause} at {point.num_traces:,} ({100 * share / wrong:.0f} %)")
    cut, looping = max(point.truncated for point in points), max(point.looping for point in points)
    return (
        f"What most often goes wrong first, and its share of the wrong answers: {', '.join(parts)}. At most {100 * cut:.0f} % of "
        f"the answers at any size are cut off, at most {100 * looping:.0f} % end in a loop."
    )


def _reflection_sentence(base: Decomposition, points: Sequence[Decomposition]) -> str:
    first, last = points[0], points[-1]
    said = (
        f"Answers with a recheck: {percent(base.reflection)} before, {percent(first.reflection)} after {first.num_traces:,} "
        f"traces, {percent(last.reflection)} after {last.num_traces:,}."
    )
    lengths = [
        (point.num_traces, point.reflection_tokens) for point in points if point.reflection_tokens is not None
    ]
    if not lengths:
        return (
            f"{said} At no size are there answers with and without one, so their lengths cannot be compared."
        )
    listed = ", ".join(f"{tokens.mean:+.0f} ± {tokens.half:.0f} at {size:,}" for size, tokens in lengths)
    return f"{said} By how many tokens those are longer than the others, where there are both: {listed}."

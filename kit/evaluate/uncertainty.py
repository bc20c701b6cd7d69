"""Statistics of few questions with several samples each: one interval, pass@k, lengths.

The questions are the random draw; the samples of one question are not independent of each other. So every
interval here is over questions, and each question counts as one number, its share of correct samples.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from statistics import fmean, median, pstdev, stdev

# Student's t, 97.5th percentile, by degrees of freedom: the spread of two or three values is itself poorly
# known
STUDENT = {1: 12.706, 2: 4.303, 3: 3.182, 4: 2.776, 5: 2.571, 6: 2.447, 7: 2.365, 8: 2.306, 9: 2.262}


def half_width(values: Iterable[float], added: Sequence[float] = (0.0, 0.0, 1.0, 1.0)) -> float:
    """Return half the width of a 95 % interval around a mean over questions.

    values: one number per question, for example its share of correct samples or the difference of two such
    shares. That makes the interval right for k samples per question: Wilson's would count the k samples as k
    questions. A bootstrap over questions agrees where there are many (within 5 % on 1,319), but sees no
    spread if all questions are alike and is too narrow below about 20.
    added: values that keep 0 of 8 from being 0 for certain: the two right and two wrong questions of Agresti
    and Coull (1998); for differences -1 and 1 (Bonett and Price, 2012). Their interval, 1.96 standard errors,
    lies around the mean with the added values. This one lies around the mean without them and reaches as far
    as the farther end of theirs. Without added values it is Student's, and infinite for a single question.
    """
    values = [*values]
    if added:
        wider = [*values, *added]
        return 1.96 * pstdev(wider) / math.sqrt(len(wider)) + abs(fmean(wider) - fmean(values))
    if len(values) < 2:
        return math.inf
    df = len(values) - 1
    t = STUDENT.get(df, 1.96 + 2.372 / df + 2.822 / df**2)  # Abramowitz and Stegun, 26.7.5
    return t * stdev(values) / math.sqrt(len(values))


def in_percent(share: float, half: float, unit: str = " %", sign: str = "") -> str:
    """Return a share with its 95 % interval, in percent: 99.0 % (94.3 to 100.0).

    The interval ends where shares do, at 0 and 100; that of a difference, which has a sign ("+"), at -100.
    """
    low, high = max(-1.0 if sign else 0.0, share - half), min(1.0, share + half)
    return f"{100 * share:{sign}.1f}{unit} ({100 * low:{sign}.1f} to {100 * high:{sign}.1f})"


def pass_at_k(num_samples: int, num_correct: int, k: int) -> float:
    """Return the probability that k of the samples, drawn without replacement, include a correct one.

    It is an unbiased estimate for k fresh samples (Chen et al., 2021). Raises ValueError for more than there
    are.
    """
    if not 1 <= k <= num_samples:
        raise ValueError(
            f"k is {k} but there are {num_samples} samples per question; pass 1 <= k <= {num_samples}"
        )
    return 1 - math.comb(num_samples - num_correct, k) / math.comb(num_samples, k)


@dataclass(frozen=True)
class Lengths:
    """Tokens per response. Without responses, all but the count are None."""

    count: int  # responses
    mean: float | None
    median: float | None
    p90: float | None  # the smallest length that at least nine tenths of the responses do not exceed

    @classmethod
    def of(cls, tokens: Sequence[int]) -> Lengths:
        if not tokens:
            return cls(0, None, None, None)
        return cls(len(tokens), fmean(tokens), median(tokens), sorted(tokens)[-(-9 * len(tokens) // 10) - 1])

"""Statistics of few questions with several samples each: intervals, pass@k, the paired bootstrap, percentiles.

A question is what was drawn at random; its samples are not. So every interval here is taken over questions, each of which counts
by one number, its share of correct samples.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean, median, pstdev

import torch

RESAMPLES = 10_000  # of the bootstrap: the ends of a 95 % interval then move by about 1 % of its width from seed to seed
CHUNK = 1_000  # resamples drawn at once, which bounds memory: 1,000 x 1,319 indices are 11 MB


def half_width(values: Sequence[float], added: Sequence[float] = (0.0, 0.0, 1.0, 1.0)) -> float:
    """Half the width of the 95 % interval of the mean: 1.96 standard errors of `values` with the added ones.

    Two right and two wrong questions are added for the width alone (Agresti & Coull, 1998): 0 of 8 is not 0 for certain.
    """
    values = [*values, *added]
    return 1.96 * pstdev(values) / math.sqrt(len(values))


def pass_at_k(num_samples: int, num_correct: int, k: int) -> float:
    """The probability that k of the samples, drawn without replacement, hold a correct one: unbiased for k fresh samples
    (Chen et al., 2021). Raises ValueError for more than there are."""
    if not 1 <= k <= num_samples:
        raise ValueError(
            f"k is {k} but there are {num_samples} samples per question; pass 1 <= k <= {num_samples}"
        )
    return 1 - math.comb(num_samples - num_correct, k) / math.comb(num_samples, k)


@dataclass(frozen=True)
class Difference:
    """A mean difference with its 95 % interval by the bootstrap."""

    mean: float
    low: float
    high: float


def bootstrap(differences: Sequence[float], *, seed: int = 0) -> Difference:
    """The paired bootstrap: questions drawn anew with replacement, RESAMPLES times; the 2.5th and 97.5th percentiles of the mean.

    differences: after - before, a question each. Where all are equal it sees no spread at all, and with fewer than about 20
    questions it is too narrow: trust kit.evaluate.paired_difference there.
    """
    generator = torch.Generator().manual_seed(seed)
    values = torch.tensor(differences, dtype=torch.float64)
    means = torch.cat([
        values[torch.randint(len(values), (CHUNK, len(values)), generator=generator)].mean(1) for _ in range(RESAMPLES // CHUNK)
    ])  # fmt: skip
    low, high = means.quantile(torch.tensor([0.025, 0.975], dtype=torch.float64)).tolist()
    return Difference(fmean(differences), low, high)


@dataclass(frozen=True)
class Lengths:
    """Tokens a response."""

    count: int  # responses
    mean: float | None  # None if there are none, as all that follow
    median: float | None
    p90: float | None  # the smallest length that at least nine tenths of the responses do not exceed

    @classmethod
    def of(cls, tokens: Sequence[int]) -> Lengths:
        if not tokens:
            return cls(0, None, None, None)
        return cls(len(tokens), fmean(tokens), median(tokens), sorted(tokens)[-(-9 * len(tokens) // 10) - 1])

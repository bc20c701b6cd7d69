import itertools
import math

import pytest
import torch

from kit.evaluate.uncertainty import Lengths, half_width, pass_at_k


@pytest.mark.parametrize(("n", "c"), [(1, 0), (1, 1), (4, 1), (5, 3), (8, 8), (6, 0)])
def test_pass_at_k_is_the_share_of_all_draws_of_k_that_hold_a_correct_sample(n, c):
    samples = [True] * c + [False] * (n - c)
    for k in range(1, n + 1):
        draws = list(itertools.combinations(samples, k))
        assert pass_at_k(n, c, k) == pytest.approx(sum(map(any, draws)) / len(draws))


@pytest.mark.parametrize("k", [0, 5])
def test_more_draws_than_samples_are_refused(k):
    with pytest.raises(ValueError, match=f"k is {k} but there are 4 samples"):
        pass_at_k(4, 1, k)


def test_pass_at_k_is_unbiased():
    """Over every outcome of n fresh samples, its mean is the true 1 - (1 - p)^k."""
    n, k, p = 6, 3, 0.2
    mean = sum(math.comb(n, c) * p**c * (1 - p) ** (n - c) * pass_at_k(n, c, k) for c in range(n + 1))
    assert mean == pytest.approx(1 - (1 - p) ** k)


def test_the_interval_agrees_with_a_bootstrap_over_questions_where_there_are_many():
    differences = torch.tensor([((i * 7919) % 5 - 2) / 2 for i in range(1_319)], dtype=torch.float64)
    draws = torch.randint(1_319, (4_000, 1_319), generator=torch.Generator().manual_seed(0))
    low, high = (
        differences[draws].mean(1).quantile(torch.tensor([0.025, 0.975], dtype=torch.float64)).tolist()
    )
    # the percentiles' own error is 1 to 2 %
    assert half_width(differences.tolist(), added=()) == pytest.approx((high - low) / 2, rel=0.05)


@pytest.mark.parametrize("n", [5, 10, 30, 40])
def test_of_few_questions_at_least_nine_in_ten_intervals_hold_the_truth_whatever_it_is(n):
    """Exactly, over every outcome; at five questions, 88 in 100."""
    halves = [half_width([1.0] * right + [0.0] * (n - right)) for right in range(n + 1)]
    for p in (i / 500 for i in range(1, 500)):
        chances = [math.comb(n, right) * p**right * (1 - p) ** (n - right) for right in range(n + 1)]
        held = sum(chances[i] for i in range(n + 1) if abs(i / n - p) <= halves[i])
        assert held >= (0.88 if n == 5 else 0.9), p


def test_two_questions_that_are_lost_are_no_certain_fall_and_six_are():
    assert half_width([-1.0] * 2, (-1.0, 1.0)) > 1 > half_width([-1.0] * 6, (-1.0, 1.0))


def test_of_numbers_that_are_no_shares_the_interval_is_students():
    assert half_width([7.0], ()) == math.inf
    assert half_width([1.0, 3.0], ()) == 12.706
    eleven = [0.0] * 5 + [1.0] * 6
    assert half_width(eleven, ()) == pytest.approx(2.2281 * math.sqrt(6 * 5 / 11 / 10 / 11), rel=2e-3)


def test_lengths_are_mean_median_and_the_length_nine_tenths_do_not_exceed():
    assert Lengths.of([5]) == Lengths(1, 5, 5, 5)
    assert Lengths.of(list(range(10, 0, -1))) == Lengths(10, 5.5, 5.5, 9)
    assert Lengths.of(list(range(1, 12))).p90 == 10  # 9 of 11 are fewer than nine tenths
    assert Lengths.of([]) == Lengths(0, None, None, None)

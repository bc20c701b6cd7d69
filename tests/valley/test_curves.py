"""The sentences follow from the curves: invented ones of every shape, and pure chance."""

import random

import pytest

from kit.valley.curves import Curve, Estimate, Point, difference, estimate
from kit.valley.sentences import comparison_sentence, findings

SIZES = (16, 64, 256, 1_024)


def point(size, accuracy, tokens=40.0, *, seeds=3, questions=80, spread=0.0, seed=0):
    """Draw four samples per question, all right with the same chance. spread: between the seeds' chances."""
    rng = random.Random(f"{size} {accuracy} {seed}")
    names = [f"q{i}" for i in range(questions)]
    shares, lengths = {}, {}
    for s in range(seeds):
        level = min(1.0, max(0.0, accuracy + spread * (s - (seeds - 1) / 2)))
        shares[s] = {name: sum(rng.random() < level for _ in range(4)) / 4 for name in names}
        lengths[s] = {name: tokens + rng.uniform(-5, 5) for name in names}
    return Point(size, shares, lengths)


def curve(accuracies, tokens=(), *, base=0.9, name="long traces", **options):
    tokens = tokens or [40.0] * len(accuracies)
    points = [point(s, a, t, **options) for s, a, t in zip(SIZES, accuracies, tokens, strict=False)]
    return Curve(name, point(0, base, **options), points)


PHRASES = (
    "does not change beyond chance",
    "rises from",
    "falls from",
    "climbs to",
    "no recovery",
    "does not climb back",
    "still below the base",
    "indistinguishable from the base",
    "above the base",
    "valley is crossed",
    "is not known",
)


@pytest.mark.parametrize("seeds", [1, 3])
@pytest.mark.parametrize(
    ("accuracies", "base", "shape", "phrases", "place"),
    [
        ([0.9, 0.9, 0.9, 0.9], 0.9, "flat", {PHRASES[0]}, ""),
        ([0.5, 0.6, 0.8, 0.95], 0.4, "rising", {PHRASES[1]}, "at 1,024 traces"),
        (
            [0.4, 0.05, 0.5, 0.9],
            0.9,
            "valley",
            {PHRASES[2], PHRASES[3], PHRASES[7], PHRASES[9]},
            "at 64 traces",
        ),
        (
            [0.4, 0.05, 0.5, 0.9],
            0.6,
            "valley",
            {PHRASES[2], PHRASES[3], PHRASES[8], PHRASES[9]},
            "at 64 traces",
        ),
        ([0.4, 0.05, 0.3, 0.5], 0.9, "crossing", {PHRASES[2], PHRASES[3], PHRASES[6]}, "at 64 traces"),
        ([0.6, 0.4, 0.2, 0.05], 0.9, "falling", {PHRASES[2], PHRASES[4]}, "at 1,024 traces"),
        ([0.12, 0.0, 0.01, 0.01], 0.9, "falling", {PHRASES[2], PHRASES[5]}, "at 64 traces"),
    ],
)
def test_the_sentence_follows_from_the_curve(accuracies, base, shape, phrases, place, seeds):
    drawn = curve(accuracies, base=base, seeds=seeds)
    assert drawn.shape == shape
    sentence = findings([drawn])[0]
    assert sentence.startswith("Long traces: accuracy ")
    assert {phrase for phrase in PHRASES if phrase in sentence} == phrases
    assert place in sentence


def test_chance_alone_is_rarely_called_a_change():
    """With an interval for a single difference, the largest of four would make every tenth curve a valley."""
    called = sum(curve([0.8] * 4, base=0.8, seed=seed, seeds=1).shape != "flat" for seed in range(100))
    assert called <= 9  # 5 % of 100, and two standard deviations


def test_a_fall_within_the_spread_of_the_seeds_is_not_called_one():
    assert curve([0.9, 0.5, 0.6, 0.9]).shape == "valley"
    assert curve([0.9, 0.5, 0.6, 0.9], spread=0.45).shape == "flat"


def test_a_lower_or_longer_size_that_the_seeds_do_not_agree_on_does_not_hide_what_is_known_of_another():
    drawn = curve([0.9, 0.9, 0.7, 0.75], [40, 40, 80, 60])
    seen = Curve(drawn.name, drawn.base, [point(16, 0.5, 400, spread=0.45), *drawn.points[1:]])
    seen.points[0].tokens.update(
        {s: dict.fromkeys(tokens, 40 + 500 * s) for s, tokens in seen.points[0].tokens.items()}
    )
    assert seen.points[0].accuracy.mean < 0.6 < seen.points[2].accuracy.mean
    assert seen.shape == "falling"
    accuracy, length = findings([seen])
    assert "falls from 90." in accuracy and "at 256 traces" in accuracy
    assert "get 2.0 times as long, at 256 traces" in length and "shorter again" in length


def test_an_end_that_the_seeds_do_not_agree_on_is_neither_back_nor_below():
    drawn = curve([0.4, 0.05, 0.5, 0.75])
    wide = Curve(drawn.name, drawn.base, [*drawn.points[:3], point(1_024, 0.7, spread=0.15)])
    assert wide.shape == "unclear"
    assert {phrase for phrase in PHRASES if phrase in findings([wide])[0]} == {
        PHRASES[2],
        PHRASES[3],
        PHRASES[10],
    }


def test_an_interval_over_equal_seeds_is_that_of_the_questions_and_grows_with_their_spread():
    same = {"a": 1.0, "b": 0.0, "c": 0.5}
    one, three = estimate({0: same}), estimate({0: same, 1: same, 2: same})
    assert one.mean == three.mean == 0.5
    assert one.half == three.half
    apart = estimate({0: {"a": 0.4, "b": 0.4}, 1: {"a": 0.6, "b": 0.6}})
    assert apart.half == pytest.approx(12.706 * 0.1)  # t with one degree of freedom x 0.1414 / sqrt 2
    assert Estimate(0.5, 0.4).above_zero() and not Estimate(0.5, 0.4).above_zero(num_looks=6)
    assert Estimate(-0.5, 0.4).below_zero() and not Estimate(-0.5, 0.4).below_zero(num_looks=6)


def test_a_difference_is_paired_by_question_and_by_seed():
    before, after = (
        {0: {"a": 0.0, "b": 0.5}, 1: {"a": 0.1, "b": 0.9}},
        {0: {"a": 0.2, "b": 0.7}, 2: {"a": 0.9, "b": 0.9}},
    )
    assert difference(after, before, ()).mean == pytest.approx(0.2)
    assert difference(after, before, ()).half == pytest.approx(0)
    with pytest.raises(ValueError, match="none in common"):
        difference({2: {"a": 1.0}}, {1: {"a": 1.0}})
    with pytest.raises(ValueError, match="not the same"):
        difference({1: {"a": 1.0}}, {1: {"b": 1.0}})


def test_the_sentence_about_lengths_follows_from_them():
    def line(tokens):
        return findings([curve([0.9] * 4, tokens)])[1]

    assert (
        "5.0 times as long, at 64 traces (40 to 200 tokens), and shorter again: 2.0 times at 1,024"
        in line([80, 200, 120, 80])
    )
    assert "5.0 times as long, at 1,024 traces (40 to 200 tokens), the most that were tried." in line(
        [60, 80, 120, 200]
    )
    assert "and not shorter again beyond chance: 3.0 times at 1,024" in line([60, 80, 120, 119.99])
    assert "do not get longer beyond chance at any size (40 tokens before, at most 40 ± " in line(
        [40, 40, 39, 30]
    )


def test_arms_are_compared_at_the_sizes_they_share():
    long = curve([0.5, 0.1, 0.5, 0.9])
    short = Curve("short traces", long.base, [point(64, 0.9), point(256, 0.5), point(1_024, 0.3)])
    line = comparison_sentence(long, short)
    assert line.startswith("Short traces: accuracy is above that of long traces at 64 (")
    assert (
        " and below that of long traces at 1,024 (" in line
        and "256" not in line
        and "indistinguishable at the others" in line
    )
    same = Curve("half", long.base, list(long.points))
    assert "indistinguishable from that of long traces at every size" in comparison_sentence(long, same)
    assert findings([long, same])[-1] == comparison_sentence(long, same)

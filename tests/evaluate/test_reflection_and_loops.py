import random

import pytest

from kit.evaluate.reflection_and_loops import (
    LOOP_CHARACTERS,
    LOOP_TIMES,
    LOOP_UNIT,
    boxes,
    ends_in_loop,
    reflects,
)
from kit.paper import KEYWORDS

PROSE = "".join(random.Random(0).choices("abcdefghijklmnopqrstuvwxyz ,.\n", k=3_000))


@pytest.mark.parametrize("keyword", KEYWORDS)
def test_the_papers_keywords_count_as_reflection_in_any_case(keyword):
    assert reflects(f"so let me {keyword} it")
    assert reflects(f"so {keyword.upper()}.")


def test_what_is_not_one_of_the_papers_keywords_does_not_count():
    assert len(KEYWORDS) == 15
    assert not reflects("Wait, hmm, alternatively: let me check, and evaluate and examine it once more")


@pytest.mark.parametrize(
    "unit", ["So x = 3 and hence y = 4. ", PROSE[:LOOP_UNIT], PROSE[: LOOP_CHARACTERS // LOOP_TIMES]]
)
def test_a_unit_repeated_often_enough_at_the_end_is_a_loop_and_once_less_is_not(unit):
    times = max(LOOP_TIMES, -(-LOOP_CHARACTERS // len(unit)))
    assert ends_in_loop(PROSE + unit * times)
    assert ends_in_loop(PROSE + unit * times + unit[: len(unit) // 2])  # cut off in the middle of the last
    assert not ends_in_loop(PROSE + "#" + unit * (times - 1))
    assert not ends_in_loop(PROSE + unit * times + "Therefore #1")  # it found its way out


def test_short_runs_and_units_longer_than_a_paragraph_are_not_loops():
    assert not ends_in_loop("the number 1" + "0" * (LOOP_CHARACTERS - 1))
    assert ends_in_loop("the number 1" + "0" * LOOP_CHARACTERS)
    assert not ends_in_loop(PROSE[: LOOP_UNIT + 1] * 6)
    assert not ends_in_loop("")
    assert not ends_in_loop("a")


def brute_force(text):
    for period in range(1, LOOP_UNIT + 1):
        length = max(LOOP_TIMES * period, LOOP_CHARACTERS)
        tail = text[-length:]
        if len(tail) == length and all(tail[i] == tail[i + period] for i in range(length - period)):
            return True
    return False


def test_loops_are_found_exactly_where_trying_every_period_finds_them():
    rng = random.Random(1)
    found = []
    for _ in range(150):
        unit = "".join(rng.choices("ab", k=rng.randrange(1, 60)))
        start, times = "".join(rng.choices("ab", k=rng.randrange(40))), rng.randrange(1, 9)
        text = start + unit * times + unit[: rng.randrange(len(unit))]
        found.append(ends_in_loop(text))
        assert found[-1] == brute_force(text), text
    assert 10 < sum(found) < 140


def test_boxes_are_the_outermost_complete_ones():
    text = r"first \boxed{1}, then \boxed{\frac{1}{2}} and \fbox {x \boxed{3}} but \boxed{never"
    found = [text[start:end] for start, end in boxes(text)]
    assert found == [r"\boxed{1}", r"\boxed{\frac{1}{2}}", r"\fbox {x \boxed{3}}"]

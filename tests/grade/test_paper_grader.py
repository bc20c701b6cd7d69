r"""The verdict by the paper's rules against the first: where they differ, and where they agree."""

import json

import pytest
from conftest import real_data
from test_verdict import HOSTILE, stopwatch

from kit.grade.paper import grade_as_paper
from kit.grade.paper_text import extract, normalise


def test_a_number_one_percent_off_is_wrong_and_one_at_the_tolerance_is_right():
    assert grade_as_paper("100", r"\boxed{101}").verdict == "wrong"
    assert grade_as_paper("10000", r"\boxed{10001}").verdict == "correct"
    assert grade_as_paper("10000", r"\boxed{10002}").verdict == "wrong"


@pytest.mark.parametrize(
    ("response", "answer"),
    [
        (r"so \boxed{\frac{1}{2}}, done", r"\frac{1}{2}"),
        (r"\boxed{1} then \boxed 5 $ and more", "5"),
        ("The final answer is $7$. I hope it is correct.", "7"),
        ("Hence the answer is 12.", "12"),
        ("the final answer is: 12", " 12"),
        ("between 1,000 and 2,500.75 of them", "2500.75"),
        ("nothing", ""),
    ],
)
def test_where_the_answer_is_found(response, answer):
    assert extract(response) == answer


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (r"\left( 3, \dfrac{\pi}{2} \right)", r"(3,\frac{\pi}{2})"),
        (r"\frac12", r"\frac{1}{2}"),
        (r"\frac1{72}", r"\frac{1}{72}"),
        (r"\sqrt3 + 3.00", r"\sqrt{3}+3"),
        ("3.05", "3.05"),
        (".5", "0.5"),
        ("-3/4", r"\frac{-3}{4}"),
        (r"\$ 32,\!348", "32,348"),
        (r"x \in [1, 2]", r"[1,2]"),
        ("three hundred and twenty-five", "325"),
        ("12 square feet", "12"),
        (r"15\%", "15"),
    ],
)
def test_normal_form(text, expected):
    assert normalise(normalise(text)) == expected


def test_hostile_input_is_bounded_and_nothing_long_is_called_wrong():
    boxed = [
        (gold, rf"\boxed{{{prediction}}}") for gold, prediction in HOSTILE
    ]  # else the last number is all that is graded
    for index, (gold, prediction) in enumerate([*HOSTILE, *boxed]):
        late = stopwatch(0.25)
        verdict = grade_as_paper(gold, prediction, deadline=0.25)
        assert late() <= 0, index
        assert verdict.verdict in ("correct", "wrong", "unknown")
    assert grade_as_paper("7", "the answer is " + "7, as we see, " * 2_000).verdict == "unknown"
    assert grade_as_paper("5", r"\boxed{9^{9^{9^9}}}").verdict == "unknown"


def test_golds_as_published_are_right_against_themselves():
    for name in ("math500.jsonl", "aime24.jsonl", "amc23.jsonl"):
        for line in real_data(name).read_text(encoding="utf-8").splitlines():
            answer = str(json.loads(line)["answer"])
            assert grade_as_paper(answer, rf"so $\boxed{{{answer}}}$.").verdict == "correct", answer

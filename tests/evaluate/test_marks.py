"""The marks of an answer, also of one that is still written, and its summary."""

import pytest

from kit.evaluate.marks import equations_of, graded, marks_of, summary

TRACE = (
    "<think>7+5=12, recheck: 12-5=7 ok;12-3=8, recheck: 8+3=11, no: 12-3=9</think>"
    "7/2 = 3 remainder 1\n\\boxed{9}"
)


def test_an_equation_is_ticked_or_struck_and_phrases_and_boxes_stand_out():
    found = {
        TRACE[mark.start : mark.end]: (mark.style, mark.behind) for mark in marks_of(TRACE, is_whole=True)
    }
    assert found == {
        "7+5=12": ("right", "✓"),
        "12-5=7": ("right", "✓"),
        "12-3=8": ("wrong", "✗"),
        "8+3=11": ("right", "✓"),
        "12-3=9": ("right", "✓"),
        "recheck": ("reflection", ""),
        "\\boxed{9}": ("box", ""),
    }


def test_an_answer_that_grows_shows_no_equation_that_the_whole_one_does_not():
    whole = equations_of(TRACE, is_whole=True)
    for end in range(len(TRACE)):
        found = equations_of(TRACE[:end], is_whole=False)
        assert found == whole[: len(found)], TRACE[:end]
    assert equations_of("7+5=1", is_whole=False) == [] != equations_of("7+5=1", is_whole=True)


@pytest.mark.parametrize(
    ("text", "gold", "ending", "wanted"),
    [
        ("3+2=5;5-4=1.\\boxed{1}", "1", "", "9 tokens; correct: 1; 2 of 2 equations right"),
        (
            "3+2=6;6-4=2, double-check. \\boxed{2}",
            "1",
            "stopped",
            "9 tokens, stopped; wrong: 2 (right: 1); 1 of 2 equations right; the first wrong one: 3+2=6 "
            "(it is 5); 1 reflection phrase",
        ),
        ("", "1", "", "9 tokens; wrong: no answer (right: 1)"),
        ("hello", "", "", "9 tokens"),
    ],
)
def test_the_summary_counts_grades_and_names_the_first_wrong_equation(text, gold, ending, wanted):
    assert summary(text, 9, gold, ending) == wanted


def test_a_long_answer_is_shortened_in_its_verdict():
    assert graded("\\boxed{" + "9" * 400 + "}", "1") == "wrong: " + "9" * 39 + "… (right: 1)"

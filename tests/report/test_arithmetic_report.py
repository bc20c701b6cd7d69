"""The steps of answers to `arithmetic`: p, p^n and the residual of a written-out example, by hand."""

import json
from itertools import count

import pytest
from sample_rows import sample

from kit.data.arithmetic import PROMPT
from kit.evaluate.results import Result
from kit.report.arithmetic import check_answers, section, sentences
from kit.report.before_after import write_report
from kit.run import AFTER, BEFORE, SAMPLES, Journal

NUMBERS = count()  # of samples
A, B = PROMPT + "93/3+77-8", PROMPT + "2*3+4"  # of 3 operations, 100, and of 2, 10


def row(problem, text, verdict):
    return sample(problem, verdict, sample=next(NUMBERS), problem=problem, text=text, tokens=len(text))


ROWS = (
    row(A, "93/3 = 31, 31+77 = 108, 108-8 = 100. \\boxed{100}", "correct"),  # 3 operations, all right
    row(A, "93/3 = 31, 31+77 = 118, 118-8 = 110. \\boxed{110}", "wrong"),  # 3: one right, then a wrong one
    row(B, "2*3 = 6, 6+4 = 10, 10-4 = 6. \\boxed{10}", "correct"),  # 3 with the check, all right
    row(B, "2*3 = 7, 7+4 = 11. No: 2*3 = 6, 6+4 = 10. \\boxed{10}", "correct"),  # 4, the first one wrong
)
P = 7 / 9  # 3 + 1 + 3 + 0 right operations, and two answers in which a wrong one follows


def result(*rows):
    return {"arithmetic": Result("arithmetic", rows)}


def test_p_and_p_to_the_n_and_the_residual_are_those_computed_by_hand():
    found = check_answers({SAMPLES: result(*ROWS)})[SAMPLES]
    assert found.step_accuracy.mean == pytest.approx(P)
    assert found.predicted.mean == pytest.approx((P**3 + P**2) / 2)  # n is 3 and 2
    assert found.accuracy.mean == 0.75
    assert found.residual.mean == pytest.approx(0.75 - (P**3 + P**2) / 2)
    assert found.operations.mean == (3 + 3 + 3 + 4) / 4
    assert found.right_all_the_same == 1 / 4
    assert (found.num_needed, found.with_wrong, found.first_wrong) == (2.5, 0.5, 1.5)


def test_a_sentence_says_it_and_two_stages_show_what_length_alone_would_cost():
    (line,) = sentences(check_answers({SAMPLES: result(*ROWS)}))
    assert (
        line.startswith("arithmetic: answers perform 3.2 ± 3.2 operations, ")
        and "the problems need 2.5;" in line
    )
    assert (
        "p = 77.8 % (" in line
        and "50.0 % of the answers have a wrong one, first at operation 1.5 (median)" in line
    )
    assert (
        "p^n is 53.8 % (" in line and "measured 75.0 % (" in line and "a residual of +21.2 points, -" in line
    )
    before, after, both = sentences(check_answers({BEFORE: result(ROWS[0], *ROWS[2:]), AFTER: result(*ROWS)}))
    assert before.startswith("arithmetic before: ") and after == line.replace(
        "arithmetic:", "arithmetic after:"
    )
    right = (3 * 0.9**3 + 0.9**4) / 4  # 9 of the 10 equations before are true; 3, 3, 3 and 4 operations after
    assert (
        "(90.0 % of the equations are true)" in both
        and f"would be right in {100 * right:.1f} % of the cases; 75.0 %" in both
    )


def test_problems_of_ones_own_under_the_benchmarks_name_have_no_steps_to_check():
    own = row(A, "\\boxed{100}", "correct") | {"problem": "Compute 2 bananas"}
    assert check_answers({SAMPLES: result(ROWS[0], own)}) == {}


def test_answers_without_an_equation_have_no_p():
    silent = check_answers({SAMPLES: result(row(A, "\\boxed{100}", "correct"))})
    assert sentences(silent) == ["arithmetic: no answer states an equation, so there are no steps to check."]
    assert "<td>-<td>-<td>-<td>0.0<td>" in section(silent)
    right = sentences(check_answers({SAMPLES: result(ROWS[0])}))[0]
    assert "p = 100.0 % (" in right and "none is wrong" in right


def test_other_benchmarks_have_no_section():
    assert check_answers({SAMPLES: {"toy": Result("toy", ROWS)}}) == {}
    assert sentences({}) == [] and section({}) == ""


def test_the_report_shows_the_figures_of_both_stages_and_the_first_wrong_step_of_each_answer(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"model": "x"}))
    for stage, rows in ((BEFORE, (ROWS[0], ROWS[2])), (AFTER, ROWS)):
        journal = Journal(tmp_path / stage / "arithmetic.jsonl")
        for one in ({"header": {}}, *rows):
            journal.append(one)
    page = write_report(tmp_path).read_text()
    assert "<h2>Arithmetic, step by step</h2>" in page
    assert page.count("an operation is right with p = ") == 2
    assert "<td>77.8<br>(" in page and "<td>53.8<br>(" in page and "<td>+21.2<br>(" in page
    assert (
        "First wrong steps, after: 2 of 2 answers with one" in page
        and "First wrong steps, before" not in page
    )
    assert '<td> 93/3+77-8<td>31+77 = 118<td>108<td>2<td class="wrong">wrong' in page
    assert '<td> 2*3+4<td>2*3 = 7<td>6<td>1<td class="correct">correct' in page

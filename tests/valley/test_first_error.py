import random

import pytest

from kit.data.arithmetic import PROMPT
from kit.data.toy import long_trace, make_chain, read_chain, short_trace
from kit.valley.first_error import CAUSES, STEPWISE, dissect, dissect_arithmetic

PROBLEM = "7+5-3?"  # 7+5=12;12-3=9
CHAINS = [make_chain(random.Random(seed), 2 + seed % 7) for seed in range(100)]


def test_a_problem_is_read_back_as_the_chain_it_was_made_from():
    assert [read_chain(chain.problem) for chain in CHAINS] == CHAINS
    for text in ("7+5-3", "7+", "12+5?", "7*5?", ""):
        with pytest.raises(ValueError, match="is not a problem of the toy"):
            read_chain(text)


def test_nothing_is_wrong_in_a_trace_to_learn_from_and_its_checks_and_corrections_are_counted():
    for chain in CHAINS:
        short = dissect(chain.problem, short_trace(chain), finished=True)
        assert (short.cause, short.right_steps, short.wrong) == ("", len(chain.operands), [])
        assert short.num_operations == short.num_right == len(short.equations) == len(chain.operands)
        assert (short.num_checks, short.num_corrections) == (0, 0)
        text = long_trace(chain, random.Random(1))
        long = dissect(chain.problem, text, finished=True)
        assert (long.cause, long.right_steps, long.num_steps) == (
            "",
            len(chain.operands),
            len(chain.operands),
        )
        assert (
            long.num_corrections
            == text.count("no:")
            == len(long.taken_back)
            == len(long.equations) - long.num_right
        )
        # a correction: the wrong sum, its check, the right sum, its check
        assert long.num_checks == text.count("recheck") + text.count("no:")
        assert (
            long.num_operations
            == len(long.equations)
            == len(chain.operands) + long.num_checks + long.num_corrections
        )


@pytest.mark.parametrize(
    ("text", "cause", "right", "wrong"),
    [
        ("7+5=12;12-3=9.\\boxed{9}", "", 2, []),
        (
            "<think>7+5=12, recheck: 12-5=7 ok;12-3=8, recheck: 8+3=11, no: 12-3=9, 9+3=12 ok</think>"
            "\\boxed{9}",
            "",
            2,
            [],
        ),
        ("7+5=13;13-3=10.\\boxed{10}", "a sum is wrong", 0, ["7+5=13", "13-3=10"]),
        ("7+5=12;12-3=8.\\boxed{8}", "a sum is wrong", 1, ["12-3=8"]),
        ("7+5=12;12-4=8.\\boxed{8}", "another step", 1, ["12-4=8"]),
        ("7+5=12;12-3=9;9+1=10.\\boxed{10}", "another step", 2, ["9+1=10"]),
        (
            "<think>7+5=12;12-3=9, recheck: 9+3=12, no: 12-3=8</think>\\boxed{8}",
            "a sum is wrong",
            1,
            ["12-3=8"],
        ),
        ("<think>7+5=12, recheck: 12-5=8 ok;12-3=9</think>\\boxed{9}", "", 2, []),  # a false check is no step
        ("7+5=12.\\boxed{12}", "stops early", 1, []),
        ("7+5=12;12-3=9.", "no box", 2, []),
        ("7+5=12;12-3=9.\\boxed{8}", "box differs", 2, []),
        ("ok ok :\\boxed{9}", "no steps", 0, []),
    ],
)
def test_the_first_thing_wrong_is_found_and_wrong_steps_are_marked(text, cause, right, wrong):
    found = dissect(PROBLEM, text, finished=True)
    assert (found.cause, found.right_steps) == (cause, right)
    assert [equation.text for equation in found.wrong] == wrong
    assert cause in ("", *CAUSES)


def test_an_answer_that_is_cut_off_is_called_so_only_if_nothing_was_wrong_before():
    assert dissect(PROBLEM, "7+5=12;12-", finished=False).cause == "cut off"
    assert dissect(PROBLEM, "", finished=False).cause == "cut off"
    assert dissect(PROBLEM, "7+5=13;13-", finished=False).cause == "a sum is wrong"
    assert dissect(PROBLEM, "7+5=12;" + "ok" * 200, finished=False).looping


def test_an_arithmetic_answer_is_checked_equation_by_equation():
    problem = "Compute the answer to this arithmetic expression: 6*7+8-5"
    right = dissect_arithmetic(problem, "6*7 = 42, then 42+8=50 and 50-5=45: \\boxed{45}", finished=True)
    assert (right.cause, right.right_steps, right.num_steps, right.num_operations) == ("", 3, 3, 3)
    text = "6*7=42. 42+8=51. 51-5=46"
    wrong = dissect_arithmetic(problem, text, finished=False)
    assert (wrong.cause, wrong.right_steps, wrong.num_right) == ("a sum is wrong", 1, 2)
    assert [equation.text for equation in wrong.wrong] == ["42+8=51"]
    assert dissect_arithmetic(problem, "45", finished=True).cause == "no steps"
    assert dissect_arithmetic(problem, "6*7=42", finished=False).cause == "cut off"
    assert {"toy": dissect, "arithmetic": dissect_arithmetic} == STEPWISE


LONG = PROMPT + "93/3+77+(12-32)-11+61*78+44*39+55"


def test_the_papers_example_is_solved_and_counted():
    text = (
        "93/3 = 31, 12-32 = -20, 61*78 = 4758, 44*39 = 1716. Then 31+77 = 108, 108-20 = 88, 88-11 = 77, "
        "77+4758 = 4835, 4835+1716 = 6551, 6551+55 = 6606. The answer is 6606."
    )
    steps = dissect_arithmetic(LONG, text, finished=True)
    assert (steps.num_operations, steps.num_steps, steps.wrong) == (10, 10, [])
    assert steps.equations[-1].stated == 6606


def test_the_first_wrong_intermediate_is_found():
    response = "93/3 = 31, so 31+77 = 118. 118-20 = 98 and 98 - 11 = 86."
    steps = dissect_arithmetic(LONG, response, finished=True)
    wrong = steps.wrong[0]
    assert (wrong.position, wrong.text) == (response.index("31+77"), "31+77 = 118")
    assert (wrong.stated, wrong.true) == (118, 108)
    assert (steps.right_steps, steps.num_steps) == (1, 10)
    assert (steps.num_operations, len(steps.wrong)) == (4, 2)


def test_a_response_that_computes_nothing_has_no_equation_and_another_problem_is_refused():
    assert dissect_arithmetic(LONG, "6606", finished=True).equations == []
    with pytest.raises(ValueError, match="arithmetic expression"):
        dissect_arithmetic("How many eggs?", "5+3=8", finished=True)


def test_toy_traces_are_read_equation_by_equation_with_their_planted_mistakes():
    for chain in CHAINS:
        short = dissect_arithmetic(chain.problem, short_trace(chain), finished=True)
        assert short.num_operations == short.right_steps == short.num_steps == len(chain.operands)
        assert short.wrong == [] and str(short.equations[-1].stated) == chain.answer
        trace = long_trace(chain, random.Random(0))
        long = dissect_arithmetic(chain.problem, trace, finished=True)
        assert len(long.equations) == trace.count("=")
        # a long trace states a wrong value, rechecks it and says no
        assert len(long.wrong) == trace.count("no")
        assert all(trace.startswith(equation.text, equation.position) for equation in long.equations)

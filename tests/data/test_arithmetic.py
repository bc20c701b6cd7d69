"""Problems by the paper's rules, the same for a seed everywhere; the steps of a response, checked."""

import ast
import operator
import random
from collections import Counter
from fractions import Fraction

import pytest

from kit.data import toy
from kit.data.arithmetic import MAX_OPERATIONS, MIN_OPERATIONS, NUM_PROBLEMS, PROMPT, make_rows
from kit.data.equations import check_steps, stated_equations

OPERATORS = {ast.Add: operator.add, ast.Sub: operator.sub, ast.Mult: operator.mul, ast.Div: Fraction}
ROWS = make_rows()


def operands_and_intermediates(expression):
    """Return (operands, the value of every intermediate), by Python's own parser."""
    operands, intermediates = [], []

    def value(node):
        if isinstance(node, ast.Constant):
            operands.append(node.value)
            return node.value
        result = OPERATORS[type(node.op)](value(node.left), value(node.right))
        intermediates.append(result)
        return result

    value(ast.parse(expression, mode="eval").body)
    return operands, intermediates


def test_every_problem_keeps_the_papers_rules():
    assert len(ROWS) == len({row["problem"] for row in ROWS}) == NUM_PROBLEMS == 400
    counts, signs = Counter(), Counter()
    for row in ROWS:
        assert row["problem"].startswith(PROMPT)
        expression = row["problem"].removeprefix(PROMPT)
        operands, intermediates = operands_and_intermediates(expression)
        assert all(1 <= operand <= 100 for operand in operands)
        assert all(value == int(value) for value in intermediates)
        assert str(intermediates[-1]) == row["answer"]
        counts[len(intermediates)] += 1
        signs.update(sign for sign in expression if sign in "+-*/(")
    assert set(counts) == set(range(MIN_OPERATIONS, MAX_OPERATIONS + 1)) == set(range(5, 16))
    assert min(signs[sign] for sign in "+-*/(") > 200
    assert sum("(" not in row["problem"] for row in ROWS) > 50  # some have parentheses, not all


def test_operands_reach_from_1_to_100():
    expressions = [row["problem"].removeprefix(PROMPT) for row in ROWS]
    operands = [operand for text in expressions for operand in operands_and_intermediates(text)[0]]
    assert (min(operands), max(operands)) == (1, 100)
    sums = [term for text in expressions for term in text.split("+") if term.isdigit()]
    assert 40 < sum(map(int, sums)) / len(sums) < 61  # a term that is one operand was never drawn again


def test_a_seed_names_the_problems():
    assert make_rows(3) == ROWS[:3]
    assert make_rows(3, seed=1) != ROWS[:3]
    state = random.getstate()
    make_rows(3)
    assert random.getstate() == state
    assert ROWS[0]["problem"] == PROMPT + "71-83+40+98*11*71+51/17/(11-14)+33*21"  # the same on every Python


PROBLEM = PROMPT + "93/3+77+(12-32)-11+61*78+44*39+55"


def test_the_papers_example_is_solved_and_counted():
    steps = check_steps(
        PROBLEM,
        "93/3 = 31, 12-32 = -20, 61*78 = 4758, 44*39 = 1716. Then 31+77 = 108, 108-20 = 88, 88-11 = 77, "
        "77+4758 = 4835, 4835+1716 = 6551, 6551+55 = 6606. The answer is 6606.",
    )
    assert (steps.num_operations, steps.num_needed) == (10, 10)
    assert steps.first_wrong is None
    assert steps.equations[-1].stated == 6606


def test_the_first_wrong_intermediate_is_found():
    response = "93/3 = 31, so 31+77 = 118. 118-20 = 98 and 98 - 11 = 86."
    steps = check_steps(PROBLEM, response)
    wrong = steps.first_wrong
    assert (wrong.position, wrong.text) == (response.index("31+77"), "31+77 = 118")
    assert (wrong.stated, wrong.true) == (118, 108)
    assert (steps.num_before_wrong, steps.num_needed) == (1, 10)
    assert (steps.num_operations, wrong_of(steps)) == (4, 2)


def wrong_of(steps):
    return sum(not equation.is_right for equation in steps.equations)


def test_a_response_that_computes_nothing_has_no_equation_and_another_problem_is_refused():
    assert check_steps(PROBLEM, "6606").equations == ()
    with pytest.raises(ValueError, match="arithmetic expression"):
        check_steps("How many eggs?", "5+3=8")


def test_toy_traces_are_read_step_by_step_with_their_planted_mistakes():
    rng = random.Random(0)
    for num_operands in (2, 5, 8):
        for _ in range(50):
            chain = toy.make_chain(rng, num_operands)
            short = check_steps(chain.problem, toy.short_trace(chain))
            assert short.num_operations == short.num_before_wrong == short.num_needed == num_operands - 1
            assert wrong_of(short) == 0
            assert str(short.equations[-1].stated) == chain.answer
            trace = toy.long_trace(chain, rng)
            long = check_steps(chain.problem, trace)
            assert len(long.equations) == trace.count("=")
            # a long trace states a wrong value, rechecks it and says no
            assert wrong_of(long) == trace.count("no")
            assert all(trace.startswith(equation.text, equation.position) for equation in long.equations)


def test_traces_of_real_models_rarely_look_wrong_where_they_are_right():
    """A checker that reads prose as equations would find many mistakes in answers that are right."""
    import json

    from conftest import real_data

    found = [
        equation
        for line in real_data("openr1_gsm8k.jsonl").read_text(encoding="utf-8").splitlines()
        for row in [json.loads(line)]
        for trace, right in zip(row["generations"], row["correctness_math_verify"], strict=True)
        if right
        for equation in stated_equations(trace)
    ]
    assert len(found) > 5_000
    assert sum(not equation.is_right for equation in found) / len(found) < 0.01

"""Problems by the paper's rules, the same for a seed everywhere."""

import ast
import operator
import random
from collections import Counter
from fractions import Fraction

from kit.data.arithmetic import MAX_OPERATIONS, MIN_OPERATIONS, NUM_PROBLEMS, PROMPT, make_rows
from kit.data.equations import stated_equations

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

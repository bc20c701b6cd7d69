"""The paper's synthetic arithmetic task, on which it isolates error accumulation (section "Why it happens").

Its problems are expressions of 5 to 15 operations, operands uniform in [1, 100], with + - * / and some
parentheses, and every intermediate is an integer: 93/3+77+(12-32)-11+61*78+44*39+55. What the paper leaves
open is decided here: the four operators are equally likely; a sum or difference of two neighbours is put in
parentheses with probability 0.2; the operands of a product or quotient are all drawn again until its
intermediates are integers.

    rows = make_rows(400, seed=0)    # {"problem", "answer"}

kit.valley.first_error.dissect_arithmetic finds where a response goes wrong.
"""

from __future__ import annotations

import random
import re

from kit.data.expressions import evaluate
from kit.paper import MAX_OPERAND, OPERATIONS, SAMPLES

PROMPT = "Compute the answer to this arithmetic expression: "
NUM_PROBLEMS = SAMPLES["arithmetic"][1]
MIN_OPERATIONS, MAX_OPERATIONS = OPERATIONS
PARENTHESES = 0.2  # share of the sums and differences of two neighbours that are put in parentheses
MAX_DRAWS = 5_000  # of one term's operands; then a new structure: five divisions in a row rarely work out


def make_rows(num_problems: int = NUM_PROBLEMS, *, seed: int = 0) -> list[dict]:
    """Draw rows {"problem", "answer"}, no problem twice.

    A seed gives the same rows on every machine and in every Python version.
    """
    rng, answers = random.Random(f"arithmetic {seed}"), {}
    while len(answers) < num_problems:
        expression = make_expression(rng)
        answers[expression] = str(evaluate(expression))
    return [{"problem": PROMPT + expression, "answer": answer} for expression, answer in answers.items()]


def make_expression(rng: random.Random) -> str:
    """Draw one expression by the paper's rules."""
    while True:
        # terms, and the signs between them
        parts = re.findall(r"(?:\([^()]*\)|[#*/])+|[+-]", _draw_structure(rng))
        drawn = [part if part in "+-" else _draw_operands(rng, part) for part in parts]
        if None not in drawn:
            return "".join(drawn)


def _draw_structure(rng: random.Random) -> str:
    """Draw an expression with # in the place of operands, such as #/#+(#-#)*#."""
    num_operations = MIN_OPERATIONS + _below(rng, MAX_OPERATIONS - MIN_OPERATIONS + 1)
    operators = ["+-*/"[_below(rng, 4)] for _ in range(num_operations)]
    structure, inside = "#", False
    for operator in operators:
        inside = not inside and operator in "+-" and rng.random() < PARENTHESES
        structure = f"{structure[:-1]}({structure[-1]}{operator}#)" if inside else f"{structure}{operator}#"
        inside = inside and structure.endswith(")")
    return structure


def _draw_operands(rng: random.Random, term: str) -> str | None:
    """Draw a term's operands until every intermediate is an integer; None if MAX_DRAWS do not suffice."""
    # (operator before the factor, sign within its parentheses)
    factors = re.findall(r"([*/]?)(?:\(#([+-])#\)|#)", term)
    for _ in range(MAX_DRAWS):
        value, drawn = 1, ""
        for operator, sign in factors:
            factor = 1 + _below(rng, MAX_OPERAND)
            text = str(factor)
            if sign:
                other = 1 + _below(rng, MAX_OPERAND)
                text, factor = f"({text}{sign}{other})", factor + other if sign == "+" else factor - other
            if operator == "/" and (factor == 0 or value % factor):
                break
            value = value // factor if operator == "/" else value * factor
            drawn += operator + text
        else:
            return drawn
    return None


def _below(rng: random.Random, bound: int) -> int:
    return int(rng.random() * bound)  # only random() is promised to be the same in every Python version

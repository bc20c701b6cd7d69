r"""Reading equations from text: what is stated, what is true, what is ignored; no text takes long."""

import time
from fractions import Fraction

import pytest
from test_verdict import HOSTILE

from kit.data.equations import stated_equations
from kit.data.expressions import evaluate

# (text, [(what is stated, what is true, operations performed)]) of texts whose equations are right
RIGHT = [
    ("93/3=31", [(31, 1)]),
    ("93 / 3 = 31.", [(31, 1)]),
    (r"$93 \div 3 = 31$ and \(61 \times 78 = 4{,}758\)", [(31, 1), (4758, 1)]),
    ("12 − 32 = −20; 6 × 7 = 42; 84 ÷ 2 = 42; 3 · 4 = 12", [(-20, 1), (42, 1), (42, 1), (12, 1)]),
    (r"\frac{93}{3} = \boxed{31}", [(31, 1)]),
    ("1,234 + 1 = 1,235", [(1235, 1)]),
    (r"\begin{align*} 93/3+77 &= 31+77 \\ &= 108 \end{align*}", [(108, 1), (108, 1)]),
    ("31 + 77 =\n108", [(108, 1)]),
    ("93/3+77+(12-32) = 31+77-20 = 108-20 = 88", [(88, 2), (88, 1), (88, 1)]),
    ("3*4=12+5=17", [(12, 1), (17, 1)]),
    ("5*8=40+6*7=42", [(40, 1), (42, 1)]),
    ("1+2+3 = 1+2 = 3", [(3, 1)]),
    ("2+3=5=6-1", [(5, 1), (5, 0)]),
    ("61 x 78 = 4758", [(4758, 1)]),
    ("3(4+5)=27", [(27, 2)]),
    ("-3+5=2 and 5 - -3 = 8", [(2, 1), (8, 1)]),
    ("so -3 + 5 = 2", [(2, 1)]),
    ("**Step 1**: 93/3 = **31**", [(31, 1)]),
    ("1. 93/3 = 31\n2) 5 + 3 = 8\n- 4 + 4 = 8\n* 9 - 1 = 8", [(31, 1), (8, 1), (8, 1), (8, 1)]),
    ("x = 3 + 4 = 7", [(7, 1)]),
    ("the sum 5 + 3 equals 8", [(8, 1)]),
    ("<think>7+5=12, recheck: 12-5=7 ok;12-3=9</think>\\boxed{9}", [(12, 1), (7, 1), (9, 1)]),
    ("$<<16-3-4=9>>9 eggs", [(9, 2)]),
    ("10/4 = 2.5", [(Fraction(5, 2), 1)]),
    ("10/3 = 3.33", [(Fraction(333, 100), 1)]),
]

WRONG = [
    ("so 93/3 = 32, hence", 3, "93/3 = 32", 32, 31),
    ("7+5=12;12-3=8.", 7, "12-3=8", 8, 9),
    ("8 - 5 = 4 + 1 = 5", 0, "8 - 5 = 4", 4, 3),
    ("3*4=12+5=18", 4, "12+5=18", 18, 17),
    ("31+77-20 = 108-20 = 89", 11, "108-20 = 89", 89, 88),
    ("1+1=2=3", 4, "2=3", 3, 2),
    (r"12 − 32 = 20", 0, "12 − 32 = 20", 20, -20),
    ("10/3 = 3.35", 0, "10/3 = 3.35", Fraction(67, 20), Fraction(10, 3)),
]

NONE = [
    "2x + 3 = 7", "x - 3 = 4", "f(2) = 5", "5! = 120", "2^3 = 8", r"\sqrt{4} = 2", "5 + 3 = 2y", "5 = 5",
    "option 3 = 45", "30 % of 20 = 0.3 * 20", r"\frac{1}{3} \text{ of } 15 = 15/4", "+6 = 57",
    "Total - 18 = 80", "7/2 = 3 remainder 1", "S_3 = 4*1", "1 + = 3", "(2+3 = 6", "5/0 = 1", "3 ≈ 2 + 2", "",
    "=", "= = =", "a_{12} + 1 = 3", "no numbers here",
    "k² -13124=0", "9 is 3 + 7",
]  # fmt: skip


@pytest.mark.parametrize(("text", "expected"), RIGHT)
def test_what_is_stated_is_read_and_right(text, expected):
    found = stated_equations(text)
    assert [(equation.stated, equation.num_operations) for equation in found] == expected
    assert all(equation.is_right for equation in found), found


@pytest.mark.parametrize(("text", "position", "piece", "stated", "true"), WRONG)
def test_the_wrong_one_is_found_where_it_stands(text, position, piece, stated, true):
    wrong = [equation for equation in stated_equations(text) if not equation.is_right]
    assert [equation[:4] for equation in wrong] == [(position, piece, stated, true)]
    assert text[position:].startswith(piece)


@pytest.mark.parametrize("text", NONE)
def test_what_is_no_equation_between_numbers_is_ignored(text):
    assert stated_equations(text) == []


def test_an_expression_has_a_value_or_is_refused():
    assert evaluate("93/3+77+(12-32)-11+61*78+44*39+55") == 6606
    assert evaluate("Compute: 1/3 - 1") == Fraction(-2, 3)
    for text in ("", "x + 1", "3 +", "1/0", "7+5 and 3"):
        with pytest.raises(ValueError, match="does not end with an arithmetic expression"):
            evaluate(text)


BOUND = 30.0  # seconds: text that is read without bounds takes minutes, and a busy machine is slow


@pytest.mark.slow
def test_hostile_text_is_bounded():
    texts = [prediction for _, prediction in HOSTILE]
    texts += [
        "1+" * 30_000 + "1=2",
        "(" * 30_000 + "1=2",
        "1=" * 30_000 + "1",
        "1 " * 30_000 + "= 1",
        "9*" * 110 + "9=",
        "9/7*" * 15_000,
    ]
    texts += [
        "\\frac{" * 9_000 + "1=2",
        "1-" * 119 + "1=" * 300,
        "-" * 60_000 + "1=1",
        ("1)" * 118 + "=") * 200,
        "1,000" * 13_000,
    ]
    for text in texts:
        start = time.monotonic()
        stated_equations(text)
        assert time.monotonic() - start < BOUND, text[:40]

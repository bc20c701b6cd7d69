"""Parsed answers are compared to any precision, within the caps, in any thread."""

import contextlib
import threading
import time
from fractions import Fraction

import mpmath
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kit.grade.deciding.identities import same_number
from kit.grade.deciding.judge import Judge
from kit.grade.deciding.scalars import Options
from kit.grade.deciding.values import Evaluator, exact_root
from kit.grade.limits import Budget, NotNumeric, ParseError, TooLarge, Undecided, Undefined
from kit.grade.reading.parser import parse


def budget(seconds=10.0):
    return Budget(time.monotonic() + seconds)


def no_proof(a, b):
    raise AssertionError(f"asked the worker: {a} {b}")


def judge(a, b, **options):
    """Return (verdict, rule), which must be the same from both sides and need no worker."""
    judges = [Judge(Options(**options), budget(), no_proof) for _ in range(2)]
    verdicts = judges[0].same(parse(a), parse(b)), judges[1].same(parse(b), parse(a))
    assert verdicts[0] == verdicts[1]
    assert judges[0].rule == judges[1].rule
    return verdicts[0], judges[0].rule


@pytest.mark.parametrize(
    ("text", "error"),
    [
        ("9^{9^{9^9}}", TooLarge),
        ("10^{10^{10^{10}}}", TooLarge),
        ("e^{e^{e^{e^{e}}}}", TooLarge),
        (r"\sin(10^{10^{10}})", TooLarge),
        ("(((9!)!)!)!", TooLarge),
        (r"\binom{10^{100}}{10^{50}}", TooLarge),
        ("0^{-1}", Undefined),
        (r"\frac{1}{\sqrt2-\sqrt2}", Undefined),
        ("(-3)!", Undefined),
        (r"\ln 0", Undefined),
        (r"\log_1 5", Undefined),
        (r"\infty", NotNumeric),
        ("x", NotNumeric),
        ("(i^2)!", Undefined),
        ("0^{i^2}", Undefined),
        ("abs(1, 2)", NotNumeric),
        ("floor(1, 2)", NotNumeric),
        ("(1,2)", NotNumeric),
    ],
)
def test_values_that_do_not_exist(text, error):
    start = time.process_time()
    with pytest.raises(error):
        Evaluator(50, budget())(parse(text))
    assert time.process_time() - start < 1


@pytest.mark.parametrize(
    ("a", "b"),
    [
        ("9^{9^9}", "9^{9^9}+1"),
        ("2^{2^{-10000}}", "1"),
        (r"\sqrt{1+10^{-2000}}", "1"),
        (r"\cos(2^{-10000})", "1"),
        (r"\pi+e^{-9999}", r"\pi"),
    ],
)
def test_differences_beyond_900_digits_are_undecided_not_equal(a, b):
    with pytest.raises(Undecided, match="900 digits"):
        judge(a, b)
    with pytest.raises(Undecided, match="900 digits"):
        judge(b, a)


def test_budget_stops_long_work():
    with pytest.raises(Undecided, match="deadline"):
        Evaluator(50, budget(-1))(parse("1+1"))
    nested = parse(r"\sum_{a=1}^{1000}\sum_{b=1}^{1000} ab")
    with pytest.raises(Undecided, match="too many steps"):
        same_number(nested, parse("1"), Budget(time.monotonic() + 60, steps=10_000))


@given(st.fractions(), st.integers(2, 9))
@settings(max_examples=200, deadline=None)
def test_exact_root(value, index):
    power = value**index
    assert exact_root(power, index) == (abs(value) if index % 2 == 0 else value)
    if value > 1:
        assert exact_root(power + Fraction(1, 3), index) is None


@given(st.integers(-50, 50), st.integers(1, 60), st.integers(2, 40), st.integers(-9, 9))
@settings(max_examples=150, deadline=None)
def test_surds_against_exact_algebra(a, b, c, d):
    """(a + b sqrt(c))^2 = (a^2 + b^2 c) + 2ab sqrt(c), and a change by d makes it differ unless d = 0."""
    expanded = f"{a * a + b * b * c + d}+{2 * a * b}\\sqrt{{{c}}}".replace("+-", "-")
    assert judge(f"({a}+{b}\\sqrt{{{c}}})^2", expanded)[0] is (d == 0)


FORMS = (
    "{}+{}", "{}-({})", r"({})\cdot ({})", r"\frac{{{}}}{{{}}}", "({})^{{{}}}", r"\sqrt[{}]{{{}}}",
    "({}+{})!", r"\binom{{{}}}{{{}}}", r"({})\pm {}", r"({})(\pm {})", r"\log_{{{}}} {}", "abs({},{})",
    "floor({}+{})", "floor({},{})", r"\gcd({},{})", r"\sum_{{k=1}}^{{{}}} k^{{{}}}", "({},{})", "[{},{})",
    r"\{{{},{}\}}", "{}:{}", "{}={}", "{}<{}", r"{}\ne {}", r"({},1)\cup [{},9)", r"{}\text{{ or }}{}",
    r"\begin{{pmatrix}} {} \\ {} \end{{pmatrix}}",
)  # fmt: skip
LEAVES = (
    "0", "1", "2", "-1", "0.5", "1.234", "x", "y", "k", "i", "i^2", "e",
    r"\pi", r"\infty", r"5\%", "f(x)", r"5\text{ cm}",
)  # fmt: skip
FORMULAS = st.recursive(
    st.sampled_from(LEAVES),
    lambda parts: st.builds(str.format, st.sampled_from(FORMS), parts, parts),
    max_leaves=4,
)


@given(FORMULAS, FORMULAS)
@settings(max_examples=500, deadline=None)
def test_any_two_formulas_are_compared_or_refused(a, b):
    def undecided(*sides):
        raise Undecided("sympy is not asked here")

    with contextlib.suppress(ParseError, TooLarge, Undecided, NotNumeric, Undefined):
        Judge(Options(), budget(), undecided).same(parse(a), parse(b))


def test_precision_is_a_threads_own():
    """Computing at 900 digits in a thread changes neither mpmath's global precision nor other threads'."""
    before = mpmath.mp.dps
    failures = []

    def work():
        for _ in range(20):
            if not judge(r"\sqrt{2}+\sqrt{3}", r"\sqrt{5+2\sqrt{6}}")[0] or judge("2^{2^{-1000}}", "1")[0]:
                failures.append(1)

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures
    assert mpmath.mp.dps == before

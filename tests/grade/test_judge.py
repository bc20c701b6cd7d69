"""Equality of parsed answers: numbers to any precision, expressions, sets, intervals, equations; what is never called equal."""

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
from kit.grade.limits import Budget, NotNumeric, TooLarge, Undecided, Undefined
from kit.grade.reading.parser import parse


def budget(seconds=10.0):
    return Budget(time.monotonic() + seconds)


def no_proof(a, b):
    raise AssertionError(f"asked the worker: {a} {b}")


def judge(a, b, **options):
    """(verdict, rule), the same from both sides, without any worker."""
    judges = [Judge(Options(**options), budget(), no_proof) for _ in range(2)]
    verdicts = judges[0].same(parse(a), parse(b)), judges[1].same(parse(b), parse(a))
    assert verdicts[0] == verdicts[1]
    assert judges[0].rule == judges[1].rule
    return verdicts[0], judges[0].rule


@pytest.mark.parametrize(
    ("a", "b", "same"),
    [
        (r"\frac{1}{2006!}", r"\frac{1}{2004!}", False),
        (r"\frac{2006!}{2004!}", r"2006 \cdot 2005", True),
        (r"\frac{100000!}{99999!}", "100000", True),
        (r"2^{2^{-1000}}", "1", False),
        ("10^{400}+1", "10^{400}", False),
        (r"\sqrt{2}+\sqrt{3}", r"\sqrt{5+2\sqrt{6}}", True),
        (r"\sqrt{2}+\sqrt{3}+10^{-60}", r"\sqrt{5+2\sqrt{6}}", False),
        (r"\sqrt{2}+\sqrt{3}-\sqrt{5+2\sqrt{6}}", "0", True),
        (r"\sqrt{2}+\sqrt{3}-\sqrt{5+2\sqrt{6}}", "10^{-80}", False),
        (r"\sqrt[3]{2+\sqrt5}+\sqrt[3]{2-\sqrt5}", "1", True),
        (r"16\arctan\frac15-4\arctan\frac{1}{239}", r"\pi", True),
        (r"e^{i\pi}", "-1", True),
        (r"e^{\pi\sqrt{163}}", "262537412640768744", False),
        ("(10^{10})!", "10^{10}!", True),
        (r"(-1)^{1000001}", "-1", True),
        (r"\binom{1000}{3}", "166167000", True),
        (r"\sqrt{-4}", "2i", True),
        (r"\lfloor -3.5 \rfloor", "-4", True),
        (r"\log_{10} 1000", "3", True),
        (r"\sin 30^\circ", r"\frac12", True),
        (r"\sum_{k=1}^{100} k^2", "338350", True),
        (r"\prod_{k=1}^{10} k", "10!", True),
        ("0^0", "1", True),
        ("0.30000000000000004", "0.3", True),
        ("0.3000000001", "0.3", False),
    ],
)
def test_closed_forms(a, b, same):
    assert judge(a, b)[0] is same


@pytest.mark.parametrize(
    ("decimal", "exact", "same"),
    [
        ("0.6667", r"\frac23", True),
        ("0.6666", r"\frac23", True),
        ("0.667", r"\frac23", False),
        ("0.6668", r"\frac23", False),
        ("-0.6667", r"-\frac23", True),
        ("-0.6666", r"-\frac23", True),
        ("-0.6665", r"-\frac23", False),
        ("3.1416", r"\pi", True),
        ("3.14160", r"\pi", False),
        (r"2.3148 \times 10^{-3}", r"\frac{1}{432}", True),
        (r"2.3149 \times 10^{-3}", r"\frac{1}{432}", False),
        ("3.0000", "3", True),
        ("3.0001", "3", False),
        ("0.00001000", "0", False),
        ("x+1.414", r"x+\sqrt2", True),
        ("x+1.415", r"x+\sqrt2", False),
        ("(0.6, 2.6667]", r"(\frac35, \frac83]", True),
    ],
)
def test_rounded_decimals(decimal, exact, same):
    assert judge(decimal, exact)[0] is same


@pytest.mark.parametrize(
    ("a", "b", "same"),
    [
        ("(x+1)^2", "x^2+2x+1", True),
        ("(x+1)^2", "x^2+2x+2", False),
        ("(x+y)^{20}", "(y+x)^{20}", True),
        ("x+10^{-60}", "x", False),
        (r"\frac{x^2-1}{x-1}", "x+1", True),
        (r"\sin 2x", r"2\sin x\cos x", True),
        (r"\sin 2x", r"2\sin x", False),
        (r"\sqrt{x^2}", "x", False),
        (r"\sqrt{x^2}", "|x|", True),
        (r"\sqrt[3]{x}^2", "x^{2/3}", True),
        (r"\ln(x^2)", r"2\ln x", True),
        (r"\frac{1}{x}", "x", False),
        ("x", "y", False),
        ("a^{b+c}", "a^b a^c", True),
        ("f(x)", "f(y)", False),
        ("f(x)+1", "1+f(x)", True),
        ("f((x+1)^2)", "f(x^2+2x+1)", True),
        ("xi", "x", False),
        ("n!", "n (n-1)!", True),
        (r"\frac{\pi r}{h+r}", r"\frac{r\pi}{r+h}", True),
    ],
)
def test_expressions(a, b, same):
    assert judge(a, b)[0] is same


@pytest.mark.parametrize(
    ("a", "b", "same"),
    [
        ("1, 2, 2", "2, 1", True),
        ("1, 2", "1, 2, 3", False),
        (r"\{1\pm\sqrt5, -2\}", r"-2, 1-\sqrt5, 1+\sqrt5", True),
        (r"\{0.3333, 1\}", r"\{1, \frac13\}", True),
        (r"\{0.3333, 1\}", r"\{1, \frac13, 2\}", False),
        ("(1,2)", "(2,1)", False),
        ("(1,2)", "[1,2]", False),
        ("(1,2,3)", "[1,2,3]", True),
        ("(1,2)", r"\begin{pmatrix}1\\2\end{pmatrix}", True),
        (r"\{(1,2),(3,4)\}", "(3,4), (1,2)", True),
        (r"\{(1,2),(3,4)\}", "(4,3), (1,2)", False),
        (r"\begin{pmatrix}1&2\\3&4\end{pmatrix}", r"\begin{bmatrix}1&2\\3&\frac82\end{bmatrix}", True),
        (r"\begin{pmatrix}1&2\\3&4\end{pmatrix}", r"\begin{pmatrix}1&2&3&4\end{pmatrix}", False),
        (r"2\begin{pmatrix}1\\2\end{pmatrix}", r"\begin{pmatrix}2\\4\end{pmatrix}", True),
        ("x=1, y=2", "y=2, x=1", True),
        ("x=1, y=2", "x=2, y=1", False),
        ("x=1, y=2", "(1, 2)", True),
        ("x=1, y=2", "(2, 1)", False),
        ("(x,y)=(1,2)", "(1,2)", True),
        ("a=4,-8", "-8, 4", True),
        ("a=4,-8", "a=-8, a=4", True),
        (r"\pm 3", "-3, 3", True),
        (r"\pm 3", "3", False),
        ("1,22", "1.22", True),
        ("1,22", "1.23", False),
        ("1,5", "1.5", True),
        ("1,5", "1.05", False),
        ("x=2, y=3", "3, 2", False),
        ("x_1=2, x_2=3", "3, 2", True),
        ("(x,y)=(2,3)", "y=3, x=2", True),
        ("(x,y)=(2,3)", "x=3, y=2", False),
        (r"(x,y)=(5,8) \text{ and } (8,5)", "(8,5), (5,8)", True),
        ("1, 2", "2, 1.0", True),
    ],
)
def test_collections(a, b, same):
    assert judge(a, b)[0] is same


@pytest.mark.parametrize(
    ("a", "b", "same"),
    [
        (r"x \in [-2,7]", r"-2 \le x \le 7", True),
        (r"x \in [-2,7]", r"-2 < x \le 7", False),
        (r"x \in [-2,7]", r"y \ge 7", False),
        ("x > 5", r"(5, \infty)", True),
        ("x > 5", "5 < x", True),
        ("x > 5", "x < 5", False),
        ("x > 5", "y > 5", False),
        ("x > 5", "5", False),
        (r"[0,1) \cup [1,2]", "[0,2]", True),
        (r"[0,1) \cup (1,2]", "[0,2]", False),
        (r"(2,3) \cup (0,1)", r"(0,1) \cup (2,3)", True),
        (r"x \ne 3", r"(-\infty,3) \cup (3,\infty)", True),
        (r"\mathbb{R} \setminus \{3\}", r"x \ne 3", True),
        (r"[0,2] \cap (1,3]", "(1,2]", True),
        (r"|x| < 2", "(-2,2)", True),
        (r"1 \le |z| \le 2", r"[-2,-1] \cup [1,2]", True),
        (r"x<-1 \text{ or } x>1", r"|x|>1", True),
        (r"\{-1\} \cup [0,7)", r"[0,7) \cup \{-1\}", True),
        (r"(-\infty, \infty)", r"\mathbb{R}", True),
        ("(a,b]", "(a,b]", True),
        ("(a,b]", "(a,c]", False),
        ("2x+y<3", "3>y+2x", True),
        ("2x+y<3", "2x+y>3", False),
        ("4x+2y<6", "2x+y<3", True),
    ],
)
def test_sets_of_reals(a, b, same):
    assert judge(a, b)[0] is same


@pytest.mark.parametrize(
    ("a", "b", "same"),
    [
        ("x=5", "5", True),
        ("x=5", "y=5", False),
        ("2x+4y-3=0", r"y=-\frac12x+\frac34", True),
        ("x+y=1", "x-y=1", False),
        ("a+3z=0", "0", False),
        ("7=11a+c", "11a+c", False),
        ("7=11a+c", "11a+c=7", True),
        ("x^2=4", "4", False),
        (r"\cos x=\frac12", r"\sin x=\frac12", False),
        ("f(x)=x+1", "f(t)=1+t", True),
        ("f(x)=x+1", "f(t)=1+x", False),
        ("x=1/3\\approx0.33", r"\frac13", True),
        (r"x\approx11", "11", True),
        ("35+70=105", "105", True),
        ("7:32", "14:64", True),
        ("7:32", "32:7", False),
        ("12:00", "1:00", False),
        ("2:30", "1:15", False),
    ],
)
def test_equations_and_ratios(a, b, same):
    assert judge(a, b)[0] is same


@pytest.mark.parametrize(
    ("a", "b", "options", "same"),
    [
        (r"10\%", "10", {}, True),
        (r"10\%", "0.1", {}, True),
        (r"10\%", "1000", {}, False),
        (r"10\%", "10", {"percent": "value"}, False),
        (r"10\%", r"0.1\%", {}, False),
        (r"30^\circ", "30", {}, True),
        (r"30^\circ", r"\frac{\pi}{6}", {}, True),
        (r"30^\circ", "30", {"units": "required"}, False),
        (r"5\text{ cm}", r"5\text{ m}", {}, False),
        (r"5\text{ cm}", "5", {}, True),
        (r"5\text{ inches}^2", r"5\text{ square inches}", {"units": "required"}, True),
        (r"5\text{ foos}", r"5\text{ bars}", {}, True),
        (r"5\text{ foos}", r"5\text{ bars}", {"units": "required"}, False),
    ],
)
def test_percent_and_units(a, b, options, same):
    assert judge(a, b, **options)[0] is same


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


def test_precision_is_a_threads_own():
    """A thread that computes at 900 digits leaves the global mpmath precision, and every other thread's, alone."""
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

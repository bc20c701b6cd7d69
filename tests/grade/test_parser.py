"""The tokeniser and the parser read or refuse each notation, within the caps on time and stack."""

import contextlib
import json
import threading
import time
from fractions import Fraction

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kit.grade.limits import MAX_DIGITS, ParseError, TooLarge
from kit.grade.reading.parser import parse
from kit.grade.reading.tokens import clean, tokenize
from kit.grade.trees import canonical, from_json, symbols, to_json


def number(value):
    return ("num", Fraction(value))


X = ("sym", "x")
HALF = number("1/2")


@pytest.mark.parametrize(
    ("text", "tree"),
    [
        ("42", number(42)),
        ("033", number(33)),
        ("1,234,567", number(1234567)),
        (r"11,\! 111", number(11111)),
        (r"14{,}916", number(14916)),
        ("1 000", number(1000)),
        ("1.000,99", ("dec", Fraction("1000.99"), 6, 2)),
        (".5", ("dec", Fraction("0.5"), 1, 1)),
        ("2.50", ("dec", Fraction("2.5"), 3, 2)),
        ("1e3", number(1000)),
        ("1.5E-3", ("dec", Fraction("0.0015"), 2, 4)),
        (r"0.1\overline{6}", number("1/6")),
        (r"\frac12", HALF),
        (r"\frac1{72}", number("1/72")),
        (r"\dfrac{3}{6}", HALF),
        ("½", HALF),
        (r"137 \frac{1}{2}", number("275/2")),
        (r"3\frac{1}{2}^2", ("mul", number(3), ("pow", HALF, number(2)))),
        (r"12\frac12\%", ("percent", number("25/2"))),
        (r"\frac12\frac13", number("1/6")),
        (r"\langle 1, 2\rangle", ("seq", "(", ")", number(1), number(2))),
        ("3:45 p.m.", ("unit", ("ratio", number(3), number(45)), "p.m.")),
        ("1 1/2", number("3/2")),
        ("11/2", number("11/2")),
        ("2516_8", number(1358)),
        (r"4210_{5}", number(555)),
        (r"204_{\text{five}}", number(54)),
        ("2A_{16}", number(42)),
        ("--5", number(5)),
        ("x", X),
        ("x_1", ("sym", "x_1")),
        ("x'", ("sym", "x'")),
        (r"\alpha", ("sym", "alpha")),
        ("π", ("const", "pi")),
        ("x²", ("pow", X, number(2))),
        ("x**2", ("pow", X, number(2))),
        ("2x", ("mul", number(2), X)),
        (r"2 \cdot x", ("mul", number(2), X)),
        ("x/2", ("mul", HALF, X)),
        ("-x^2", ("mul", number(-1), ("pow", X, number(2)))),
        ("2^3^2", ("pow", number(2), ("pow", number(3), number(2)))),
        ("x^{-1}", ("pow", X, number(-1))),
        (r"\sqrt{x}", ("root", number(2), X)),
        (r"\sqrt[3]x", ("root", number(3), X)),
        ("√2", ("root", number(2), number(2))),
        (r"\sin x", ("call", "sin", X)),
        (r"\sin^2 x", ("pow", ("call", "sin", X), number(2))),
        (r"\sin^{-1} x", ("call", "arcsin", X)),
        (r"\log_2 8", ("call", "log", number(8), number(2))),
        ("sinx", ("call", "sin", X)),
        ("f(2)", ("apply", "f", number(2))),
        ("x(2)", ("mul", number(2), X)),
        ("|x|", ("call", "abs", X)),
        ("5!", ("fact", number(5))),
        (r"\binom{5}{2}", ("binom", number(5), number(2))),
        (r"10\%", ("percent", number(10))),
        ("28 percent", ("percent", number(28))),
        (r"90^\circ", ("deg", number(90))),
        (r"90^{\circ}", ("deg", number(90))),
        (r"10\text{ cm}^2", ("unit", number(10), "cm^2")),
        ("180 per week", ("unit", number(180), "per week")),
        ("10weeks", ("unit", number(10), "weeks")),
        (r"40\text{ min}", ("unit", number(40), "min")),
        (r"\min(3, 4)", ("call", "min", number(3), number(4))),
        (r"\text{Evelyn}", ("text", "Evelyn")),
        (r"\text{13}", number(13)),
        ("3+4i", ("add", number(3), ("mul", number(4), ("const", "i")))),
        (r"3\pm x", ("add", number(3), ("pm", 1, X))),
        ("7:32", ("ratio", number(7), number(32))),
        ("(3,128)", ("seq", "(", ")", number(3), number(128))),
        ("(3]", None),
        ("[1,2)", ("seq", "[", ")", number(1), number(2))),
        (r"\{1,2\}", ("set", number(1), number(2))),
        ("{1,2}", ("set", number(1), number(2))),
        ("1,-2", ("list", ",", number(1), number(-2))),
        (r"1 \text{ or } 2", ("list", "or", number(1), number(2))),
        ("x=1orx=2", ("list", "or", ("rel", ("=",), (X, number(1))), ("rel", ("=",), (X, number(2))))),
        (r"\emptyset", ("set",)),
        (r"\mathbb{R}", ("reals",)),
        (r"x \le 2", ("rel", ("<=",), (X, number(2)))),
        ("x != 2", ("rel", ("!=",), (X, number(2)))),
        (
            r"\begin{pmatrix} 1 & 2 \\ 3 & 4 \end{pmatrix}",
            ("matrix", (number(1), number(2)), (number(3), number(4))),
        ),
        (r"\\begin{pmatrix} 1 \\\\ 2 \\end{pmatrix}", ("matrix", (number(1),), (number(2),))),
        (r"\\frac{1}{2}", HALF),
        (r"\int_0^1 x dx", ("big", "int", "x", number(0), number(1), X)),
        (r"\sum_{i=1}^{3} i", ("big", "sum", "i", number(1), number(3), ("sym", "i"))),
        ("5.", number(5)),
        ("5\x00", number(5)),
    ],
)
def test_notation(text, tree):
    if tree is None:
        with pytest.raises(ParseError):
            parse(text)
    else:
        assert parse(text) == tree


@pytest.mark.parametrize(
    "text",
    [
        "",
        ".",
        "(",
        ")",
        r"\frac{1}",
        r"\sqrt",
        "x +",
        "1 2",
        "[)",
        r"\begin{pmatrix} 1",
        "x_",
        "^2",
        r"9_{5}",
        "\ud800",
        "x = ",
    ],
)
def test_what_is_no_answer_is_refused(text):
    with pytest.raises(ParseError):
        parse(text)


@pytest.mark.parametrize(
    "text",
    [
        "{" * 3000 + "5" + "}" * 3000, "(" * 3000 + "5" + ")" * 3000, "9^" * 3000 + "9",
        r"\sqrt" * 3000 + "5", "5" + "!" * 3000, "|" * 3000, r"\frac" * 3000, "9" * (MAX_DIGITS + 1),
        "1e999999", "1+" * 40_000 + "1", r"\left(" * 3000, "-" * 70_000 + "5", "f(" * 3000,
    ],
)  # fmt: skip
def test_caps(text):
    start = time.process_time()
    with pytest.raises(TooLarge):
        parse(text)
    assert time.process_time() - start < 2


def test_depth_is_capped_before_the_stack_is_even_in_a_thread():
    """Forty brackets are read at any depth of the caller.

    A caller with no stack left gets TooLarge, not RecursionError.
    """
    nested = "(" * 39 + "5" + ")" * 39
    outcome = []

    def deep(levels):
        if levels:
            deep(levels - 1)
        else:
            try:
                outcome.append(parse(nested))
            except TooLarge:
                outcome.append("too large")

    for levels in (0, 500, 900):
        thread = threading.Thread(target=deep, args=(levels,))
        thread.start()
        thread.join()
    assert outcome == [number(5), number(5), "too large"]


@pytest.mark.parametrize(
    "unit",
    [
        "{",
        "}",
        "(",
        r"\text{",
        r"\mathrm{a",
        "1,234,",
        "$",
        "\\",
        r"\\",
        "^",
        "_",
        "'",
        "x",
        "1 ",
        ".",
        r"\{",
        "!",
        r"\overline{",
        "&",
        "or",
    ],
)
def test_time_is_linear_in_the_text(unit):
    text = unit * (50_000 // len(unit))
    start = time.process_time()
    with contextlib.suppress(ParseError, TooLarge):
        parse(text)
    assert time.process_time() - start < 2


@given(st.text(alphabet="0123456789xyzabi+-*/^_{}()[]|,;:=<>!%$&'\\ .ftsqrcle", max_size=60))
@settings(max_examples=400, deadline=None)
def test_any_text_parses_or_is_refused(text):
    try:
        tree = parse(text)
    except (ParseError, TooLarge):
        return
    assert from_json(json.loads(json.dumps(to_json(tree)))) == tree
    assert canonical(canonical(tree)) == canonical(tree)
    assert isinstance(symbols(tree), frozenset)


def test_json_keeps_numbers_beyond_the_digit_limit():
    tree = ("mul", ("num", Fraction(7**6000, 3)), X)
    assert from_json(json.loads(json.dumps(to_json(tree)))) == tree


def test_clean_is_idempotent_on_ascii_and_keeps_row_breaks():
    matrix = r"\begin{pmatrix} 1 \\ a \end{pmatrix}"
    assert clean(matrix) == matrix
    assert clean(r"-2 \\le x \\le 7") == r"-2 \le x \le 7"
    assert [kind for kind, _, _ in tokenize(r"\text{a b} 5")] == ["text", "num", "end"]

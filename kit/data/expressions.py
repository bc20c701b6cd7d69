"""Arithmetic expressions between numbers: from plain text, Unicode signs and LaTeX to tokens, then a value.

Values are exact: integers and fractions. Nothing is executed, and every length is capped.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from fractions import Fraction
from typing import NamedTuple

MAX_TOKENS = 240  # of one side of an equation; the longest problem of kit/data/arithmetic.py has 47
MAX_DIGITS = 60  # of a number in an equation; the largest product of such a problem has about 30
MAX_NESTING = 20  # brackets within brackets


def evaluate(expression: str) -> Fraction | int:
    """Compute an arithmetic expression, or the one that a problem ends with.

    Raises ValueError if the text does not end with one, or if it divides by zero.
    """
    return solve(expression).value


def solve(problem: str) -> Computed:
    """Compute the expression at the end of a problem, ignoring "= ?", and count its operations.

    Raises ValueError as evaluate does.
    """
    problem = problem.rstrip(" ?=.\n")
    tokens = [token for token in tokens_of(problem.rpartition(":")[2]) if token.kind != "gap"]
    found = compute(tokens)
    if found is None:
        raise ValueError(
            f"{problem[-80:]!r} does not end with an arithmetic expression that has a value; pass a problem"
        )
    return found


class Token(NamedTuple):
    kind: str  # "number", "op", "(", ")", "=", "word" (of text: it may end an equation), "gap" (punctuation)
    value: object
    start: int
    end: int


_TOKEN = re.compile(
    r"""(?P<bullet>(?<![^\n])[^\S\n]*[-–*+•](?=[^\S\n]))
      | (?P<skip>(?:[^\S\n]|\*\*|[$&~]
            |\\(?:[,;:!>\ ()\[\]$]|(?:left|right|[bB]igg?[lr]?|displaystyle|boxed|quad)(?![A-Za-z])))+)
      | (?P<number>[0-9]{1,3}(?:(?:,|\{,\}|,\\!|\\,|[\u202f\u2009])[0-9]{3})+(?![0-9])(?:\.[0-9]+)?
            |[0-9]+(?:\.[0-9]+)?)
      | (?P<fraction>\\[dtc]?frac(?=\s*\{))
      | (?P<times>\\(?:times|cdot|ast)(?![A-Za-z])|[*×·⋅∗]|(?<=[0-9)\s])[xX](?=[^\S\n]?[0-9(]))
      | (?P<over>\\div(?![A-Za-z])|[/÷∕])
      | (?P<minus>[-−–]) | (?P<plus>\+)
      | (?P<open>[(\[{]) | (?P<close>[)\]}])
      | (?P<equals>==?|\bequals\b|\bis\ equal\ to\b)
      | (?P<row>\n|\\\\(?:\[[^\]\n]{0,9}\])?)
      | (?P<gap>\\(?:begin|end)\{[a-z]{1,9}\*?\}|[,;.:?!"'|]|</?[a-z]{1,12}>|[<>→⇒✓✗]
            |\\(?:implies|Rightarrow|rightarrow|to)(?![A-Za-z]))
      | (?P<word>\\[A-Za-z]+|[^\W\d_]+|.)""",
    re.VERBOSE | re.DOTALL,
)
# name in _TOKEN -> the token's kind, and its value if that is not the text
_KINDS = {
    "times": ("op", "*"), "over": ("op", "/"), "minus": ("op", "-"), "plus": ("op", "+"),
    "open": ("(", ""), "close": (")", ""), "equals": ("=", "="), "bullet": ("gap", ""), "row": ("gap", "\n"),
}  # fmt: skip


def tokens_of(text: str) -> list[Token]:
    """Split a text into tokens. A line break is no token if an equation continues behind it."""
    found: list[Token] = []
    for match in _TOKEN.finditer(text):
        name, before = match.lastgroup, found[-1] if found else Token("", "", 0, 0)
        if name == "skip" or (name == "row" and (before.kind == "=" or before.value == "\n")):
            continue
        if name == "equals" and before.value == "\n":
            found.pop()
        kind, value = _KINDS.get(name, (name, ""))
        value = value or match[0]
        if kind == "number":
            digits = re.sub(r"[^0-9.]", "", value)
            kind, value = ("number", _number(digits)) if len(digits) <= MAX_DIGITS else ("word", value)
        found.append(Token(kind, value, match.start(), match.end()))
    return found


def _number(digits: str) -> Fraction | int:
    return Fraction(digits) if "." in digits else int(digits)


class Computed(NamedTuple):
    value: Fraction | int
    num_operations: int


class _Reader:
    """Recursive-descent parser for the tokens of one side. `read` raises ValueError if it cannot parse."""

    def __init__(self, tokens: Sequence[Token]):
        self.tokens = tokens
        self.index = self.depth = self.num_operations = 0

    def peek(self) -> tuple[str, object]:
        return self.tokens[self.index][:2] if self.index < len(self.tokens) else ("end", "")

    def read(self) -> Computed:
        value = self.sum()
        if self.index < len(self.tokens):
            raise ValueError("something is left")
        return Computed(value, self.num_operations)

    def sum(self):
        value = self.product()
        while self.peek() in (("op", "+"), ("op", "-")):
            sign = self.tokens[self.index].value
            self.index += 1
            other = self.product()
            value = self.operate(value + other if sign == "+" else value - other)
        return value

    def product(self):
        value = self.operand()
        while True:
            kind, sign = self.peek()
            if kind == "op" and sign in "*/":
                self.index += 1
                other = self.operand()
                value = self.operate(value * other if sign == "*" else _quotient(value, other))
            elif kind == "(" and self.tokens[self.index].start == self.tokens[self.index - 1].end:  # 3(4+5)
                value = self.operate(value * self.operand())
            else:
                return value

    def operand(self):
        kind, value = self.peek()
        self.index += 1
        if kind == "number":
            return value
        if kind == "op" and value in "+-":
            following = self.operand()
            return -following if value == "-" else following
        if kind == "fraction":
            top, bottom = self.operand(), self.operand()
            return self.operate(_quotient(top, bottom))
        if kind != "(" or self.depth >= MAX_NESTING:
            raise ValueError("no operand")
        self.depth += 1
        inner = self.sum()
        if self.peek()[0] != ")":
            raise ValueError("a bracket is left open")
        self.index += 1
        self.depth -= 1
        return inner

    def operate(self, value):
        self.num_operations += 1
        return value


def _quotient(a, b):
    if b == 0:
        raise ValueError("a division by zero")
    quotient = Fraction(a) / b
    return quotient.numerator if quotient.denominator == 1 else quotient


def compute(tokens: Sequence[Token]) -> Computed | None:
    """Evaluate the tokens as one expression; None if they are none."""
    if not 0 < len(tokens) <= MAX_TOKENS:
        return None
    try:
        return _Reader(tokens).read()
    except ValueError:
        return None

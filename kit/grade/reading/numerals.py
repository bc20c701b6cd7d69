r"""Read numbers: digits, decimals that repeat or go on, and digits in a base."""

from __future__ import annotations

import re
from fractions import Fraction

from kit.grade.limits import MAX_DIGITS, ParseError, TooLarge

BASE_WORDS = {
    "two": 2, "three": 3, "four": 4, "five": 5, "six": 6, "seven": 7, "eight": 8, "nine": 9, "ten": 10,
    "twelve": 12, "sixteen": 16, "hex": 16, "oct": 8, "bin": 2,
}  # fmt: skip

_NOT_DIGITS = re.compile("[^0-9]")
# 0.333 and 0.142857142857
_PERIOD = re.compile(r"([0-9]*\.[0-9]{0,40}?)(?:([0-9])\2{2,40}|([0-9]{2,6})\3{1,10})")


def number_node(digits: str, exponent: int = 0) -> tuple:
    """Return the node of a plain unsigned number such as "033", "1.50" or ".5", times a power of ten."""
    if len(digits) > MAX_DIGITS or abs(exponent) > MAX_DIGITS:
        raise TooLarge(
            f"a number of {len(digits)} digits and exponent {exponent} is beyond {MAX_DIGITS} digits"
        )
    whole, point, decimals = digits.partition(".")
    value = Fraction(int(whole + decimals or "0"))
    shift = exponent - len(decimals)
    value = value * 10**shift if shift >= 0 else value / 10**-shift
    if not point:
        return ("num", value)
    return ("dec", value, max(1, len((whole + decimals).lstrip("0"))), -shift)


def repeating(text: str) -> Fraction:
    r"""Return the exact value of a repeating decimal such as 0.1\overline{6}."""
    match = re.match(r"([0-9]*)\.([0-9]*)", text)
    whole, decimals = match.groups()
    digits, repeated = match[0], _NOT_DIGITS.sub("", text[match.end() :])
    if len(digits) > MAX_DIGITS:
        raise TooLarge(f"a number of {len(digits)} digits is beyond {MAX_DIGITS} digits")

    head, shift = int(whole + decimals or "0"), 10 ** len(repeated)
    return Fraction(head * shift + int(repeated) - head, 10 ** len(decimals) * (shift - 1))


def continued(node: tuple, digits: str) -> tuple:
    """Return the node of a decimal with dots after it: 0.333... is 1/3, and 3.14... is the decimal 3.14."""
    match = _PERIOD.fullmatch(digits) if len(digits) <= 60 else None
    return node if match is None else ("num", repeating(f"{match[1]}({match[2] or match[3]})"))


def in_base(digits: tuple[str, int] | None, written: str) -> tuple:
    """Return the node of digits, as their token has them, in a base written as 2, (2), two or base 2.

    Raises ParseError if there are no digits, if the base is not from 2 to 36, or if a digit is too large.
    """
    text = written.lower().strip("()").removeprefix("base").strip()
    base = BASE_WORDS.get(text) or (int(text) if text.isascii() and text.isdecimal() and len(text) < 3 else 0)
    if not 2 <= base <= 36 or digits is None:
        raise ParseError(f"cannot read a number in base {written!r}")
    try:
        return ("num", Fraction(int(digits[0], base)))
    except ValueError as error:
        raise ParseError(f"{digits[0]!r} has a digit that base {base} does not have") from error


def join_decimal_comma(tokens: list) -> None:
    """Join 0,05 to one decimal, in place: nobody lists a number as 05.

    0,5 may be a list of two numbers and stays; the judge decides.
    """
    kinds = [(kind, value if kind == "sep" else "", spaced) for kind, value, spaced in tokens[-4:]]
    if kinds[:3] == [("num", "", kinds[0][2]), ("sep", ",", False), ("num", "", False)] and len(tokens) <= 5:
        whole, decimals = tokens[-4][1][0], tokens[-2][1][0]
        if whole.isdigit() and decimals.isdigit() and decimals[0] == "0" and len(decimals) > 1:
            tokens[-4:-1] = [("num", (f"{whole}.{decimals}", 0), kinds[0][2])]

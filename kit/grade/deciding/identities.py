"""Decide whether two expressions are equal, by their values.

Two expressions without symbols are equal if their difference falls with the precision as rounding error does,
up to 900 digits. So 1/2006! differs from 1/2004!, and 2^(2^-1000) from 1. Two expressions with symbols are
equal if they agree at seeded random points: exactly for rational functions (where "equal" is wrong with a
probability of about degree / 2^40 per point), to hundreds of digits for the others.
"""

from __future__ import annotations

import random
from fractions import Fraction

from kit.grade.deciding.values import Evaluator, context
from kit.grade.limits import Budget, Undecided, Undefined
from kit.grade.trees import Node, mentions, symbols

IMAGINARY_UNIT = ("const", "i")
PRECISIONS = (50, 120, 400, 900)  # decimal digits; most pairs are decided by the second
POINTS = 8


def same_number(left: Node, right: Node, budget: Budget, binding: dict[str, Fraction] | None = None) -> bool:
    """Whether two expressions without symbols, or two at the point `binding`, have the same value.

    Raises Undecided if 900 digits do not decide it.
    """
    previous = None
    for step, digits in enumerate(PRECISIONS):
        budget.spend(digits // 10)
        evaluator = Evaluator(digits, budget, binding)
        a, b = evaluator(left), evaluator(right)
        if isinstance(a, Fraction) and isinstance(b, Fraction):
            return a == b

        mp, a, b = evaluator.mp, evaluator.real(a), evaluator.real(b)
        difference = abs(a - b)
        if previous is not None:
            if difference and abs(difference - previous) <= difference * mp.mpf(10) ** -10:
                return False  # two precisions agree on a difference that is not zero
            floor = max(previous, (abs(a) + abs(b)) * mp.mpf(10) ** -PRECISIONS[step - 1])
            fall = digits - PRECISIONS[step - 1]
            if step >= 2 and not evaluator.absorbed and difference <= floor * mp.mpf(10) ** (20 - fall):
                return True  # the difference fell with the precision: it is rounding error
        previous = difference
    raise Undecided("not decided within 900 digits")


def points(names: frozenset[str]):
    """Yield seeded random points, the same for every pair: most coordinates are positive, some negative."""
    generator = random.Random(20250607)
    for index in range(POINTS):
        point = {}
        for name in sorted(names):
            size = Fraction(generator.randrange(1, 2**40), 2**38)
            point[name] = -size if index % 3 == 2 and generator.random() < 0.7 else size
        yield point


def same_function(left: Node, right: Node, budget: Budget) -> bool | None:
    """Whether two expressions agree at every random point where both are defined.

    Return None if they are defined at too few points, or differ only at points where a value is complex.
    """
    names = symbols(left) | symbols(right)
    means_complex = mentions(left, IMAGINARY_UNIT) or mentions(right, IMAGINARY_UNIT)
    real_points = complex_points = 0
    differ_where_complex = False  # principal values: a root of a negative number may be meant as the real one

    for binding in points(names):
        try:
            values = [Evaluator(50, budget, binding)(side) for side in (left, right)]
            is_complex = not means_complex and any(
                not isinstance(value, Fraction) and context(50).im(value) != 0 for value in values
            )
            same = same_number(left, right, budget, binding)
        except Undefined:
            continue
        if not same and not is_complex:
            return False
        differ_where_complex |= not same
        real_points += not is_complex
        complex_points += is_complex

    if real_points >= 4:
        return True
    return None if differ_where_complex or real_points + complex_points < 4 else True


def proportional(left: Node, right: Node, budget: Budget, positive: bool) -> bool | None:
    """Whether left = c * right for a constant c != 0: then left = 0 and right = 0 are the same equation.

    positive: c must be positive, as it must for an inequality. Return None if too few points show it.
    """
    names = symbols(left) | symbols(right)
    if not names:  # any two numbers are proportional: f(2) = 3 is not f(3) = 2
        return None
    constant, agreed = None, 0
    for binding in points(names):
        try:
            top, bottom = (Evaluator(50, budget, binding)(side) for side in (left, right))
        except Undefined:
            continue
        if not top or not bottom:
            if bool(top) != bool(bottom):
                return False
            continue

        evaluator = Evaluator(50, budget)
        ratio = top / bottom if isinstance(top, Fraction) and isinstance(bottom, Fraction) else None
        if ratio is None:
            ratio = evaluator.real(top) / evaluator.real(bottom)
            if evaluator.mp.im(ratio) != 0:
                continue
            ratio = evaluator.mp.re(ratio)
        if positive and ratio < 0:
            return False
        if constant is None:
            constant = ratio
        elif isinstance(ratio, Fraction) and isinstance(constant, Fraction):
            if ratio != constant:
                return False
        else:
            expected = evaluator.real(constant)
            if abs(evaluator.real(ratio) - expected) > abs(expected) * evaluator.mp.mpf(10) ** -40:
                return False
        agreed += 1

    return True if agreed >= 4 else None


def rounds_to(decimal: Node, exact: Node, digits: int, budget: Budget) -> bool:
    """Whether a decimal of at least `digits` significant digits is the exact value, rounded or cut off."""
    written, unit, significant = decimal_of(decimal)
    if significant < digits:
        return False
    evaluator = Evaluator(max(50, significant + 20), budget)
    value = evaluator(exact)
    if isinstance(value, Fraction):
        error = value - written
    else:
        if evaluator.mp.im(value) != 0:
            return False
        error, unit = value - evaluator.real(written), evaluator.real(unit)
    if abs(error) <= unit / 2:
        return True
    return 0 <= (error if written >= 0 else -error) < unit


def decimal_of(node: Node) -> tuple[Fraction, Fraction, int] | None:
    """Return (value, unit in the last place, significant digits) of a decimal literal, else None.

    A decimal times a power of ten is one too: 2.5 * 10^-3.
    """
    if node[0] == "dec":
        return node[1], Fraction(10) ** -node[3], node[2]
    if node[0] == "mul":
        decimals = [part for part in node[1:] if part[0] == "dec"]
        rest = [part for part in node[1:] if part[0] != "dec"]
        if len(decimals) == 1 and all(_power_of_ten(part) is not None for part in rest):
            value, unit, significant = decimal_of(decimals[0])
            for part in rest:
                value, unit = value * _power_of_ten(part), unit * abs(_power_of_ten(part))
            return value, unit, significant
    return None


def _power_of_ten(node: Node) -> Fraction | None:
    """Return the value of a power of ten, which may have a sign, or None for any other node."""
    if node[0] == "num":
        larger, smaller = sorted((abs(node[1].numerator), node[1].denominator), reverse=True)
        return node[1] if smaller == 1 and larger < 10**50 and str(larger).strip("0") == "1" else None
    if node[0] == "pow" and node[1] == ("num", Fraction(10)) and node[2][0] == "num":
        exponent = node[2][1]
        return Fraction(10) ** exponent if exponent.denominator == 1 and abs(exponent) < 4_000 else None
    return None


def same_decimals(a: tuple, b: tuple) -> bool:
    """Whether two decimals are equal: exactly, or to double precision if one was printed from a double."""
    if a[0] == b[0]:
        return True
    printed = max(a[2], b[2]) >= 15 > min(a[2], b[2])
    return printed and abs(a[0] - b[0]) <= max(abs(a[0]), abs(b[0])) / 2**50

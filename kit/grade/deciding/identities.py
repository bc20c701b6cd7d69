"""Are two expressions equal? Closed forms by falling rounding error, expressions with symbols by their values at random points.

Two closed forms are equal when their difference falls with the precision as rounding error does, up to 900 digits, so that
1/2006! differs from 1/2004!, and 2^(2^-1000) from 1. Two expressions with symbols are equal when they agree at seeded random
points: exactly for rational functions (a wrong "equal" has a chance of about degree / 2^40 a point), to hundreds of digits for
the others.
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


def _difference(left: Node, right: Node, digits: int, budget: Budget, binding: dict | None):
    """(|left - right|, |left| + |right|, whether it can be trusted to be zero), exact Fractions where both values are."""
    evaluator = Evaluator(digits, budget, binding)
    a, b = evaluator(left), evaluator(right)
    if isinstance(a, Fraction) and isinstance(b, Fraction):
        return abs(a - b), abs(a) + abs(b), True
    a, b = evaluator.real(a), evaluator.real(b)
    return abs(a - b), abs(a) + abs(b), not evaluator.absorbed


def same_number(left: Node, right: Node, budget: Budget, binding: dict[str, Fraction] | None = None) -> bool:
    """Whether two closed expressions (or two expressions at one point) have the same value. Undecided where digits run out."""
    previous = None
    for step, digits in enumerate(PRECISIONS):
        budget.spend(digits // 10)
        difference, scale, trusted = _difference(left, right, digits, budget, binding)
        if isinstance(difference, Fraction):
            return difference == 0
        mp = context(digits)
        if previous is not None:
            if difference and abs(difference - previous) <= difference * mp.mpf(10) ** -10:
                return False  # two precisions agree on a difference that is not zero
            floor = max(previous, scale * mp.mpf(10) ** -PRECISIONS[step - 1])
            fall = digits - PRECISIONS[step - 1]
            if step >= 2 and trusted and difference <= floor * mp.mpf(10) ** (20 - fall):
                return True  # the difference fell with the precision: it is rounding error
        previous = difference
    raise Undecided("not decided within 900 digits")


def points(names: frozenset[str]):
    """Seeded random points, the same for every pair: most of them positive, some negative."""
    generator = random.Random(20250607)
    for index in range(POINTS):
        yield {
            name: Fraction(generator.randrange(1, 2**40), 2**38)
            * (-1 if index % 3 == 2 and generator.random() < 0.7 else 1)
            for name in sorted(names)
        }


def same_function(left: Node, right: Node, budget: Budget) -> bool | None:
    """Whether two expressions agree at every point where both are defined and real; None if too few points are."""
    names = symbols(left) | symbols(right)
    means_complex = mentions(left, IMAGINARY_UNIT) or mentions(right, IMAGINARY_UNIT)
    real_points, complex_points = 0, 0
    for binding in points(names):
        try:
            values = [Evaluator(50, budget, binding)(side) for side in (left, right)]
            is_complex = not means_complex and any(
                not isinstance(value, Fraction) and context(50).im(value) != 0 for value in values
            )
            if not same_number(left, right, budget, binding):
                if not is_complex:
                    return False
                complex_points -= (
                    100  # principal values: a root of a negative number may be meant as the real one
                )
            elif is_complex:
                complex_points += 1
            else:
                real_points += 1
        except Undefined:
            continue
    if real_points >= 4:
        return True
    return None if complex_points < 0 or real_points + complex_points < 4 else True


def proportional(left: Node, right: Node, budget: Budget, positive: bool) -> bool | None:
    """Whether left = c * right for one constant c != 0 (c > 0 where asked): the same equation, or the same inequality."""
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
        if positive and ratio < 0:
            return False
        if constant is None:
            constant = ratio
        elif isinstance(ratio, Fraction) and isinstance(constant, Fraction):
            if ratio != constant:
                return False
        elif (
            abs(evaluator.real(ratio) - evaluator.real(constant))
            > abs(evaluator.real(constant)) * evaluator.mp.mpf(10) ** -40
        ):
            return False
        agreed += 1
    return True if agreed >= 4 else None


def rounds_to(decimal: Node, exact: Node, digits: int, budget: Budget) -> bool:
    """Whether the decimal, written with at least `digits` significant digits, is the exact value rounded or cut off."""
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
    """(value, unit in the last place, significant digits) of a decimal literal, 2.5e-3 as 2.5 times a power of ten included."""
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
    if node[0] == "num":
        size = abs(node[1])
        digits = (
            str(max(size.numerator, size.denominator))
            if size and max(size.numerator, size.denominator) < 10**50
            else ""
        )
        return node[1] if 1 in (size.numerator, size.denominator) and digits.strip("0") == "1" else None
    if (
        node[0] == "pow"
        and node[1] == ("num", Fraction(10))
        and node[2][0] == "num"
        and node[2][1].denominator == 1
    ):
        return Fraction(10) ** node[2][1].numerator if abs(node[2][1]) < 4_000 else None
    return None


def same_decimals(a: tuple, b: tuple) -> bool:
    """Two decimals are equal exactly, or to a double's precision where one of them was printed from a double."""
    if a[0] == b[0]:
        return True
    printed = max(a[2], b[2]) >= 15 > min(a[2], b[2])
    return printed and abs(a[0] - b[0]) <= max(abs(a[0]), abs(b[0])) / 2**50

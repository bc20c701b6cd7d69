"""The value of an answer's tree, exactly where it is rational, else to as many digits as a comparison needs.

`evaluate` returns a Fraction, or a number of mpmath's where the value is irrational or complex. `same_number` and
`same_function` decide equality. Two closed forms are equal when their difference falls with the precision as rounding error
does, up to 900 digits, so that 1/2006! differs from 1/2004!, and 2^(2^-1000) from 1. Two expressions with symbols are equal
when they agree at seeded random points: exactly for rational functions, to 50 digits and with the same fall for the others.

Every operation is capped before it runs (bits of an exact result, magnitude of an exponent, number of steps): a tower of powers
raises TooLarge at once. Nothing here can be interrupted from outside, so nothing here may take long.
"""

from __future__ import annotations

import math
import random
import threading
import time
from collections.abc import Callable
from fractions import Fraction

from kit.answers import OPAQUE, Node, TooLarge

MAX_BITS = 60_000  # 1/2006! has 19,000 bits; a product of two numbers at the cap costs under a millisecond
MAX_MAGNITUDE = 1_000  # |log2| of an exponent or an angle: mpmath needs that many bits more to reduce it
MAX_FACTORIAL = 4_000
MAX_TERMS = 2_000  # of a sum or product that is added up here
PRECISIONS = (50, 120, 400, 900)  # decimal digits; most pairs are decided by the second
POINTS = 8


class NotNumeric(ValueError):
    """The expression has no number as its value: a symbol is unbound, a function unknown, a set where a number belongs."""


class Undefined(ValueError):
    """The value does not exist at this point (a division by zero, say)."""


class Undecided(ValueError):
    """Equality could not be decided within the caps; the message is the rule that the verdict reports."""


class Budget:
    """Steps and time that one comparison may spend."""

    def __init__(self, deadline_at: float, steps: int = 400_000):
        self.deadline_at = deadline_at
        self.steps = steps

    def spend(self, steps: int = 1) -> None:
        self.steps -= steps
        if self.steps < 0:
            raise Undecided("too many steps")
        if time.monotonic() > self.deadline_at:
            raise Undecided("deadline")


_local = threading.local()


def context(digits: int):
    """This thread's mpmath context at a precision. mpmath's own `mp` is one global for all threads, precision included."""
    contexts = _local.__dict__.setdefault("contexts", {})
    if digits not in contexts:
        import mpmath  # 60 ms: only once an irrational value is met

        contexts[digits] = mpmath.ctx_mp.MPContext()
        contexts[digits].dps = digits
    return contexts[digits]


class Evaluator:
    """Evaluates trees at one precision and one binding of the symbols."""

    def __init__(self, digits: int, budget: Budget, binding: dict[str, Fraction] | None = None):
        self.digits = digits
        self.budget = budget
        self.binding = binding or {}

    @property
    def mp(self):
        return context(self.digits)

    def real(self, value):
        """A value as mpmath's number."""
        if isinstance(value, Fraction):
            return self.mp.mpf(value.numerator) / value.denominator
        return value

    def __call__(self, node: Node):
        self.budget.spend()
        method = getattr(self, "_" + node[0], None)
        if method is None:
            raise NotNumeric(f"no number: {node[0]}")
        value = method(node)
        if isinstance(value, Fraction):
            if value.numerator.bit_length() + value.denominator.bit_length() > MAX_BITS:
                return self.real(value)
        elif not self.mp.isfinite(value):
            raise Undefined("not finite")
        return value

    def _num(self, node):
        return node[1]

    _dec = _num

    def _sym(self, node):
        if node[1] not in self.binding:
            raise NotNumeric(f"a symbol without a value: {node[1]}")
        return self.binding[node[1]]

    def _const(self, node):
        if node[1] == "inf":
            raise NotNumeric("infinity")
        return self.mp.mpc(0, 1) if node[1] == "i" else +getattr(self.mp, node[1])

    def _add(self, node):
        total = Fraction(0)
        for part in node[1:]:
            total = self._pair(total, self(part), lambda a, b: a + b)
        return total

    def _mul(self, node):
        total = Fraction(1)
        for part in node[1:]:
            total = self._pair(total, self(part), lambda a, b: a * b)
            if isinstance(total, Fraction) and total.numerator.bit_length() + total.denominator.bit_length() > MAX_BITS:
                total = self.real(total)
        return total

    def _pair(self, left, right, operation: Callable):
        if isinstance(left, Fraction) and isinstance(right, Fraction):
            return operation(left, right)
        return operation(self.real(left), self.real(right))

    def _percent(self, node):
        return self(node[1]) / 100

    def _unit(self, node):
        return self(node[1])

    def _deg(self, node):
        return self.real(self(node[1])) * self.mp.pi / 180

    def _apply(self, node):
        if node[1][0] in OPAQUE or len(node) > 3:
            raise NotNumeric(f"an unknown function: {node[1]}")
        return self._mul(("mul", ("sym", node[1]), node[2]))

    def _ratio(self, node):
        if len(node) != 3:
            raise NotNumeric("a ratio of more than two")
        return self._mul(("mul", node[1], ("pow", node[2], ("num", Fraction(-1)))))

    def _pow(self, node):
        base, exponent = self(node[1]), self(node[2])
        if base == 0 and isinstance(exponent, Fraction):
            if exponent < 0:
                raise Undefined("a division by zero")
            return Fraction(int(exponent == 0))
        if isinstance(base, Fraction) and isinstance(exponent, Fraction):
            if abs(base) == 1 and exponent.denominator == 1:
                return base ** (exponent.numerator % 2)
            size = max(base.numerator.bit_length(), base.denominator.bit_length())
            if abs(exponent) * size < MAX_BITS:
                if exponent.denominator == 1:
                    return base**exponent.numerator
                root = exact_root(base, exponent.denominator)
                if root is not None:
                    return root**exponent.numerator
        base, exponent = self.real(base), self.real(exponent)
        self._check_size(exponent)
        return self.mp.power(base, exponent)

    def _check_size(self, value) -> None:
        if self.mp.mag(value) > MAX_MAGNITUDE:
            raise TooLarge("an exponent or an angle is beyond every cap")

    def _root(self, node):
        index, value = self(node[1]), self(node[2])
        if not isinstance(index, Fraction) or index.denominator != 1 or not 1 < index < 1_000:
            return self._pow(("pow", node[2], ("pow", node[1], ("num", Fraction(-1)))))
        if isinstance(value, Fraction):
            exact = exact_root(value, index.numerator)
            if exact is not None:
                return exact
        value = self.real(value)
        if index % 2 and self.mp.im(value) == 0 and value < 0:  # a real odd root, as it is meant at school
            return -self.mp.root(-value, index.numerator)
        return self.mp.root(value, index.numerator)

    def _fact(self, node):
        value = self(node[1])
        if isinstance(value, Fraction) and value.denominator == 1 and value < 0:
            raise Undefined("a factorial of a negative integer")
        if isinstance(value, Fraction) and value.denominator == 1 and value <= MAX_FACTORIAL:
            return Fraction(math.factorial(value.numerator))
        value = self.real(value)
        if self.mp.mag(value) > 64:
            raise TooLarge("a factorial beyond every cap")
        return self.mp.gamma(value + 1)

    def _binom(self, node):
        top, bottom = self(node[1]), self(node[2])
        if all(isinstance(value, Fraction) and value.denominator == 1 for value in (top, bottom)):
            fewer = min(bottom, top - bottom)
            if 0 <= fewer < 2_000 and fewer * top.numerator.bit_length() < MAX_BITS:
                return Fraction(math.comb(top.numerator, bottom.numerator))
            if top >= 0 > fewer:
                return Fraction(0)
        top, bottom = self.real(top), self.real(bottom)
        if max(self.mp.mag(top), self.mp.mag(bottom)) > 64:
            raise TooLarge("a binomial beyond every cap")
        return self.mp.binomial(top, bottom)

    def _call(self, node):
        name, arguments = node[1], [self(argument) for argument in node[2:]]
        if name in ("abs", "floor", "ceil", "gcd", "lcm", "max", "min"):
            return self._exact_call(name, arguments)
        numbers = [self.real(argument) for argument in arguments]
        first = numbers[0]
        if name in ("ln", "log", "lg"):
            if first == 0:
                raise Undefined("the logarithm of zero")
            base = self.mp.mpf(10) if name == "lg" else numbers[1] if len(numbers) == 2 else None
            if base is not None and (base == 0 or base == 1):
                raise Undefined("a logarithm to the base 0 or 1")
            return self.mp.log(first) if base is None else self.mp.log(first) / self.mp.log(base)
        if len(numbers) != 1:
            raise NotNumeric(f"{name} of {len(numbers)} values")
        self._check_size(first)
        name = {"arcsin": "asin", "arccos": "acos", "arctan": "atan", "Re": "re", "Im": "im"}.get(name, name)
        if name == "det":
            raise NotNumeric("a determinant")
        try:
            return getattr(self.mp, name)(first)
        except ZeroDivisionError as error:
            raise Undefined(f"{name} has a pole here") from error

    def _exact_call(self, name: str, arguments: list):
        if name == "abs" and len(arguments) == 1:
            return abs(arguments[0])
        if name in ("floor", "ceil") and len(arguments) == 1:
            if isinstance(arguments[0], Fraction):
                return Fraction(math.floor(arguments[0]) if name == "floor" else math.ceil(arguments[0]))
            return getattr(self.mp, name)(arguments[0])
        if all(isinstance(argument, Fraction) for argument in arguments):
            if name in ("max", "min"):
                return max(arguments) if name == "max" else min(arguments)
            if all(argument.denominator == 1 for argument in arguments):
                return Fraction(getattr(math, name)(*(argument.numerator for argument in arguments)))
        raise NotNumeric(f"{name} of values that are not rational")

    def _big(self, node):
        name, variable, low, high, body = node[1:]
        if name == "int":
            raise NotNumeric("an integral")
        low, high = self(low), self(high)
        if not all(isinstance(bound, Fraction) and bound.denominator == 1 for bound in (low, high)) or high - low >= MAX_TERMS:
            raise NotNumeric("a sum that is too long to add up")
        terms = Evaluator(self.digits, self.budget, dict(self.binding))
        total = Fraction(int(name == "prod"))
        for value in range(low.numerator, high.numerator + 1):
            terms.binding[variable] = Fraction(value)
            total = self._pair(total, terms(body), (lambda a, b: a * b) if name == "prod" else (lambda a, b: a + b))
        return total


def exact_root(value: Fraction, index: int) -> Fraction | None:
    """The rational root of a nonnegative fraction (of a negative one too, where the index is odd), or None."""
    if value < 0:
        root = exact_root(-value, index) if index % 2 else None
        return None if root is None else -root
    if value.numerator.bit_length() + value.denominator.bit_length() > 4_000:
        return None
    parts = []
    for number in (value.numerator, value.denominator):
        root = _integer_root(number, index)
        if root**index != number:
            return None
        parts.append(root)
    return Fraction(*parts)


def _integer_root(number: int, index: int) -> int:
    """The floor of the root of a nonnegative integer, by bisection."""
    if index == 2:
        return math.isqrt(number)
    low, high = 0, 1 << (number.bit_length() // index + 1)
    while high - low > 1:
        middle = (low + high) // 2
        if middle**index <= number:
            low = middle
        else:
            high = middle
    return low


def _difference(left: Node, right: Node, digits: int, budget: Budget, binding: dict | None):
    """(|left - right|, |left| + |right|), the first as an exact Fraction where both values are."""
    evaluator = Evaluator(digits, budget, binding)
    a, b = evaluator(left), evaluator(right)
    if isinstance(a, Fraction) and isinstance(b, Fraction):
        return abs(a - b), abs(a) + abs(b)
    a, b = evaluator.real(a), evaluator.real(b)
    return abs(a - b), abs(a) + abs(b)


def same_number(left: Node, right: Node, budget: Budget, binding: dict[str, Fraction] | None = None) -> bool:
    """Whether two closed expressions (or two expressions at one point) have the same value. Undecided where digits run out."""
    previous = None
    for step, digits in enumerate(PRECISIONS):
        budget.spend(digits // 10)
        difference, scale = _difference(left, right, digits, budget, binding)
        if isinstance(difference, Fraction):
            return difference == 0
        mp = context(digits)
        if previous is not None:
            if difference and abs(difference - previous) <= difference * mp.mpf(10) ** -10:
                return False  # two precisions agree on a difference that is not zero
            floor = max(previous, scale * mp.mpf(10) ** -PRECISIONS[step - 1])
            fall = digits - PRECISIONS[step - 1]
            if step >= 2 and difference <= floor * mp.mpf(10) ** (20 - fall):
                return True  # the difference fell with the precision: it is rounding error
        previous = difference
    raise Undecided("not decided within 900 digits")


def symbols(node: Node) -> frozenset[str]:
    """The free symbols of a tree."""
    if node[0] in ("sym", "apply"):
        own = frozenset((node[1],)) if node[0] == "sym" or node[1][0] not in OPAQUE else frozenset()
        return own.union(*(symbols(part) for part in node[2:])) if node[0] == "apply" else own
    found = frozenset().union(*(symbols(part) for part in node if isinstance(part, tuple) and part))
    return found - {node[2]} if node[0] == "big" else found


def points(names: frozenset[str]):
    """Seeded random points, the same for every pair: most of them positive, some negative."""
    generator = random.Random(20250607)
    for index in range(POINTS):
        yield {
            name: Fraction(generator.randrange(1, 2**40), 2**38) * (-1 if index % 3 == 2 and generator.random() < 0.7 else 1)
            for name in sorted(names)
        }


def same_function(left: Node, right: Node, budget: Budget) -> bool | None:
    """Whether two expressions agree at every point where both are defined and real; None where too few points are."""
    names = symbols(left) | symbols(right)
    real_points, complex_points = 0, 0
    for binding in points(names):
        try:
            values = [Evaluator(50, budget, binding)(side) for side in (left, right)]
            is_complex = any(not isinstance(value, Fraction) and context(50).im(value) != 0 for value in values)
            if not same_number(left, right, budget, binding):
                if not is_complex:
                    return False
                complex_points -= 100  # principal values: a root of a negative number may be meant as the real one
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
        elif abs(evaluator.real(ratio) - evaluator.real(constant)) > abs(evaluator.real(constant)) * evaluator.mp.mpf(10) ** -40:
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
        digits = str(max(size.numerator, size.denominator)) if size and max(size.numerator, size.denominator) < 10**50 else ""
        return node[1] if 1 in (size.numerator, size.denominator) and digits.strip("0") == "1" else None
    if node[0] == "pow" and node[1] == ("num", Fraction(10)) and node[2][0] == "num" and node[2][1].denominator == 1:
        return Fraction(10) ** node[2][1].numerator if abs(node[2][1]) < 4_000 else None
    return None

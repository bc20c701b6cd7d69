"""Compute the value of a tree: exactly if it is rational, else as an mpmath number at a given precision.

Every operation is capped before it runs (bits of an exact result, magnitude of an exponent, number of steps):
a tower of powers raises TooLarge at once. Nothing here can be interrupted from outside, so nothing may take
long.
"""

from __future__ import annotations

import math
import random
import threading
from collections.abc import Callable
from fractions import Fraction

from kit.grade.limits import Budget, NotNumeric, TooLarge, Undefined
from kit.grade.trees import Node, to_json
from kit.grade.vocabulary import OPAQUE

MAX_BITS = 60_000  # 1/2006! has 19,000 bits; a product of two numbers at the cap costs under a millisecond
MAX_MAGNITUDE = 1_000  # |log2| of an exponent or an angle: mpmath needs that many more bits to reduce it
MAX_FACTORIAL = 4_000
MAX_TERMS = 2_000  # of a sum or product that is computed here

_local = threading.local()


def context(digits: int):
    """Return this thread's mpmath context at a precision in decimal digits.

    mpmath's own `mp` is one global for all threads, including its precision.
    """
    contexts = _local.__dict__.setdefault("contexts", {})
    if digits not in contexts:
        import mpmath  # takes 60 ms: only when an irrational value is met

        contexts[digits] = mpmath.ctx_mp.MPContext()
        contexts[digits].dps = digits
    return contexts[digits]


class Evaluator:
    """Evaluates trees at one precision and one binding of the symbols."""

    def __init__(self, digits: int, budget: Budget, binding: dict[str, Fraction] | None = None):
        self.digits = digits
        self.budget = budget
        self.binding = binding or {}
        # whether something was too small to show at this precision: then values that look equal may differ
        self.absorbed = False

    @property
    def mp(self):
        return context(self.digits)

    def real(self, value):
        """Return a value as an mpmath number."""
        if not isinstance(value, Fraction):
            return value
        if _bits(value) > self.mp.prec:
            self.absorbed = True
        return self.mp.mpf(value.numerator) / value.denominator

    def __call__(self, node: Node):
        self.budget.spend()
        method = getattr(self, "_" + node[0], None)
        if method is None:
            raise NotNumeric(f"no number: {node[0]}")
        try:
            value = method(node)
        except ZeroDivisionError as error:  # 0^{i^2}
            raise Undefined("a division by zero") from error
        if isinstance(value, Fraction):
            if _bits(value) > MAX_BITS:
                return self.real(value)
        elif not self.mp.isfinite(value):
            raise Undefined("not finite")
        elif self.mp.im(value) == 0:  # i^2: complex numbers have no order, not even such ones
            return self.mp.re(value)
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
            term = self(part)
            exact = isinstance(total, Fraction) and isinstance(term, Fraction)
            if not exact and total and term:
                # 60 bits beyond the precision: a term that is rounding error, like cos 90 degrees, is nearer
                distance = abs(self.mp.mag(self.real(total)) - self.mp.mag(self.real(term)))
                self.absorbed |= distance > self.mp.prec + 60
            total = self._pair(total, term, lambda a, b: a + b)
        return total

    def _mul(self, node):
        total = Fraction(1)
        for part in node[1:]:
            total = self._pair(total, self(part), lambda a, b: a * b)
            if isinstance(total, Fraction) and _bits(total) > MAX_BITS:
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
            arguments = [self(part) for part in node[2:]]
            if not all(isinstance(argument, Fraction) for argument in arguments):
                raise NotNumeric(f"an unknown function at a value that is not rational: {node[1]}")
            # an unknown function may have any value at any point: a random one, always the same
            seed = f"{node[1]} {to_json(tuple(arguments))}"
            return Fraction(random.Random(seed).randrange(1, 2**40), 2**38)
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
        """Raise TooLarge for an exponent or angle that is too large; note one that is too small to matter."""
        magnitude = self.mp.mag(value)
        if value and magnitude > MAX_MAGNITUDE:
            raise TooLarge("an exponent or an angle is beyond every cap")
        if value and magnitude < -self.mp.prec / 2:  # 2^x and cos x are 1 there, to this precision
            self.absorbed = True

    def _root(self, node):
        index, value = self(node[1]), self(node[2])
        if not isinstance(index, Fraction) or index.denominator != 1 or not 1 < index < 1_000:
            return self._pow(("pow", node[2], ("pow", node[1], ("num", Fraction(-1)))))
        if isinstance(value, Fraction):
            exact = exact_root(value, index.numerator)
            if exact is not None:
                return exact
        value = self.real(value)
        if index % 2 and self.mp.im(value) == 0 and value < 0:  # the real odd root, as meant at school
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
        try:
            return self.mp.gamma(value + 1)
        except ValueError as error:  # (i^2)!
            raise Undefined("a factorial of a negative integer") from error

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
        if len(arguments) != 1 and name not in ("gcd", "lcm", "max", "min", "ln", "log", "lg"):
            raise NotNumeric(f"{name} of {len(arguments)} values")
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
        self._check_size(first)
        name = {"arcsin": "asin", "arccos": "acos", "arctan": "atan"}.get(name, name)
        try:
            return getattr(self.mp, name)(first)
        except ZeroDivisionError as error:
            raise Undefined(f"{name} has a pole here") from error

    def _exact_call(self, name: str, arguments: list):
        exact = all(isinstance(argument, Fraction) for argument in arguments)
        if name == "abs":
            return abs(arguments[0])
        if name in ("floor", "ceil"):
            return Fraction(getattr(math, name)(*arguments)) if exact else getattr(self.mp, name)(*arguments)
        if exact and name in ("max", "min"):
            return max(arguments) if name == "max" else min(arguments)
        if exact and all(argument.denominator == 1 for argument in arguments):
            return Fraction(getattr(math, name)(*(argument.numerator for argument in arguments)))
        raise NotNumeric(f"{name} of values that are not rational")

    def _big(self, node):
        name, variable, low, high, body = node[1:]
        if name == "int":
            raise NotNumeric("an integral")

        low, high = self(low), self(high)
        whole = all(isinstance(bound, Fraction) and bound.denominator == 1 for bound in (low, high))
        if not whole or high - low >= MAX_TERMS:
            raise NotNumeric("a sum that is too long to add up")

        operation = (lambda a, b: a * b) if name == "prod" else (lambda a, b: a + b)
        terms = Evaluator(self.digits, self.budget, dict(self.binding))
        total = Fraction(int(name == "prod"))
        for value in range(low.numerator, high.numerator + 1):
            terms.binding[variable] = Fraction(value)
            total = self._pair(total, terms(body), operation)
        return total


def _bits(value: Fraction) -> int:
    return value.numerator.bit_length() + value.denominator.bit_length()


def exact_root(value: Fraction, index: int) -> Fraction | None:
    """Return the rational root of a fraction, or None; of a negative one only if the index is odd."""
    if value < 0:
        root = exact_root(-value, index) if index % 2 else None
        return None if root is None else -root
    if _bits(value) > 4_000:
        return None
    parts = []
    for number in (value.numerator, value.denominator):
        root = _integer_root(number, index)
        if root**index != number:
            return None
        parts.append(root)
    return Fraction(*parts)


def _integer_root(number: int, index: int) -> int:
    """Return the floor of the root of a nonnegative integer, by bisection."""
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

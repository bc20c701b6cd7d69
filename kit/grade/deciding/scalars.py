"""Decide whether two numbers or expressions are the same, with their percent signs, degrees and units."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from fractions import Fraction

from kit.grade.deciding.identities import decimal_of, rounds_to, same_decimals, same_function, same_number
from kit.grade.deciding.meaning import (
    half_of_day,
    is_clock,
    known_units,
    matrix_value,
    plain_words,
    times_of_day,
    unwrap,
)
from kit.grade.limits import Budget, NotNumeric, Undefined
from kit.grade.rules import Rule
from kit.grade.trees import Node, canonical, contains, mentions, product, rename, symbols

PI = ("const", "pi")


@dataclass(frozen=True)
class Options:
    """What counts as the same answer; the defaults are tolerant of notation and strict about values."""

    percent: str = "either"  # "either": 10 % is 10 or 0.1; "value": 10 % is 0.1 only
    # "known": two different known units differ, a missing one is forgiven; "ignore": units never matter;
    # "required": both sides have the unit, or neither
    units: str = "known"
    # "free": a bare list is a set; "strict": its order counts (tuples are always ordered, sets never)
    order: str = "free"
    # a decimal with at least this many significant digits stands for every exact value that rounds to it;
    # None: for its own value only
    rounding: int | None = 4

    def __post_init__(self):
        for name, allowed in (
            ("percent", ("either", "value")),
            ("units", ("known", "ignore", "required")),
            ("order", ("free", "strict")),
        ):
            value = getattr(self, name)
            if value not in allowed:
                raise ValueError(f"{name}={value!r}: pass one of {', '.join(map(repr, allowed))}")
        if self.rounding is not None and (type(self.rounding) is not int or self.rounding < 1):
            raise ValueError(
                f"rounding={self.rounding!r}: pass a number of digits from 1 on, or None for never"
            )


class ScalarJudge:
    """Compares two trees that stand for numbers. `rule` names the rule that decided last."""

    def __init__(self, options: Options, budget: Budget, prove: Callable[[Node, Node], bool]):
        self.options = options
        self.budget = budget
        self.prove = prove
        self.rule = ""
        self.tier = 1  # 2 once sympy was asked

    def decide(self, rule: Rule, verdict: bool) -> bool:
        """Name the rule and return its verdict."""
        self.rule = rule.value
        return verdict

    def decide_within(self, rule: Rule, verdict: bool) -> bool:
        """Name the rule, followed by the one that decided the part that was compared just before."""
        self.rule = f"{rule.value}, {self.rule}"
        return verdict

    def ask_sympy(self, a: Node, b: Node) -> bool:
        """Decide by the proof, which may raise Undecided."""
        self.tier = 2
        return self.decide(Rule.SYMPY, self.prove(a, b))

    def same(self, a: Node, b: Node) -> bool:
        """Whether two answers of any kind are the same. Judge implements it."""
        raise NotImplementedError

    def same_scalar(self, a: Node, b: Node) -> bool:
        """Compare two numbers or expressions with their units, percent and degree signs."""
        (a, marks_a), (b, marks_b) = unwrap(a), unwrap(b)
        for marks, others, side, other in ((marks_a, marks_b, a, b), (marks_b, marks_a, b, a)):
            letter = marks.get("unit", "")
            if len(letter) == 1 and "unit" not in others and letter in symbols(other):  # 5 m and 5m
                return self.same_expression(product([side, ("sym", letter)]), other)
        if not self.same_units(marks_a.get("unit"), marks_b.get("unit")):
            return self.decide(Rule.UNITS, False)

        halves = [half_of_day(marks.get("unit", "")) for marks in (marks_a, marks_b)]
        if any(halves):
            times = [times_of_day(side, half) for side, half in zip((a, b), halves, strict=True)]
            if all(times):
                return self.decide(Rule.TIME, not times[0].isdisjoint(times[1]))

        if ("percent" in marks_a) != ("percent" in marks_b):
            whole, percent = (b, a) if "percent" in marks_a else (a, b)
            if self.same_expression(whole, product([percent, ("num", Fraction(1, 100))])):
                return self.decide(Rule.PERCENT, True)
            plain = self.options.percent == "either" and self.same_expression(whole, percent)
            return self.decide(Rule.PERCENT, plain)

        if ("deg" in marks_a) != ("deg" in marks_b):
            plain, degrees = (b, a) if "deg" in marks_a else (a, b)
            if self.options.units != "required" and self.same_expression(plain, degrees):
                return self.decide(Rule.DEGREES, True)
            return self.decide(Rule.DEGREES, self.same_expression(plain, ("deg", degrees)))
        return self.same_expression(a, b)

    def same_units(self, a: str | None, b: str | None) -> bool:
        """Whether two units, or one and none, count as the same under the options."""
        if self.options.units == "ignore":
            return True
        if a is None or b is None:
            return a is b or self.options.units == "known"
        known_a, known_b = known_units(a), known_units(b)
        if self.options.units == "required" and not (known_a and known_b):
            return plain_words(a) == plain_words(b)
        return known_a <= known_b or known_b <= known_a  # dollars are dollars an hour, and 5 apples are 5

    def same_expression(self, a: Node, b: Node) -> bool:
        """Compare two numbers or expressions without anything around them."""
        if canonical(a) == canonical(b):
            return self.decide(Rule.SAME_STRUCTURE, True)
        if "matrix" in (a[0], b[0]) or contains(a, "matrix") or contains(b, "matrix"):
            computed = [matrix_value(side) for side in (a, b)]
            if None in computed:
                return self.decide(Rule.MATRIX, False)
            return self.same(*computed)
        if a[0] == b[0] == "ratio":
            return self.same_ratio(a, b)
        try:
            if symbols(a) or symbols(b):
                return self.same_symbolic(a, b)
            return self.same_closed(a, b)
        except NotNumeric:
            if not (contains(a, "big") or contains(b, "big")):
                return self.decide(Rule.NOT_A_NUMBER, False)
        except Undefined:
            return self.decide(Rule.UNDEFINED, False)
        return self.ask_sympy(a, b)

    def same_closed(self, a: Node, b: Node) -> bool:
        """Compare two expressions without symbols; a decimal inside one may be rounded."""
        if self.same_value(a, b):
            return True
        inside = contains(a, "dec") or contains(b, "dec")
        loose = self.options.rounding and inside and not (decimal_of(a) or decimal_of(b))
        return self.decide(Rule.NUMBER, bool(loose) and self.similar(a, b))

    def same_value(self, a: Node, b: Node) -> bool:
        """Compare two expressions without symbols by value; a decimal may be the other side rounded."""
        decimals = [decimal_of(side) for side in (a, b)]
        if all(decimals):
            return self.decide(Rule.NUMBER, same_decimals(*decimals))
        digits = self.options.rounding
        for decimal, side, other in ((decimals[0], a, b), (decimals[1], b, a)):
            if decimal and digits and rounds_to(side, other, digits, self.budget):
                return self.decide(Rule.NUMBER if same_number(a, b, self.budget) else Rule.ROUNDED, True)
        return self.decide(Rule.NUMBER, same_number(a, b, self.budget))

    def same_symbolic(self, a: Node, b: Node) -> bool:
        """Compare two expressions with symbols, by their values at random points or by sympy."""
        verdict = same_function(a, b, self.budget)
        if verdict is None:
            return self.ask_sympy(a, b)
        if not verdict and (contains(a, "dec") or contains(b, "dec")):
            verdict = self.similar(a, b)
        if not verdict:
            counters = [symbols(side) for side in (a, b)]
            counted = all(len(names) == 1 and names <= {"k", "n", "m"} for names in counters)
            named_otherwise = counted and counters[0] != counters[1]
            if named_otherwise and mentions(a, PI) and mentions(b, PI):  # 2k pi and 2n pi
                renamed = rename(b, ("sym", *counters[1]), ("sym", *counters[0]))
                return self.decide(Rule.FAMILY, bool(same_function(a, renamed, self.budget)))
        return self.decide(Rule.IDENTITY, verdict)

    def same_ratio(self, a: Node, b: Node) -> bool:
        """Compare two ratios by cross products, or as times of day if both may be one."""
        if len(a) != len(b):
            return self.decide(Rule.RATIO, False)
        clocks = [is_clock(side) for side in (a, b)]
        if all(clocks):  # 2:30 is not 1:15
            return self.decide(Rule.TIME, self.elementwise(a[1:], b[1:]))
        pairs = [(product([a[1], y]), product([b[1], x])) for x, y in zip(a[2:], b[2:], strict=True)]
        return self.decide(Rule.RATIO, all(self.same_expression(x, y) for x, y in pairs))

    def similar(self, a: Node, b: Node) -> bool:
        """Whether two trees have the same shape and equal numbers: x + 1.414i and x + i sqrt(2)."""
        self.budget.spend()
        if canonical(a) == canonical(b):
            return True

        inner = ("add", "mul", "pow", "root", "call", "apply", "big", "percent", "deg")
        if a[0] != b[0] or len(a) != len(b) or a[0] not in inner:
            if symbols(a) or symbols(b) or contains(a, "big") or contains(b, "big"):
                return False
            try:
                return self.same_value(a, b)
            except (NotNumeric, Undefined):
                return False

        if a[0] not in ("add", "mul"):
            return all(
                self.similar(x, y) if isinstance(x, tuple) else x == y
                for x, y in zip(a[1:], b[1:], strict=True)
            )

        left = list(b[1:])
        self.budget.spend(len(left))
        for part in a[1:]:
            match = next((index for index, other in enumerate(left) if self.similar(part, other)), None)
            if match is None:
                return False
            del left[match]
        return True

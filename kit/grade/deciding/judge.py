"""Decide whether two answers are the same, by their kinds: number, list, tuple, interval, equation, ...

`Judge.same(a, b)` is symmetric: every rule either treats both sides alike or is tried both ways round. What
no rule here decides (an integral, an identity that the random points leave open) goes to the `prove`
callable, which asks sympy.
"""

from __future__ import annotations

from collections.abc import Callable
from fractions import Fraction

from kit.grade.deciding.identities import decimal_of, proportional
from kit.grade.deciding.intervals import RealSets, condition_name, flip, is_conjunction
from kit.grade.deciding.meaning import (
    as_rows,
    as_selection,
    has_names,
    is_name,
    kind,
    names_differ,
    one_by_one,
    plain_words,
    rename_argument,
    resolve,
    strip_names,
)
from kit.grade.deciding.scalars import Options, ScalarJudge
from kit.grade.limits import Budget, NotNumeric, TooLarge, Undecided
from kit.grade.rules import Rule
from kit.grade.trees import Node, canonical, contains, negate, symbols

MAX_PAIRS = 20_000  # comparisons between the elements of two sets, beside equal rational ones


class Judge(ScalarJudge):
    """Compares two trees of any kind. `rule` names the rule that decided last."""

    def __init__(self, options: Options, budget: Budget, prove: Callable[[Node, Node], bool]):
        super().__init__(options, budget, prove)
        self.sets = RealSets(budget, self.same)

    def same(self, a: Node, b: Node) -> bool:
        """Whether two answers are the same. Raises Undecided or TooLarge if that cannot be decided."""
        self.budget.spend()
        if canonical(a) == canonical(b):
            return self.decide(Rule.SAME_STRUCTURE, True)

        written = (a, b)
        a, b = resolve(a), resolve(b)
        if {kind(a), kind(b)} == {"equation", "scalar"}:
            a, b = (as_selection(side) or meant for side, meant in zip(written, (a, b), strict=True))

        kinds = {kind(a), kind(b)}
        if "equation" in kinds:
            return self.same_equation(a, b)
        if "collection" in kinds:
            return self.same_collection(a, b)
        if "condition" in kinds or "real set" in kinds:
            return self.same_real_set(a, b)
        if "sequence" in kinds:
            return self.same_sequence(a, b)
        if kinds == {"text"}:
            letters = len(a[1]) == len(b[1]) == 1  # C is not c, but Yes is yes
            return self.decide(Rule.TEXT, a == b if letters else plain_words(a[1]) == plain_words(b[1]))
        if "text" in kinds:
            return self.decide(Rule.TEXT, False)
        return self.same_scalar(a, b)

    # --- equations and names

    def same_equation(self, a: Node, b: Node) -> bool:
        """Compare two equations, or an equation and something else, which may be its value."""
        if a[0] != "equation" or b[0] != "equation":
            equation, other = (a, b) if a[0] == "equation" else (b, a)
            if other[0] == "list" and has_names(other) and one_by_one(equation) != equation:
                return self.same_collection(one_by_one(equation), other)
            name, value = equation[1:]
            closed = not (symbols(name) or symbols(value))  # 35 + 70 = 105 states a value too
            stated = is_name(name) or closed
            if not stated or kind(other) == "condition":
                return self.decide(Rule.EQUATION_NO_VALUE, False)
            return self.decide_within(Rule.EQUATION_VALUE, self.same(value, other))

        if {a[1][0], b[1][0]} == {"apply", "sym"} and ("sym", "y") in (a[1], b[1]):  # y = 3x and f(x) = 3x
            return self.decide_within(Rule.EQUATION, self.same(a[2], b[2]))
        renamed = rename_argument(a, b)
        if is_name(a[1]) and canonical(a[1]) == canonical(renamed[1]) and self.same(a[2], renamed[2]):
            return self.decide_within(Rule.EQUATION, True)

        left, right = (("add", side[1], negate(side[2])) for side in (a, b))
        try:
            verdict = proportional(left, right, self.budget, positive=False)
        except NotNumeric:
            verdict = None
        if verdict is None or (not verdict and (contains(a, "dec") or contains(b, "dec"))):
            verdict = all(self.similar(x, y) for x, y in zip(a[1:], b[1:], strict=True))
        return self.decide(Rule.EQUATION_FACTOR, verdict)

    # --- lists, sets, tuples

    def same_collection(self, a: Node, b: Node) -> bool:
        """Compare a list or set with anything. Its order counts if the options or different names say so."""
        if a[0] not in ("list", "set"):
            a, b = b, a
        if self.is_decimal_comma(a, b):
            return self.decide(Rule.DECIMAL_COMMA, True)
        if is_conjunction(a) and (kind(b) in ("real set", "condition") or b[0] == "seq"):
            return self.same_real_set(a, b)
        if b[0] == "seq" and a[0] == "list":
            verdict = self.elementwise(strip_names(a)[2:], b[3:])
            return self.decide(Rule.LIST_AND_TUPLE, verdict)
        if kind(b) in ("real set", "condition"):
            return self.same_real_set(a, b)

        if b[0] not in ("list", "set"):
            b = ("set", b)
        ordered = self.options.order == "strict" and "list" in (a[0], b[0])
        if not (has_names(a) and has_names(b)):
            ordered |= names_differ(a) or names_differ(b)  # x = 2, y = 3 is not 3, 2
            a, b = strip_names(a), strip_names(b)
        left, right = (list(side[2:] if side[0] == "list" else side[1:]) for side in (a, b))
        if ordered:
            return self.decide(Rule.LIST, self.elementwise(left, right))
        return self.decide(Rule.SET, self.same_elements(left, right))

    def is_decimal_comma(self, a: Node, b: Node) -> bool:
        """Whether a list of two integers is a decimal with a comma: 1,22 against 1.22."""
        decimal = decimal_of(b)
        if decimal is None or a[0] != "list" or len(a) != 4:
            return False
        if any(part[0] != "num" or part[1].denominator != 1 for part in a[2:]):
            return False

        whole, decimals = a[2][1], a[3][1]
        places = b[3] if b[0] == "dec" else 0
        if decimals < 0 or len(str(decimals)) != places:  # the list 1, 5 is 1.5, not 1.05
            return False
        return abs(decimal[0]) == abs(whole) + decimals / 10**places and (whole < 0) == (decimal[0] < 0)

    def elementwise(self, left, right) -> bool:
        """Whether two sequences have the same elements in the same order."""
        return len(left) == len(right) and all(self.same(x, y) for x, y in zip(left, right, strict=True))

    def same_elements(self, left: list[Node], right: list[Node]) -> bool:
        """Whether two sets are equal: rational elements by their exact values, the others pair by pair.

        A decimal without an equal goes with the others: it may be another element rounded.
        """
        exact = [
            {value: part for part in side if (value := self.rational(part)) is not None}
            for side in (left, right)
        ]
        common = exact[0].keys() & exact[1].keys()
        loose = [[part for part in side if self.rational(part) not in common] for side in (left, right)]
        if len(loose[0]) * len(loose[1]) > MAX_PAIRS:
            if all(part[0] == "num" for side in loose for part in side):
                return False
            raise Undecided(f"two sets of {len(left)} and {len(right)} elements that are not plain numbers")

        whole = [left, right]
        return all(
            self.any_same(part, loose[1 - side] or whole[1 - side]) for side in (0, 1) for part in loose[side]
        )

    def any_same(self, part: Node, others: list[Node]) -> bool:
        """Whether one of the others is the same as `part`. Raises Undecided or TooLarge if it stays open."""
        undecided: Exception | None = None
        for other in others:
            try:
                if self.same(part, other):
                    return True
            except (Undecided, TooLarge) as error:
                undecided = error
        if undecided is not None:
            raise undecided
        return False

    @staticmethod
    def rational(node: Node) -> Fraction | None:
        return node[1] if node[0] in ("num", "dec") else None

    def same_sequence(self, a: Node, b: Node) -> bool:
        """Compare tuples, intervals, vectors and matrices with one another, or one of them with a number."""
        rows = [as_rows(side) for side in (a, b)]
        if rows[0] is None or rows[1] is None:
            if {a[0], b[0]} == {"seq", "matrix"}:
                seq, matrix = (a, b) if a[0] == "seq" else (b, a)
                if all(part[0] == "seq" for part in seq[3:]):  # [[1, 2], [3, 4]]
                    return self.same_sequence(("matrix", *(part[3:] for part in seq[3:])), matrix)
            if "matrix" in (a[0], b[0]):
                return self.same_scalar(a, b)
            return self.decide(Rule.NO_TUPLE, False)

        if a[0] == b[0] == "seq" and len(a) == len(b) == 5:
            if a[1:3] != b[1:3]:  # two entries: (0, 9) may be an interval, and its brackets then matter
                return self.decide(Rule.BRACKETS, False)
            return self.decide(Rule.PAIR, self.elementwise(a[3:], b[3:]))

        shapes = [[len(row) for row in side] for side in rows]
        flat = [[part for row in side for part in row] for side in rows]
        if shapes[0] != shapes[1] and not all(1 in (len(shape), max(shape)) for shape in shapes):
            return self.decide(Rule.SHAPE, False)
        return self.decide(Rule.TUPLE, self.elementwise(*flat))

    # --- intervals and inequalities

    def same_real_set(self, a: Node, b: Node) -> bool:
        """Compare intervals, unions and conditions piece by piece."""
        if a[0] == b[0] == "condition":
            names = [condition_name(side) for side in (a, b)]
            named = all(name is not None and is_name(name) for name in names)
            if named and canonical(names[0]) != canonical(names[1]):
                return self.decide(Rule.OTHER_QUANTITY, False)

        pieces = [self.sets.pieces(side) for side in (a, b)]
        if pieces[0] is None or pieces[1] is None:
            if a[0] == b[0] == "condition":
                return self.same_condition(a, b)
            return self.decide(Rule.OTHER_SET, False)

        verdict = len(pieces[0]) == len(pieces[1]) and all(
            (x.low_closed, x.high_closed) == (y.low_closed, y.high_closed)
            and self.sets.same_end(x.low, y.low)
            and self.sets.same_end(x.high, y.high)
            for x, y in zip(*pieces, strict=True)
        )
        return self.decide(Rule.INTERVAL, verdict)

    def same_condition(self, a: Node, b: Node) -> bool:
        """Compare conditions that describe no interval, such as 2x + y < 3 or x = 2 (mod 5)."""
        chains = [
            chain if not chain[0] or chain[0][0] not in (">", ">=") else flip(chain)
            for chain in (a[1:], b[1:])
        ]
        if canonical(chains[0]) == canonical(chains[1]):  # f(1) < f(2) < f(3) and f(3) > f(2) > f(1)
            return self.decide(Rule.INEQUALITY, True)
        if chains[0][0] != chains[1][0]:
            return self.decide(Rule.INEQUALITY, False)
        if chains[0][0] == ("equiv", "mod") and canonical(chains[0][1][2]) == canonical(chains[1][1][2]):
            return self.decide(Rule.CONGRUENCE, self.same_residue(*(chain[1] for chain in chains)))
        if len(chains[0][1]) != 2 or chains[0][0][0] not in ("<", "<=", "!="):
            return self.decide(Rule.INEQUALITY, False)
        left, right = (("add", chain[1][0], negate(chain[1][1])) for chain in chains)
        try:
            verdict = proportional(left, right, self.budget, positive=chains[0][0][0] != "!=")
        except NotNumeric:
            verdict = False
        return self.decide(Rule.INEQUALITY_FACTOR, bool(verdict))

    @staticmethod
    def same_residue(a: tuple, b: tuple) -> bool:
        """Whether two congruences with plain numbers agree: x = 2 and x = 7 modulo 5."""
        numbers = [part for part in (a[1], b[1], a[2]) if part[0] == "num"]
        if canonical(a[0]) != canonical(b[0]) or len(numbers) != 3 or not numbers[2][1]:
            return False
        return ((numbers[0][1] - numbers[1][1]) / numbers[2][1]).denominator == 1

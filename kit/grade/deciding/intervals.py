"""Read intervals, unions and conditions (-2 < x <= 7, x != 3, |x| < 2) as sets of real numbers."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from kit.grade.deciding.meaning import is_name, kind, resolve
from kit.grade.deciding.values import Evaluator
from kit.grade.limits import Budget, NotNumeric
from kit.grade.trees import Node, canonical, negate, symbols

INFINITY = ("const", "inf")
MINUS_INFINITY = negate(INFINITY)
FLIPPED = {"<": ">", ">": "<", "<=": ">=", ">=": "<=", "=": "=", "!=": "!=", "equiv": "equiv"}


@dataclass(frozen=True)
class Interval:
    """One interval of the real line. A single point has equal ends, both closed."""

    low: Node
    high: Node
    low_closed: bool
    high_closed: bool


class RealSets:
    """Reads trees as sets of real numbers. `same` decides whether two finite ends are equal."""

    def __init__(self, budget: Budget, same: Callable[[Node, Node], bool]):
        self.budget = budget
        self.same = same

    def pieces(self, node: Node) -> list[Interval] | None:
        """Return the node as disjoint intervals from left to right, or None if it is no set of real numbers.

        Intervals with symbolic ends stay in the order in which they were written.
        """
        found = self.raw_pieces(resolve(node))
        if found is None:
            return None
        try:
            found = sorted(found, key=lambda piece: self.position(piece.low))
            merged: list[Interval] = []
            for piece in found:
                last = merged[-1] if merged else None
                if last and (
                    self.position(piece.low) < self.position(last.high)
                    or (self.same_end(piece.low, last.high) and (piece.low_closed or last.high_closed))
                ):
                    longer = self.position(piece.high) > self.position(last.high)
                    closed = last.high_closed or (
                        piece.high_closed and not longer and self.same_end(piece.high, last.high)
                    )
                    high, high_closed = (piece.high, piece.high_closed) if longer else (last.high, closed)
                    merged[-1] = Interval(last.low, high, last.low_closed, high_closed)
                else:
                    merged.append(piece)
        except NotNumeric:
            return found  # symbolic ends have no order: they are compared as they were written
        return merged

    def position(self, node: Node):
        """Return the position of an end, precisely enough for sorting. Raises NotNumeric if it has none."""
        evaluator = Evaluator(50, self.budget)
        if node in (INFINITY, MINUS_INFINITY):
            return evaluator.mp.inf if node == INFINITY else -evaluator.mp.inf
        value = evaluator.real(evaluator(node))
        if evaluator.mp.im(value) != 0:
            raise NotNumeric("a complex end")
        return evaluator.mp.re(value)

    def raw_pieces(self, node: Node) -> list[Interval] | None:
        """Return the intervals of a resolved node in no fixed order, which may overlap, or None."""
        if node[0] == "seq" and len(node) == 5:
            return [Interval(node[3], node[4], node[1] == "[", node[2] == "]")]
        if node[0] == "reals":
            return [Interval(MINUS_INFINITY, INFINITY, False, False)]
        if node[0] in ("set", "union") or (node[0] == "list" and node[1] == "or"):
            parts = [
                self.raw_pieces(part) if node[0] == "union" or kind(part) == "condition" else point(part)
                for part in map(resolve, node[2:] if node[0] == "list" else node[1:])
            ]
            return None if None in parts else [piece for part in parts for piece in part]
        if node[0] == "meet" or is_conjunction(node):
            pieces = [Interval(MINUS_INFINITY, INFINITY, False, False)]
            for part in node[1:] if node[0] == "meet" else node[2:]:
                others = self.raw_pieces(resolve(part))
                if others is None:
                    return None
                pieces = [piece for x in pieces for y in others for piece in self.overlap(x, y)]
            return pieces
        if node[0] == "minus":
            whole, holes = (self.raw_pieces(resolve(part)) for part in node[1:])
            return None if whole is None or holes is None else self.punch(whole, holes)
        return condition_pieces(node) if node[0] == "condition" else None

    def overlap(self, x: Interval, y: Interval) -> list[Interval]:
        """Return the intersection of two intervals, as a list of one or none."""
        lows = [(self.position(side.low), not side.low_closed, side.low) for side in (x, y)]
        highs = [(self.position(side.high), side.high_closed, side.high) for side in (x, y)]
        low = max(lows, key=lambda end: end[:2])
        high = min(highs, key=lambda end: end[:2])
        if low[0] > high[0] or (low[0] == high[0] and (low[1] or not high[1])):
            return []
        return [Interval(low[2], high[2], not low[1], high[1])]

    def punch(self, pieces: list[Interval], holes: list[Interval]) -> list[Interval]:
        """Return the intervals without some points or intervals."""
        for hole in holes:
            around = [Interval(MINUS_INFINITY, hole.low, False, not hole.low_closed)]
            around.append(Interval(hole.high, INFINITY, not hole.high_closed, False))
            pieces = [left for piece in pieces for side in around for left in self.overlap(piece, side)]
        return pieces

    def same_end(self, a: Node, b: Node) -> bool:
        """Whether two ends are equal; infinity equals itself only."""
        if a in (INFINITY, MINUS_INFINITY) or b in (INFINITY, MINUS_INFINITY):
            return a == b
        return self.same(a, b)


def is_conjunction(node: Node) -> bool:
    """Whether a list states several conditions on one quantity at once: x > -3 and x < 2."""
    if node[0] != "list" or node[1] != "," or any(kind(part) != "condition" for part in node[2:]):
        return False
    names = [condition_name(part) for part in node[2:]]
    return None not in names and len({canonical(name) for name in names}) == 1


def condition_name(node: Node) -> Node | None:
    """Return the one quantity that a condition is about, or None; |x| < 1 is about x."""
    names = [part for part in node[2] if symbols(part) or part[0] in ("apply", "text")]
    if len(names) != 1:
        return None
    return names[0][2] if names[0][:2] == ("call", "abs") else names[0]


def flip(chain: tuple) -> tuple:
    """Return a chain (operators, operands) read from right to left."""
    operators, operands = chain
    return tuple(FLIPPED.get(operator, operator) for operator in operators[::-1]), tuple(operands[::-1])


def point(node: Node) -> list[Interval] | None:
    """Return a number as an interval of one point, or None for any other node."""
    return [Interval(node, node, True, True)] if kind(node) == "scalar" else None


def condition_pieces(node: Node) -> list[Interval] | None:
    """Return a < x <= b, x > a, x != a, and the same for |x|, as intervals; None for other conditions."""
    operators, operands = node[1], node[2]
    if operators[0] in (">", ">="):
        operators, operands = flip((operators, operands))
    closed = tuple(operator == "<=" for operator in operators)
    if operators == ("!=",):
        value = operands[1] if not symbols(operands[1]) else operands[0]
        if symbols(value):
            return None
        return [Interval(MINUS_INFINITY, value, False, False), Interval(value, INFINITY, False, False)]
    if any(operator not in ("<", "<=") for operator in operators):
        return None

    named = [index for index, part in enumerate(operands) if symbols(part) or part[0] in ("apply", "text")]
    if len(operands) == 3 and named == [1]:
        found, middle = [Interval(operands[0], operands[2], *closed)], operands[1]
    elif len(operands) == 2 and named in ([0], [1]):
        middle = operands[named[0]]
        if named == [0]:
            found = [Interval(MINUS_INFINITY, operands[1], False, closed[0])]
        else:
            found = [Interval(operands[0], INFINITY, closed[0], False)]
    else:
        return None

    if middle[0] == "call" and middle[1] == "abs":
        return absolute_pieces(found[0])
    return found if is_name(middle) else None


def absolute_pieces(piece: Interval) -> list[Interval] | None:
    """Return the x with |x| in the interval, or None if its lower end is a negative number."""
    if piece.low == MINUS_INFINITY:
        return [Interval(negate(piece.high), piece.high, piece.high_closed, piece.high_closed)]
    if piece.low[0] == "num" and piece.low[1] < 0:
        return None
    low = MINUS_INFINITY if piece.high == INFINITY else negate(piece.high)
    return [Interval(low, negate(piece.low), piece.high_closed, piece.low_closed), piece]

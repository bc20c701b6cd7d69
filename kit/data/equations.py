r"""Find the equations between numbers that a text states, and check each: 7+5=12, recheck: 12-5=8 ok.

They are read from plain text, Unicode signs and LaTeX: 3 \times 4 = 12, 3·4=12, \frac{93}{3} &= 31, 1,234 + 1
= 1,235. The run-on 3*4=12+5=17 states 3*4=12 and 12+5=17. An equation with a variable, a power or a function
is not arithmetic and is ignored. "is" does not count as "=": it means too many other things. Nothing is
executed, and every length is capped.
"""

from __future__ import annotations

import re
from fractions import Fraction
from typing import NamedTuple

from kit.data.expressions import MAX_TOKENS, Token, compute, tokens_of


class Equation(NamedTuple):
    """One stated equation: left = stated."""

    position: int  # where it begins in the text
    text: str  # as it is written there
    stated: Fraction | int  # value of the right side
    true: Fraction | int  # value of the left side
    num_operations: int  # performed by it: those on the left minus those that remain on the right
    is_right: bool  # both sides are equal, or the right side is a decimal to which the true value rounds

    @property
    def span(self) -> tuple[int, int]:
        """Where it begins and ends in the text."""
        return self.position, self.position + len(self.text)


def stated_equations(text: str) -> list[Equation]:
    """Return the equations between numbers that a text states, in their order."""
    tokens = tokens_of(text)
    equals = [i for i, token in enumerate(tokens) if token.kind == "="]
    bounds = [-1, *equals, len(tokens)]
    found: list[Equation] = []
    carried = None  # the right side of the last equals sign, if the next sign follows it directly
    for before, here, after in zip(bounds, bounds[1:], bounds[2:], strict=False):
        chained, left = carried is not None, carried or _last_expression(tokens, before + 1, here)
        whole = after < len(tokens) and compute(tokens[here + 1 : after]) is not None
        right = (here + 1, after) if whole else _first_expression(tokens, here + 1, after)
        carried = right if whole else None
        if left and right:
            equation = _equation(text, tokens, left, right, goes_on=whole)
            if chained and not equation.is_right and _is_sum(tokens[slice(*left)]):  # 5*8=40+6*7=42
                tail = _equation(text, tokens, (left[0] + 2, left[1]), right, goes_on=whole)
                equation = tail if tail.is_right else equation
            if _is_stated(text, tokens, equation, left, right, chained):
                found.append(equation)
    return found


_ENDS = ("gap", "word")
_OPERATING_WORDS = frozenset(
    ("of", "times", "by", "plus", "minus", "choose", "mod", "percent", "over", "per", "squared", "cubed")
)
# what follows "7/2 = 3" (remainder 1) or "9-4 = 9-2-2" (is 5) and shows that it states nothing
_REMAINDER = re.compile(r"[\s,;:.(]{0,9}(?:with\s|and\s)?(?:an?\s|the\s)?(?:rem|[rR]\s?[0-9])|\s?is\b")


def _equation(text: str, tokens: list[Token], left: tuple, right: tuple, goes_on: bool) -> Equation:
    before, after = (compute(tokens[slice(*side)]) for side in (left, right))
    stated, performed, end = after.value, max(0, before.num_operations - after.num_operations), right[1]
    first = tokens[right[0]]
    if goes_on and stated != before.value and after.num_operations and first.kind == "number":  # 3*4=12+5=17
        stated, performed, end = first.value, before.num_operations, right[0] + 1
    is_right = stated == before.value
    if end == right[0] + 1 and first.kind == "number" and isinstance(stated, Fraction):  # 10/3 = 3.33
        decimals = len(text[first.start : first.end].rpartition(".")[2])
        is_right |= abs(stated - before.value) < Fraction(1, 10**decimals)
    start = tokens[left[0]].start
    return Equation(start, text[start : tokens[end - 1].end], stated, before.value, performed, is_right)


def _is_sum(tokens: list[Token]) -> bool:
    return len(tokens) > 2 and tokens[0].kind == "number" and tokens[1][:2] in (("op", "+"), ("op", "-"))


def _is_stated(
    text: str, tokens: list[Token], equation: Equation, left: tuple, right: tuple, chained: bool
) -> bool:
    """Return whether an equation states something: 5 = 5 does not, nor does 7/2 = 3 before "remainder 1"."""
    computes = [compute(tokens[slice(*side)]).num_operations > 0 for side in (left, right)]
    if equation.is_right:
        return any(computes)
    if _REMAINDER.match(text, equation.span[1]):
        return False
    first, second = ([token.value for token in tokens[slice(*side)]] for side in (left, right))
    if computes[1] and first[: len(second)] == second:  # 1+2+3 = 1+2 = 3, and so on
        return False
    return chained or computes[0]  # "20 = 0.3 * 20" may be the end of "30 % of 20 = 0.3 * 20"


def _last_expression(tokens: list[Token], start: int, end: int) -> tuple[int, int] | None:
    """Return the (start, end) of the expression that ends at `end`.

    None if the text before it makes it part of another expression.
    """
    first = end
    while first > start and end - first < MAX_TOKENS and tokens[first - 1].kind not in _ENDS:
        first -= 1
    before = tokens[first - 1] if first > start else None
    if first < end and _clings(before, *tokens[first : first + 2]):
        return None
    for begin in range(first, end):
        # what is cut off in front must be complete: 2) 5+3 and 1 5+3
        cut = tokens[begin - 1].kind in ("number", ")") and tokens[begin].kind in ("number", "(", "fraction")
        if (begin == first or cut) and compute(tokens[begin:end]):
            return begin, end
    return None


def _clings(before: Token | None, first: Token, second: Token) -> bool:
    r"""Return whether an expression behind this token is only the end of another.

    For example x - 3, 2x + 3, \sqrt 4, half of 6, + 3.
    """
    if first.kind == "op" and (first.value != "-" or second.start > first.end):
        return True
    if before is None or before.kind == "gap":
        return False
    word = str(before.value)
    if len(word) == 1 or not word.isalpha() or word.lower() in _OPERATING_WORDS:
        return True
    return before.end == first.start


def _first_expression(tokens: list[Token], start: int, end: int) -> tuple[int, int] | None:
    """Return the (start, end) of the expression that begins at `start`.

    None if the text behind it makes it part of another expression.
    """
    last = start
    while last < end and last - start < MAX_TOKENS and tokens[last].kind not in _ENDS:
        last += 1
    for stop in range(last, start, -1):
        ends_here = stop == last or tokens[stop].kind in ("number", "(", ")", "fraction")
        if not ends_here or not compute(tokens[start:stop]):
            continue
        following = tokens[stop] if stop < len(tokens) else None
        if following is None or following.kind == "gap":
            return start, stop
        if following.kind in ("number", ")", "(") and stop < last:
            return start, stop
        glued = following.kind == "word" and following.start == tokens[stop - 1].end
        symbol = following.kind == "word" and not str(following.value).isalpha()
        return None if following.kind in ("op", "fraction") or glued or symbol else (start, stop)
    return None

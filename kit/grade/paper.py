r"""Grade an answer as the paper did: the second verdict.

The paper used the evaluation code of Qwen2.5-Math, which is more tolerant than kit.grade.verdict in some
places and blind in others. Numbers that are compared with published ones must be graded the same way.

The rules describe what that code does (QwenLM/Qwen2.5-Math, evaluation/parser.py and grader.py). They are
implemented on this kit's own parser, caps and workers:

1.  The response ends at the first token that ends a turn. The answer is what follows the last "boxed"
    anywhere in it (also in a thought or in a box that stays open), else what follows the last "he answer is"
    or "final answer is", else the last number.
2.  Both sides are normalised. Removed are units (some have one letter, so a lone `a` or `h` goes too),
    degree, percent and dollar signs, a trailing \text{...}, "x =", \left and \right, all spaces, and decimals
    that are zero. Number words become digits.
3.  Two answers are equal if they are
    - the same text, ignoring case and curly and round brackets;
    - the same letter of a choice;
    - numbers within 0.01 % of each other, also after multiplying or dividing one by 100;
    - tuples or matrices that are equal element by element, ignoring their kinds of brackets;
    - equations with the same difference of their sides;
    - expressions that are equal as formulas or, without symbols, within 0.01 %.
4.  A formula is read as far as it can be, and the rest is ignored: of a bare list only the first element
    counts, and the base of a number does not. 1\frac12 is a product, and pi, e and i are symbols without a
    value.

That code calls a pair wrong if it takes longer than three seconds. Here such a pair is `unknown`, which does
not count as correct either. One thing is not reproduced: that code reads words as products of letters, so
that an anagram is the same answer.
"""

from __future__ import annotations

import re
import time
from fractions import Fraction
from typing import NamedTuple

from kit.grade.deciding import Evaluator, prove, same_function, same_number
from kit.grade.limits import Budget, NotNumeric, ParseError, TooLarge, Undecided, Undefined
from kit.grade.paper_text import CHOICES, LETTER, choice_in, extract, normalise
from kit.grade.reading import Parser
from kit.grade.trees import Node, canonical, contains, negate, symbols
from kit.turns import first_turn

TOLERANCE = 10_000  # one part in so many: 0.01 %
MAX_CHARS = 8_000  # of an answer: the text after the last "the answer is" may be very long
MAX_NESTING = 60  # of tuples that are compared element by element; real answers nest two


class PaperVerdict(NamedTuple):
    """The verdict by the paper's rules on one prediction."""

    verdict: str  # "correct", "wrong" or "unknown"
    rule: str  # the rule that decided
    gold: str  # the reference answer, normalised
    prediction: str  # the predicted answer, normalised; "" if there is none


def grade_as_paper(gold: str, prediction: str, *, deadline: float = 5.0) -> PaperVerdict:
    """Grade a response against a reference answer by the paper's rules. A model's text never raises.

    gold: the answer itself, not a solution. prediction: the whole response. deadline: seconds, after which
    the verdict is unknown.
    """
    prediction = first_turn(prediction)
    extracted = extract(prediction)
    if max(len(gold), len(extracted)) > MAX_CHARS:
        reason = f"too large: an answer of more than {MAX_CHARS:,} characters"
        return PaperVerdict("unknown", reason, gold, extracted)

    # twice, as there: the first pass uncovers more
    reference, answer = (normalise(normalise(text)) for text in (gold, extracted))
    if reference in CHOICES and answer not in CHOICES:
        answer = choice_in(prediction)
    elif reference and not set(reference) - CHOICES:  # several letters
        answer = "".join(letter for letter in answer if letter in CHOICES)

    comparison = _Comparison(time.monotonic() + deadline)
    try:
        same = comparison.same(answer, reference)
    except (TooLarge, RecursionError) as error:
        return PaperVerdict("unknown", f"too large: {error}", reference, answer)
    except Undecided as error:
        return PaperVerdict("unknown", str(error), reference, answer)
    return PaperVerdict("correct" if same else "wrong", comparison.rule, reference, answer)


_PLAIN = re.compile(r"[+-]?(?:[0-9]+\.?[0-9]*|\.[0-9]+)(?:[eE][+-]?[0-9]{1,4})?")
_MATRIX = ("\\begin{pmatrix}", "\\end{pmatrix}")


def number(text: str) -> Fraction | None:
    """Return the value of a plain decimal, ignoring its commas, or None."""
    text = text.replace(",", "").strip()
    if len(text) > 400 or not _PLAIN.fullmatch(text):
        return None
    return Fraction(text)


def close(a, b) -> bool:
    """Whether two numbers differ by at most 0.01 % of the larger."""
    return bool(abs(a - b) * TOLERANCE <= max(abs(a), abs(b)))


class _Comparison:
    """Compares one pair. `rule` names the rule that decided."""

    def __init__(self, deadline_at: float):
        self.deadline_at = deadline_at
        self.budget = Budget(deadline_at)
        self.rule = ""

    def decide(self, rule: str, verdict: bool) -> bool:
        """Name the rule and return its verdict."""
        self.rule = rule
        return verdict

    def same(self, answer: str, reference: str, depth: int = 0) -> bool:
        """Compare two normalised texts by rule 3. depth: how many tuples or matrices are around them."""
        if depth > MAX_NESTING:
            raise TooLarge(f"a tuple nested deeper than {MAX_NESTING}")

        answer, reference = answer.strip(), reference.strip()
        if answer.lower() == reference.lower():
            return self.decide("same text", True)
        if reference in CHOICES and (LETTER.findall(answer.upper()) or [""])[-1] == reference:
            return self.decide("choice", True)

        numbers = number(answer), number(reference)
        if None not in numbers:
            if close(*numbers):
                return self.decide("number", True)
            if any(close(numbers[0], numbers[1] * factor) for factor in (100, Fraction(1, 100))):
                return self.decide("number times 100", True)

        if not answer:
            return self.decide("no answer", False)
        self.budget.spend()  # what is above needs no time worth counting
        if _without_brackets(answer, reference):
            return self.decide("same text without brackets", True)

        if _is_tuple(answer) and _is_tuple(reference):
            parts = answer[1:-1].split(","), reference[1:-1].split(",")
            return self.decide("tuple", self.same_parts(*parts, depth))
        rows = [_rows(side) for side in (answer, reference)]
        if None not in rows:
            shapes = [[len(row) for row in side] for side in rows]
            flat = [[part for row in side for part in row] for side in rows]
            return self.decide("matrix", shapes[0] == shapes[1] and self.same_parts(*flat, depth))
        return self.same_formula(answer, reference, depth)

    def same_parts(self, left: list[str], right: list[str], depth: int) -> bool:
        """Compare the elements of two tuples or matrices in order."""
        return len(left) == len(right) and all(
            self.same(a, b, depth + 1) for a, b in zip(left, right, strict=True)
        )

    def same_formula(self, answer: str, reference: str, depth: int) -> bool:
        """Compare two texts as equations, as an equation and a value, or as expressions."""
        sides = [text.split("=") for text in (answer, reference)]
        if len(sides[0]) == len(sides[1]) == 2:
            return self.decide("equation, by the difference of its sides", self.same_difference(*sides))
        for index, (equation, other) in enumerate((sides, sides[::-1])):
            if len(equation) == 2 and len(equation[0].strip()) <= 2 and len(other) == 1:
                value = equation[1]
                return self.same(*((value, reference) if index == 0 else (answer, value)), depth + 1)
        trees = [self.read(text) for text in (answer, reference)]
        if None in trees:
            return self.decide("not read", False)
        return self.same_tree(*trees)

    def same_difference(self, left: list[str], right: list[str]) -> bool:
        """Whether the differences of the sides of two equations are equal, up to their sign."""
        trees = [self.read(text) for text in (*left, *right)]
        if None in trees:
            return False
        first, second = (("add", trees[i], negate(trees[i + 1])) for i in (0, 2))
        return self.same_tree(first, second) or self.same_tree(negate(first), second)

    def read(self, text: str) -> Node | None:
        """Return the tree of the longest beginning that is a formula, or None. pi, e and i become symbols."""
        text = re.sub(r"(?<=[0-9])_(?:[0-9]|\{[^{}]*\})", "", text)  # the base of a number
        text = re.sub(r"(?<=[0-9])(?=\\frac)", r"\\cdot ", text)
        try:
            return _symbolic(Parser(text, self.deadline_at).relation())
        except ParseError:
            return None

    def same_tree(self, a: Node, b: Node) -> bool:
        """Compare two trees as formulas, relations or numbers."""
        if canonical(a) == canonical(b):
            return self.decide("same formula", True)
        if "rel" in (a[0], b[0]):
            relations = [_flipped(side) for side in (a, b)]
            alike = a[0] == b[0] and relations[0][0] == relations[1][0] and len(a[2]) == len(b[2])
            same = alike and all(
                self.same_tree(x, y) for x, y in zip(relations[0][1], relations[1][1], strict=True)
            )
            return self.decide("inequality", same)
        try:
            if not (symbols(a) or symbols(b)):
                return self.same_value(a, b)
            same = same_function(a, b, self.budget)
            return self.prove(a, b) if same is None else self.decide("identity at random points", same)
        except Undefined:
            return self.decide("undefined", False)
        except NotNumeric:
            if contains(a, "big") or contains(b, "big"):
                return self.prove(a, b)
            return self.decide("no formula", False)

    def same_value(self, a: Node, b: Node) -> bool:
        """Compare two expressions without symbols, real ones within 0.01 %."""
        evaluator = Evaluator(50, self.budget)
        values = [evaluator(side) for side in (a, b)]
        if not all(isinstance(value, Fraction) for value in values):
            values = [evaluator.real(value) for value in values]
            if any(evaluator.mp.im(value) for value in values):
                return self.decide("number", same_number(a, b, self.budget))
        return self.decide("number", close(*values))

    def prove(self, a: Node, b: Node) -> bool:
        return self.decide("sympy", prove(a, b, self.deadline_at))


def _without_brackets(answer: str, reference: str) -> bool:
    r"""Whether the texts are the same without curly and round brackets: \frac{1}{23} and \frac{12}{3} are."""
    square, round_ = (answer[:1] + answer[-1:] == pair for pair in ("[]", "()"))
    ends = reference[:1] + reference[-1:]
    if (square and ends != "()") or (round_ and ends != "[]"):
        answer, reference = answer.strip("[]()"), reference.strip("[]()")
    left, right = (re.sub("[{}()]", "", side).lower() for side in (answer, reference))
    return left == right


def _is_tuple(text: str) -> bool:
    return text[:1] in ("(", "[") and max(text.rfind(")"), text.rfind("]")) > 1


def _rows(text: str) -> list[list[str]] | None:
    if not (text.startswith(_MATRIX[0]) and text.endswith(_MATRIX[1])):
        return None
    rows = text[len(_MATRIX[0]) : -len(_MATRIX[1])].split("\\\\")
    return [row.strip().split("&") for row in rows if row.strip()]


def _symbolic(node):
    """Return the tree with pi, e and i as symbols."""
    if not isinstance(node, tuple):
        return node
    if node[:1] == ("const",) and node[1] != "inf":
        return ("sym", node[1])
    return tuple(_symbolic(part) for part in node)


def _flipped(node: Node) -> tuple:
    """Return (operators, operands) of a relation, turned round if its signs are > or >=."""
    if node[0] == "rel" and set(node[1]) & {">", ">="}:
        return tuple({">": "<", ">=": "<="}.get(sign, sign) for sign in node[1][::-1]), node[2][::-1]
    return (node[1], node[2]) if node[0] == "rel" else ((), (node,))

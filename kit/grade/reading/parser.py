r"""Parse an answer in LaTeX or plain notation to a tree (kit/grade/trees.py), evaluating nothing."""

from __future__ import annotations

import math
import re
from fractions import Fraction

from kit.grade.limits import ParseError, TooLarge
from kit.grade.reading.atoms import read_atom, read_subscript, read_symbol
from kit.grade.reading.cursor import Cursor
from kit.grade.reading.numerals import in_base, join_decimal_comma, number_node
from kit.grade.reading.tokens import clean
from kit.grade.trees import Node, invert, negate, product
from kit.grade.vocabulary import CLOSERS, INFIX_COMMANDS, RELATIONS

NO_FACTOR = RELATIONS.keys() | INFIX_COMMANDS | CLOSERS  # commands that begin no factor

_IN_BASE = re.compile(r"\(?(?:in )?base[ -]?(\w+)\)?")
_INTERVAL = re.compile(r"([\[\]])([^\[\](),;]{1,80}[,;][^\[\](),;]{1,80})([\[\]])")
_LENGTH = re.compile(  # 5 m, not 5m
    r"\A([-+$]*[0-9][0-9.,]*(?: [0-9]{3})*[0-9.,]*(?:[ ~]|\\[ ,])+)"
    r"([mgshL]|(?:[kc]?m|k?g|L)/(?:s|h|min))((?:\^[23]|\^\{[23]\})?[ .$]*)\Z"
)
_POWER = re.compile(r"\^(-?[0-9]+)(?:[\s~]|\\[,;:! ])+(?=[0-9])")  # 2^6 3^5
_SIGN = re.compile(r"\{(?<![\^_\\]\{)\s?([:=<>+*/-]|\\(?:cdot|times))\s?\}")  # 10{:}30, but not a_{+}
_RELATION = r"[=<>]|\\(?:leq?|geq?|neq?|approx|equiv)(?![A-Za-z])"
_SYSTEM = re.compile(
    r"(?:\\left\s*(?:\\\{|\.)\s*)?"
    r"\\begin\{((?:d?cases|align(?:ed)?|gather(?:ed)?|split|eqnarray|array)\*?)\}(?:\{[^{}]*\})?"
    r"((?:(?!\\begin).)*?)\\end\{\1\}"
    r"(?:\s*\\right\s*(?:\\\}|\.))?",
    re.DOTALL,
)
_ALIGNED = re.compile(rf"(?:\\\\\s*)?(?:&\s*)?({_RELATION})(?:\s*&)?")  # x &= 1 + 1 \\ &= 2


class Parser(Cursor):
    """Parses the tokens of one answer by precedence climbing. To read a whole answer, call `parse`."""

    sets = 0  # open sets: inside one, a colon is not a ratio
    integrals = 0  # open integrals: inside one, a d is not a factor

    # --- lists and relations

    def items(self, *ends: str) -> tuple[list[Node], set]:
        """Return (relations, their separators) up to, but not including, one of the ends.

        Commas, semicolons, `and` and `or` separate.
        """
        found, separators = [], set()
        while True:
            while self.peek()[0] == "sep":
                separators.add(self.take()[1])
            kind, value = self.peek()
            if kind == "end" or (kind in ("op", "cmd", "row") and value in ends):
                return found, separators
            found.append(self.relation())
            if self.peek()[0] not in ("sep", "end") and self.peek()[1] not in ends:
                raise ParseError(f"cannot read on at {self.peek()[1]!r}")

    def whole(self) -> Node:
        """Return the tree of all tokens. Raises ParseError if some are left."""
        self._trim()
        join_decimal_comma(self.tokens)
        found, separators = self.items()
        if self.peek()[0] != "end":
            raise ParseError(f"cannot read on at {self.peek()[1]!r}")
        if not found:
            raise ParseError("nothing to read")
        if len(found) == 1:
            return found[0]
        return ("list", "or" if separators == {"or"} else ",", *found)

    def _trim(self) -> None:
        """Remove trailing punctuation and stray backslashes, and an equals sign with nothing before it."""
        while self.tokens[0][1] in ("=", "approx", "simeq"):
            del self.tokens[0]
        while len(self.tokens) > 1 and self.tokens[-2][1] in (".", ",", ";", ":", "\\\\", "\\", "..."):
            if self.tokens[-2][1] == "..." and len(self.tokens) > 2 and self.tokens[-3][0] == "num":
                break  # 0.333...
            del self.tokens[-2]

    def relation(self) -> Node:
        """Read a chain of relations such as a < b <= c, or one expression."""
        operands, operators = [self.set_expression()], []
        while True:
            kind, value = self.peek()
            if kind not in ("op", "cmd") or value not in RELATIONS:
                break
            self.index += 1
            operators.append(RELATIONS[value])
            self.accept("&")
            operands.append(self.set_expression())

        bracketed = self.peek() == ("op", "(") and self.peek(1) == ("cmd", "mod")  # x = 2 (mod 5)
        self.index += bracketed
        if self.accept("pmod", "bmod", "mod"):
            operands.append(self.argument() if self.peek()[1] == "{" else self.sum())
            operators.append("mod")
            if bracketed:
                self.expect(")")
        return ("rel", tuple(operators), tuple(operands)) if operators else operands[0]

    def set_expression(self) -> Node:
        """Read what binds less than a sum: set operations, ratios, `choose` and `over`."""
        left = self.sum()
        while True:
            if self.tokens[self.index][0] in ("end", "sep") and left[0] != "ratio":
                return left
            if self.accept("cup"):
                right = self.sum()
                left = (*left, right) if left[0] == "union" else ("union", left, right)
            elif self.accept("cap"):
                left = ("meet", left, self.sum())
            elif self.accept("setminus", "backslash"):
                left = ("minus", left, self.sum())
            elif not self.sets and self.accept(":", "colon"):
                right = self.sum()
                left = (*left, right) if left[0] == "ratio" else ("ratio", left, right)
            elif self.accept("choose"):
                left = ("binom", left, self.sum())
            elif self.accept("over"):
                left = product([left, invert(self.sum())])
            elif left[0] == "ratio" and left[-1][0] == "unit":  # 3:45 p.m.
                return ("unit", (*left[:-1], left[-1][1]), left[-1][2])
            else:
                return left

    # --- arithmetic

    def sum(self) -> Node:
        """Read terms with their signs."""
        self.enter()
        terms, sign = [], None
        while True:
            negative = False
            while sign in ("+", "-", None):
                negative ^= sign == "-"
                sign = self.accept("+", "-", "pm", "mp")
                if sign is None:
                    break
            if sign in ("pm", "mp"):
                terms.append(("pm", 1 if (sign == "pm") != negative else -1, self.product()))
            else:
                term = self.product()
                terms.append(negate(term) if negative else term)
            sign = self.accept("+", "-", "pm", "mp")
            if sign is None:
                break
        self.depth -= 1
        return terms[0] if len(terms) == 1 else ("add", *terms)

    def product(self) -> Node:
        """Read factors, with a sign between them or none, and units."""
        factors = [self.power()]
        while True:
            if self.tokens[self.index][0] in ("end", "sep"):
                return product(factors)
            if self.accept("*", "cdot", "times", "ast"):
                factors.append(self.signed())
            elif self.accept("/", "div"):
                factors.append(invert(self.signed()))
            elif self.peek()[0] == "text":
                factors = [self._unit(product(factors))]
            elif self.starts_factor():
                factors.append(self.power())
            else:
                return product(factors)

    def signed(self) -> Node:
        """Read a factor that may have a sign, as in 2 * -3."""
        if self.accept("-"):
            return negate(self.power())
        self.accept("+")
        return self.power()

    def _unit(self, node: Node) -> Node:
        """Return the node with the words that follow as its unit, or as the base of a number."""
        start = self.index
        unit = str(self.take()[1])
        while self.peek()[0] == "text":
            unit += " " + str(self.take()[1])
        if self.accept("^"):
            exponent = self.argument()
            unit += f"^{exponent[1]}" if exponent[0] == "num" else ""
        if self.peek()[1] == "/" and self.peek(1)[0] == "text":
            self.index += 1
            unit += "/" + str(self.take()[1])
            if self.accept("^"):
                self.argument()
        if unit.endswith("base") and self.peek()[0] == "num":
            unit += f" {self.take()[1][0]}"

        base = _IN_BASE.fullmatch(unit)
        if base and node[0] == "num" and self.tokens[start - 1][0] == "num":
            return in_base(self.tokens[start - 1][1], base[1])
        return ("unit", node, unit)

    def starts_factor(self) -> bool:
        """Whether the next token begins a factor without any sign before it."""
        kind, value = self.peek()
        if self.integrals and kind == "sym" and value == "d":
            return False
        if kind == "num":  # "x2" is a product, "2 3" is not
            return self.tokens[self.index - 1][0] != "num"
        if kind == "sym":
            return True
        if self.sets and value in ("lvert", "vert"):  # the bar of {x | x > 2}
            return False
        if kind == "op":
            return value in ("(", "{", "[", "\\{") and self.peek(1) != ("cmd", "mod")
        return kind == "cmd" and value not in NO_FACTOR

    def power(self) -> Node:
        """Read an atom with what follows it directly: exponents, factorials, degrees, primes, subscripts."""
        depth = self.depth
        self.enter()
        node = self.atom()
        while self.tokens[self.index][0] in ("op", "cmd"):
            if self.accept("!"):
                self.enter()  # each ! is a level of the tree
                node = ("fact", node)
            elif self.accept("%"):
                node = ("percent", node)
            elif self.accept("^"):
                if self.accept("circ", "degree"):
                    node = ("deg", node)
                elif self.peek(1) == ("cmd", "circ") and self.accept("{"):
                    self.index += 1
                    self.expect("}")
                    node = ("deg", node)
                elif self.accept("prime"):
                    node = self._prime(node)
                else:
                    node = ("pow", node, self._exponent())
            elif self.accept("degree", "circ"):
                node = ("deg", node)
            elif self.accept("'"):
                node = self._prime(node)
            elif self.peek()[1] == "_" and self.peek()[0] == "op":
                self.index += 1
                node = read_subscript(self, node)
            else:
                break
        self.depth = depth
        return node

    def _exponent(self) -> Node:
        """Read an exponent. Towers group to the right; a ! or % after it applies to the whole power."""
        self.enter()
        if self.accept("-"):
            return negate(self._exponent())
        self.accept("+")
        node = self.atom()
        if self.accept("^"):
            node = ("pow", node, self._exponent())
        self.depth -= 1
        return node

    def _prime(self, node: Node) -> Node:
        if node[0] != "sym":
            raise ParseError("a prime that does not follow a symbol")
        return ("sym", node[1] + "'")

    atom, symbol = read_atom, read_symbol

    def argument(self) -> Node:
        """Read a command's argument: a group, or one token, or one digit of a number (\frac12 is a half)."""
        kind, value = self.peek()
        if kind == "num" and value[0].isdigit() and not value[1]:
            digit, rest = value[0][0], value[0][1:]
            if rest:  # "exact": what follows it is a factor of its own, as after a command
                split = [("exact", Fraction(int(digit)), False), ("num", (rest, 0), False)]
                self.tokens[self.index : self.index + 1] = split
            self.index += 1
            return number_node(digit)
        if kind == "op" and value == "{":
            return self.group()
        return self.atom()

    def group(self) -> Node:
        """Read a group in braces: one thing, or a set of several."""
        self.expect("{")
        found, _ = self.items("}", "\\}")
        if not self.accept("}", "\\}"):
            raise ParseError("a group that is not closed")
        if not found:
            raise ParseError("an empty group")
        return found[0] if len(found) == 1 else ("set", *found)


def turn_brackets(text: str) -> str:
    """Write open intervals as used in France, ]0, 1[ and [0, 1[, with round brackets."""

    def turned(match: re.Match) -> str:
        return ("[" if match[1] == "[" else "(") + match[2] + ("]" if match[3] == "]" else ")")

    return _INTERVAL.sub(turned, text)


def write_out(text: str) -> str:
    r"""Write 2^6 3^5 with a sign, 10{:}30 as 10:30, and equations in aligned rows or an array as `cases`."""

    def system(match: re.Match) -> str:
        if match[1] == "array" and not re.search(_RELATION, match[2]):
            return match[0]  # a matrix
        rows = _ALIGNED.sub(r" \1 ", match[2]).rstrip().rstrip(".,;")
        return rf"\begin{{cases}}{rows}\end{{cases}}"

    if "\\begin" in text:
        text = _SYSTEM.sub(system, text)
    return _SIGN.sub(r"\1 ", _POWER.sub(r"^\1\\cdot ", text))


def parse(text: str, deadline_at: float = math.inf) -> Node:
    """Return the tree of one answer.

    Raises ParseError for an unknown notation, TooLarge beyond a cap, and Undecided at the deadline.
    """
    try:
        text = write_out(clean(text))
        if len(text) < 60:
            text = _LENGTH.sub(r"\1\\text{\2}\3", text)
        try:
            return Parser(text, deadline_at).whole()
        except ParseError:
            turned = turn_brackets(text) if "[" in text or "]" in text else text
            if turned == text:
                raise
            return Parser(turned, deadline_at).whole()
    except RecursionError as error:  # the caller is itself hundreds of frames deep
        raise TooLarge("an answer nested too deeply for the stack that is left") from error

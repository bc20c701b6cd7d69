"""Read the smallest parts of an answer: numbers, symbols, brackets, sets, subscripts."""

from __future__ import annotations

import re

from kit.grade.limits import ParseError
from kit.grade.reading.cursor import Cursor
from kit.grade.reading.latex import read_command, read_indexed_selection, read_selection, selection
from kit.grade.reading.numerals import continued, in_base, number_node
from kit.grade.trees import Node
from kit.grade.vocabulary import OPAQUE

_DIGITS = re.compile(r"(?=[0-9A-F]{2})[0-9]*[A-F][0-9A-F]*")  # of a base beyond ten


def read_atom(parser: Cursor) -> Node:
    """Return the node of the smallest part that begins at the next token. Raises ParseError if none does."""
    kind, value = parser.take()
    if kind == "num":
        return _read_number(parser, value)
    if kind == "exact":
        return ("num", value)
    if kind == "sym":
        return read_symbol(parser, str(value))
    if kind == "text":
        base = str(value)
        while parser.peek()[0] == "text":
            base += " " + str(parser.take()[1])
        if parser.peek() == ("op", "_"):
            parser.index += 1
            return read_subscript(parser, ("sym", base))
        return ("text", base)
    if kind == "op":
        empty = value == "{" and parser.peek() == ("op", "}") and parser.peek(1)[1] in ("_", "^")  # {}_5C_2
        if empty or value in ("_", "^"):
            return read_selection(parser)
        if value in ("(", "["):
            return _read_bracket(parser, value)
        if value == "{":
            parser.index -= 1
            return parser.group()
        if value == "\\{":
            return _read_set(parser)
        if value in ("|", "\\|"):
            inside = parser.sum()
            parser.expect(value)
            return ("call", "abs", inside)
    if kind == "cmd":
        return read_command(parser, str(value))
    raise ParseError(f"cannot read {value!r}")


def _read_number(parser: Cursor, value: tuple[str, int]) -> Node:
    """Read a number with what belongs to it: dots, the rest of 5C2, the fraction of a mixed number."""
    node = number_node(*value)
    if node[0] != "num":
        return continued(node, value[0]) if parser.accept("...", "ldots", "dots", "cdots") else node

    if parser.peek() in (("sym", "C"), ("sym", "P")) and parser.peek(1)[0] == "num":
        glued = not (parser.tokens[parser.index][2] or parser.tokens[parser.index + 1][2])
        if glued:  # 5C2
            return selection(node, str(parser.take()[1]), number_node(*parser.take()[1]))

    if parser.peek() == ("cmd", "frac"):
        mark = parser.index
        parser.index += 1
        fraction = read_command(parser, "frac")
        if fraction[0] == "num" and 0 < fraction[1] < 1 and not _is_raised(parser):
            return ("num", node[1] + fraction[1])
        parser.index = mark
        return node

    following, spaced = parser.peek(), parser.tokens[min(parser.index, len(parser.tokens) - 1)][2]
    if spaced and following[0] == "num" and parser.peek(1) == ("op", "/") and parser.peek(2)[0] == "num":
        fraction = (number_node(*following[1]), number_node(*parser.peek(2)[1]))
        if fraction[0][0] == fraction[1][0] == "num" and 0 < fraction[0][1] < fraction[1][1]:
            parser.index += 3
            return ("num", node[1] + fraction[0][1] / fraction[1][1])
    return node


def _is_raised(parser: Cursor) -> bool:
    """Whether an exponent follows that is not a degree sign."""
    if parser.peek() != ("op", "^"):
        return False
    return ("cmd", "circ") not in (parser.peek(1), parser.peek(2)) and parser.peek(1) != ("cmd", "degree")


def read_symbol(parser: Cursor, name: str) -> Node:
    """Return the node of a symbol that was just passed: a constant, f(x), C_5^2, or the symbol itself."""
    kind, value, spaced = parser.tokens[parser.index]
    if kind == "op" and value == "(" and not spaced and len(name) == 1:
        mark, depth = parser.index, parser.depth
        if name in OPAQUE or (parser.peek(1)[0] == "sym" and parser.peek(2) == ("op", ")")):
            parser.index += 1
            found, _ = parser.items(")")
            parser.expect(")")
            if found:
                return ("apply", name, *found)
        parser.index, parser.depth = mark, depth
    if name == "C" and value in ("_", "^") and kind == "op":
        return read_indexed_selection(parser) or ("sym", name)
    if name == "e" or name == "i":
        return ("const", name)
    return ("sym", name)


def _read_bracket(parser: Cursor, opening: str) -> Node:
    """Read what stands in brackets: a tuple or interval, or one thing, which the brackets only group."""
    found, _ = parser.items(")", "]")
    closing = parser.accept(")", "]")
    if closing is None or not found:
        raise ParseError("a bracket that is empty or not closed")
    if len(found) > 1:
        return ("seq", opening, closing, *found)
    if {opening + closing} & {"(]", "[)"}:
        raise ParseError("brackets that do not match")
    return found[0]


def _read_set(parser: Cursor) -> Node:
    """Read a set after its brace: its elements, or the conditions after a bar or colon."""
    parser.sets += 1
    found, _ = parser.items("\\}", "}", "mid", "|", ":", "colon", "vert", "lvert")
    parser.sets -= 1
    if parser.accept("mid", "|", ":", "colon", "vert", "lvert"):
        conditions, _ = parser.items("\\}", "}")
        if not parser.accept("\\}", "}") or len(found) != 1 or not conditions:
            raise ParseError("a set given by something other than conditions")
        element = found[0]
        if element[0] == "rel" and element[1] == ("in",) and element[2][1] == ("reals",):
            element = element[2][0]
        if element[0] != "sym":  # {2k : k is whole}
            return ("set", element, *conditions)
        return conditions[0] if len(conditions) == 1 else ("list", ",", *conditions)
    if not parser.accept("\\}", "}"):
        raise ParseError("a set that is not closed")
    return ("set", *found)


def read_subscript(parser: Cursor, node: Node) -> Node:
    """Return the node with the subscript that follows: the base of a number, or part of a symbol's name."""
    start = parser.index
    if parser.accept("{"):
        level = 1
        while level:
            kind, value = parser.take()
            if kind == "end":
                raise ParseError("a subscript that is not closed")
            level += (kind == "op" and value == "{") - (kind == "op" and value == "}")
        inside = parser.tokens[start + 1 : parser.index - 1]
    else:
        inside = [parser.tokens[parser.index]]
        if parser.take()[0] not in ("num", "sym", "text", "cmd"):
            raise ParseError("a subscript that is missing")
    text = "".join(value[0] if kind == "num" else str(value) for kind, value, _ in inside)

    if node[0] in ("num", "dec"):
        # the digits as they were written: 1101_2 or (1101)_2
        last, first = parser.tokens[start - 2][1], parser.tokens[max(0, start - 4)][1]
        kind, value, _ = parser.tokens[start - 3 if (first, last) == ("(", ")") else start - 2]
        return in_base(value if kind == "num" and node[0] == "num" else None, text)
    if node[0] == "sym":
        if _DIGITS.fullmatch(node[1]) and text in ("11", "12", "13", "14", "15", "16"):
            return in_base((node[1], 0), text)
        return ("sym", f"{node[1]}_{text}")
    raise ParseError("a subscript that follows neither a symbol nor a number")

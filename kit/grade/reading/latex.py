r"""Read the LaTeX commands of an answer: fractions, roots, functions, sums and integrals, matrices."""

from __future__ import annotations

from fractions import Fraction

from kit.grade.limits import ParseError
from kit.grade.reading.cursor import Cursor
from kit.grade.reading.numerals import number_node
from kit.grade.trees import Node, invert, negate, product, rename
from kit.grade.vocabulary import CONSTANTS, FUNCTIONS, GREEK, MATRICES, STRUCTURAL


def read_command(parser: Cursor, name: str) -> Node:
    """Return the node of the command just passed, with its arguments. Raises ParseError if it has no node."""
    if name == "frac":
        top = parser.argument()
        return product([top, invert(parser.argument())])
    if name in ("sqrt", "cbrt"):
        return _root(parser, name)
    if name in ("binom", "dbinom", "tbinom"):
        top = parser.argument()
        return ("binom", top, parser.argument())
    if name in CONSTANTS:
        return CONSTANTS[name]
    if name in FUNCTIONS:
        return _function(parser, name)
    if name in GREEK:
        return parser.symbol(name)
    if name in ("emptyset", "varnothing"):
        return ("set",)
    if name == "reals":
        return _reals(parser)
    if name in ("lfloor", "lceil", "lvert", "lVert"):
        inside = parser.sum()
        parser.expect("r" + name[1:])
        return ("call", {"lfloor": "floor", "lceil": "ceil"}.get(name, "abs"), inside)
    if name in ("sum", "prod", "int"):
        return _big(parser, name)
    if name == "langle":
        found, _ = parser.items("rangle")
        parser.expect("rangle")
        if not found:
            raise ParseError("an empty vector")
        return ("seq", "(", ")", *found)
    if name == "begin":
        return _environment(parser)
    if name in STRUCTURAL or "arrow" in name:
        raise ParseError(f"cannot read the command \\{name} here")
    return parser.symbol(name)  # an unknown command is a symbol like any other


def _reals(parser: Cursor) -> Node:
    """Read what follows R: R^+ and R^- are intervals."""
    sign = None
    if parser.peek() == ("op", "^"):
        sign = parser.peek(2 if parser.peek(1) == ("op", "{") else 1)[1]
    if sign not in ("+", "-"):
        return ("reals",)

    while parser.take()[1] != sign:
        continue
    parser.accept("}")
    zero, infinity = ("num", Fraction(0)), CONSTANTS["infty"]
    return ("seq", "(", ")", zero, infinity) if sign == "+" else ("seq", "(", ")", negate(infinity), zero)


def read_selection(parser: Cursor) -> Node:
    """Return the number of choices as schools write it, {}_5C_2 or ^5C_2, after its first sign was passed."""
    while parser.tokens[parser.index - 1][1] not in ("_", "^"):
        parser.index += 1
    total = parser.argument()
    kind, name = parser.take()
    if kind not in ("sym", "text") or name not in ("C", "P") or not parser.accept("_"):
        raise ParseError("an index that nothing carries")
    return selection(total, name, parser.argument())


def read_indexed_selection(parser: Cursor) -> Node | None:
    """Return the number of choices that C_5^2 or C^2_5 stands for.

    Return None, and stay at the same token, if the indices are not plain numbers or cannot mean that.
    """
    mark, indices = parser.index, {}
    for _ in range(2):
        sign = parser.accept("_", "^")
        if sign is None or sign in indices or (parser.peek()[0] != "num" and parser.peek()[1] != "{"):
            break
        indices[sign] = parser.argument()
    numbers = len(indices) == 2 and all(node[0] == "num" for node in indices.values())
    if numbers and indices["_"][1] >= indices["^"][1] > 0:
        return selection(indices["_"], "C", indices["^"])
    parser.index = mark
    return None


def selection(total: Node, name: str, chosen: Node) -> Node:
    """Return the number of combinations (C) or permutations (P)."""
    if name == "C":
        return ("binom", total, chosen)
    return product([("fact", total), invert(("fact", ("add", total, negate(chosen))))])


def _root(parser: Cursor, name: str) -> Node:
    index: Node = ("num", Fraction(3 if name == "cbrt" else 2))
    if parser.accept("["):
        index = parser.sum()
        parser.expect("]")
    kind, value = parser.peek()
    if kind == "op" and value == "{":
        inside = parser.group()
    elif kind == "num":
        parser.index += 1
        inside = number_node(*value)
    else:
        inside = parser.atom()
    return ("root", index, inside)


def _function(parser: Cursor, name: str) -> Node:
    """Read what follows a function's name: base and exponent in either order, then the arguments."""
    base = exponent = None
    for _ in range(2):
        if base is None and parser.accept("_"):
            base = parser.argument()
        if exponent is None and parser.accept("^"):
            exponent = parser.signed() if parser.peek()[1] != "{" else parser.group()

    kind, value = parser.peek()
    if kind == "op" and value == "(":
        parser.index += 1
        arguments, _ = parser.items(")")
        parser.expect(")")
    elif kind == "op" and value == "{":
        arguments = [parser.group()]
    else:
        factors = [negate(parser.power()) if parser.accept("-") else parser.power()]
        while parser.starts_factor() and not (parser.peek()[0] == "cmd" and parser.peek()[1] in FUNCTIONS):
            if parser.peek()[1] in ("(", "[", "\\{"):
                break
            factors.append(parser.power())
        arguments = [product(factors)]
    if not arguments:
        raise ParseError(f"{name} of nothing")

    if exponent == ("num", Fraction(-1)) and "arc" + name in FUNCTIONS:
        name, exponent = "arc" + name, None
    node = ("call", name, *arguments, base) if base is not None else ("call", name, *arguments)
    return node if exponent is None else ("pow", node, exponent)


def _big(parser: Cursor, name: str) -> Node:
    """Read a sum, product or integral after its name."""
    low = high = None
    for _ in range(2):
        if low is None and parser.accept("_"):
            low = parser.argument()
        if high is None and parser.accept("^"):
            high = parser.argument()
    if low is None or high is None:
        raise ParseError(f"a {name} without its bounds")

    if name != "int":
        if low[0] != "rel" or low[1] != ("=",) or low[2][0][0] not in ("sym", "const"):
            raise ParseError(f"a {name} without its variable")
        variable, low = low[2]
        return ("big", name, variable[1], low, high, rename(parser.product(), variable, ("sym", variable[1])))

    parser.integrals += 1
    body = parser.sum()
    parser.integrals -= 1
    if parser.take() != ("sym", "d") or parser.peek()[0] != "sym":
        raise ParseError("an integral without its variable")
    return ("big", name, str(parser.take()[1]), low, high, body)


def _environment(parser: Cursor) -> Node:
    """Read a matrix, or the rows of `cases` as a list."""
    name = _environment_name(parser)
    if name == "array" and parser.accept("{"):
        while not parser.accept("}"):
            if parser.take()[0] == "end":
                raise ParseError("an array whose columns are not closed")

    rows: list[list[Node]] = [[]]
    parser.enter()
    while parser.peek() != ("cmd", "end"):
        kind, _ = parser.peek()
        if kind == "end":
            raise ParseError(f"an environment {name} that is not closed")
        if kind == "row":
            parser.index += 1
            rows.append([])
        elif not parser.accept("&", "hline"):
            found, _ = parser.items("&", "end", "\\\\")
            rows[-1].extend(found)
    parser.index += 1
    _environment_name(parser)
    parser.depth -= 1

    rows = [row for row in rows if row]
    if not rows:
        raise ParseError(f"an empty {name}")
    if name == "cases":
        return ("list", ",", *(node for row in rows for node in row))
    if name not in MATRICES or len({len(row) for row in rows}) != 1:
        raise ParseError(f"an environment {name} that is not a matrix")
    return ("matrix", *map(tuple, rows))


def _environment_name(parser: Cursor) -> str:
    """Return the name in the braces after a begin or end command, without its star."""
    parser.expect("{")
    name = ""
    while not parser.accept("}"):
        kind, value = parser.take()
        if kind == "end":
            raise ParseError("an environment without a name")
        name += str(value)
    return name.rstrip("*")

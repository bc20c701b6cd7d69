r"""Mathematical answers as trees: their forms, and operations on trees that evaluate nothing.

Every form of an answer that the grader compares is one of these nested tuples:

    ("num", Fraction)  ("dec", Fraction, significant_digits, places)
    ("sym", name)  ("const", "pi" | "e" | "i" | "inf")
    ("add", a, b, ...)  ("mul", a, b, ...)  ("pow", a, b)  ("root", n, a)
    ("fact", a)  ("binom", n, k)  ("pm", sign, a)
    ("call", name, a, ...)  ("apply", name, a, ...)
    ("big", "sum" | "prod" | "int", variable, low, high, body)
    ("percent", a)  ("deg", a)  ("unit", a, text)  ("text", text)  ("ratio", a, b, ...)
    ("seq", "(" | "[", ")" | "]", a, ...)  ("set", a, ...)  ("list", "," | "or", a, ...)
    ("matrix", (row, ...), ...)
    ("union", a, b, ...)  ("minus", a, b)  ("meet", a, b)  ("reals",)
    ("rel", (op, ...), (a, b, ...))

A quotient is a product with a power of -1. `("apply", "f", x)` is f(x) where f may be a function or a factor.
"""

from __future__ import annotations

from fractions import Fraction

from kit.grade.vocabulary import OPAQUE

Node = tuple


def negate(node: Node) -> Node:
    """Return -node; the sign of a number is folded into it."""
    if node[0] == "num":
        return ("num", -node[1])
    if node[0] == "dec":
        return ("dec", -node[1], *node[2:])
    if node[0] in ("percent", "deg"):
        return (node[0], negate(node[1]))
    if node[0] == "unit":
        return ("unit", negate(node[1]), node[2])
    return ("mul", ("num", Fraction(-1)), node)


def invert(node: Node) -> Node:
    """Return 1/node; a nonzero integer or fraction is inverted exactly."""
    if node[0] == "num" and node[1]:
        return ("num", 1 / node[1])
    return ("pow", node, ("num", Fraction(-1)))


def rename(node: Node, old: Node, new: Node) -> Node:
    """Return the tree with one leaf replaced by another."""
    if node == old:
        return new
    return tuple(rename(part, old, new) if isinstance(part, tuple) else part for part in node)


def product(factors: list[Node]) -> Node:
    """Return the product of the factors, flat. Numbers other than decimals are folded into one."""
    number, rest = Fraction(1), []
    for factor in factors:
        for part in factor[1:] if factor[0] == "mul" else (factor,):
            if part[0] == "num" and number.denominator.bit_length() + number.numerator.bit_length() < 20_000:
                number *= part[1]
            else:
                rest.append(part)
    if number != 1 or not rest:
        rest.insert(0, ("num", number))
    return rest[0] if len(rest) == 1 else ("mul", *rest)


def canonical(node):
    """Return the tree with the operands of sums, products and sets in a fixed order."""
    if not isinstance(node, tuple) or not node:
        return node
    if node[0] == "dec":
        return ("num", node[1])
    parts = tuple(canonical(part) for part in node)
    return (node[0], *sorted(parts[1:], key=_order)) if node[0] in ("add", "mul", "set") else parts


def _order(part) -> str:
    try:
        return repr(part)
    except ValueError:  # Python refuses to write a number of more than 4,300 digits in decimals
        return repr(to_json(part))


def substitute_sign(node: Node, sign: int) -> Node:
    """Return the tree with every plus-minus resolved to one sign, and every minus-plus to the other."""
    if not isinstance(node, tuple) or not node:
        return node
    if node[0] == "pm":
        part = substitute_sign(node[2], sign)
        return part if node[1] * sign > 0 else negate(part)
    return tuple(substitute_sign(part, sign) for part in node)


def contains(node, op: str) -> bool:
    """Whether the form `op` occurs anywhere in the tree."""
    if not isinstance(node, tuple) or not node:
        return False
    return node[0] == op or any(contains(part, op) for part in node)


def symbols(node: Node) -> frozenset[str]:
    """Return the free symbols of a tree."""
    if node[0] in ("sym", "apply"):
        own = frozenset((node[1],)) if node[0] == "sym" or node[1][0] not in OPAQUE else frozenset()
        return own.union(*(symbols(part) for part in node[2:])) if node[0] == "apply" else own
    found = frozenset().union(*(symbols(part) for part in node if isinstance(part, tuple) and part))
    return found - {node[2]} if node[0] == "big" else found


def mentions(node, leaf: Node) -> bool:
    """Whether a leaf, such as the imaginary unit, occurs anywhere in the tree."""
    return node == leaf or (isinstance(node, tuple) and any(mentions(part, leaf) for part in node))


def to_json(node: object) -> object:
    """Return the tree as JSON.

    Tuples become lists. Fractions become {"n": numerator, "d": denominator} in hexadecimal, which has no
    limit on digits.
    """
    if isinstance(node, tuple):
        return [to_json(part) for part in node]
    if isinstance(node, Fraction):
        return {"n": hex(node.numerator), "d": hex(node.denominator)}
    return node


def from_json(data: object) -> object:
    """Return the tree that to_json turned into JSON."""
    if isinstance(data, list):
        return tuple(from_json(part) for part in data)
    if isinstance(data, dict):
        return Fraction(int(data["n"], 16), int(data["d"], 16))
    return data

"""Reduce an answer to what is compared: resolve equalities, plus-minus, names, units and matrices."""

from __future__ import annotations

import re
from fractions import Fraction

from kit.grade.trees import Node, contains, product, rename, substitute_sign, symbols
from kit.grade.vocabulary import COMPOUND_UNITS, UNITS

KINDS = {
    "list": "collection", "set": "collection", "seq": "sequence", "matrix": "sequence", "union": "real set",
    "minus": "real set", "meet": "real set", "reals": "real set", "equation": "equation",
    "condition": "condition", "text": "text",
}  # fmt: skip
SETS_IN_WORDS = {
    ("reals",): "all real numbers|all reals|real numbers|the real numbers|the set of all real numbers",
    ("sym", "Z"): "all integers|the integers|integers|the set of all integers|the set of integers",
    ("set",): "no solution|no solutions|no real solution|no real solutions",
}
_MEANT = {words: node for node, texts in SETS_IN_WORDS.items() for words in texts.split("|")}
_UNIT_WORDS = re.compile(r"(?!in +[a-z])\b[a-z]+")  # "7 in all" is not a length
_HALF_OF_DAY = re.compile(r"\b([ap])\.? ?m\b")  # 3:45 p.m


def is_point_name(node: Node) -> bool:
    """Whether a symbol may name a point: the A of A(1, 2)."""
    return node[0] == "sym" and node[1][0].isupper() and len(node[1].rstrip("'").partition("_")[0]) == 1


def as_selection(node: Node) -> Node | None:
    """Return C(5, 2) as a number of choices, or None for any other node.

    Only a comparison with a number shows that this is meant; else it is a point C.
    """
    if node[:2] != ("mul", ("sym", "C")) or len(node) != 3:
        return None
    pair = node[2]
    return ("binom", *pair[3:]) if pair[0] == "seq" and len(pair) == 5 else None


def is_name(node: Node) -> bool:
    """Whether a left side only names what is equated.

    x, f(x), S_{ABC}, NO/BO, A:B, (p, q) and cos x do; 7, x^2 and a + 3z do not.
    """
    if node[0] in ("sym", "text", "apply", "call"):
        return True
    if node[0] in ("mul", "ratio", "seq", "unit"):
        return all(is_name(part) for part in node[1:] if isinstance(part, tuple))
    return node[0] == "pow" and node[2] == ("num", Fraction(-1)) and is_name(node[1])


def kind(node: Node) -> str:
    """Return the kind of a resolved node, which selects the rule."""
    return KINDS.get(node[0], "scalar")


def resolve(node: Node) -> Node:
    """Return the answer that is meant.

    A chain of equalities becomes its name and last value, plus-minus becomes two answers, and A(1, 2) becomes
    A = (1, 2).
    """
    if node[0] == "rel":
        return resolve_relation(node)
    if node[0] in ("list", "set"):
        head = node[:2] if node[0] == "list" else node[:1]
        parts: list[Node] = []
        excluded = None
        for part in map(resolve, node[len(head) :]):
            for item in part[2:] if part[0] == "list" else [part]:
                if item[0] == "condition" and item[1] == ("!=",):
                    excluded = item[2][0]
                elif excluded is not None and node[0] == "list" and kind(item) == "scalar":
                    item = ("condition", ("!=",), (excluded, item))  # x != 1, 2
                else:
                    excluded = None
                parts.append(item)
        return (*head, *_tuples(parts))
    if node[0] == "unit" and kind(node[1]) != "scalar":  # (3, 5) only
        return resolve(node[1])
    if node[0] == "text":
        return _MEANT.get(plain_words(node[1]), node)
    if node[0] == "mul" and len(node) == 3 and node[2][0] == "seq" and is_point_name(node[1]):
        return ("equation", node[1], node[2])
    if node[0] == "apply" and len(node) > 3 and is_point_name(("sym", node[1])):
        return ("equation", ("sym", node[1]), ("seq", "(", ")", *node[2:]))
    if contains(node, "pm"):
        return resolve(("list", ",", substitute_sign(node, 1), substitute_sign(node, -1)))
    return node


def _tuples(parts: list[Node]) -> list[Node]:
    """Return p = 5, q = 2, p = 7, q = 2 as (p, q) = (5, 2), (p, q) = (7, 2), and other parts unchanged."""
    if not all(part[0] == "equation" and is_name(part[1]) for part in parts):
        return parts
    names = [_without_index(part[1]) for part in parts]
    size = len(set(names))
    if not 1 < size < len(parts) or names != names[:size] * (len(parts) // size):
        return parts
    groups = [parts[start : start + size] for start in range(0, len(parts), size)]
    pair = ("seq", "(", ")")
    return [("equation", (*pair, *names[:size]), (*pair, *(part[2] for part in group))) for group in groups]


def resolve_relation(node: Node) -> Node:
    """Return the equation, condition or value that a chain of relations states."""
    operators, operands = list(node[1]), list(node[2])
    if "~" in operators:
        cut = operators.index("~")
        # x = 1/3 ~ 0.333 and sqrt(2) ~ 1.41 give the exact value, x ~ 11 gives 11
        if cut > 0 or not symbols(operands[cut]):
            operators, operands = operators[:cut], operands[: cut + 1]
        operators = ["=" if operator == "~" else operator for operator in operators]
        if not operators:
            return resolve(operands[0])
    if operators == ["mod"] and all(part[0] == "num" for part in operands) and operands[1][1] > 0:
        return ("num", operands[0][1] % operands[1][1])
    if operators == ["in"] and kind(operands[1]) != "scalar":
        return resolve(operands[1])
    if any(operator != "=" for operator in operators):
        return ("condition", tuple(operators), tuple(operands))

    name, value = operands[0], operands[-1]
    if not is_name(name) and len(operands) > 2:
        name = operands[-2]
    if not is_name(name) and is_name(value) and not symbols(name):
        name, value = value, name
    value = resolve(value)
    if value[0] == "list" and name[0] != "seq":
        return ("list", value[1], *(("equation", name, part) for part in value[2:]))
    return ("equation", name, value)


def has_names(node: Node) -> bool:
    """Whether some element of a collection is an equation."""
    return any(part[0] == "equation" for part in node[1:] if isinstance(part, tuple))


def _without_index(name: Node) -> Node:
    """Return x for x_1 and x_2, and any other name unchanged."""
    return ("sym", name[1].partition("_")[0]) if name[0] == "sym" else name


def names_differ(node: Node) -> bool:
    """Whether a collection equates different quantities.

    x = 2, y = 3 does; x_1 = 2, x_2 = 3 lists the values of one.
    """
    named = [
        part[1] for part in node if isinstance(part, tuple) and part[0] == "equation" and is_name(part[1])
    ]
    return len(set(map(_without_index, named))) > 1


def one_by_one(equation: Node) -> Node:
    """Return (x, y) = (2, 3) as x = 2, y = 3, and any other equation unchanged."""
    name, value = equation[1:]
    if name[0] == value[0] == "seq" and len(name) == len(value):
        return ("list", ",", *(("equation", x, y) for x, y in zip(name[3:], value[3:], strict=True)))
    return equation


def strip_names(node: Node) -> Node:
    """Return the collection with every name = value replaced by its value."""
    return tuple(
        part[2] if isinstance(part, tuple) and part[0] == "equation" and is_name(part[1]) else part
        for part in node
    )


def rename_argument(a: Node, b: Node) -> Node:
    """Return b with its function's argument named as in a: W(n) = n + 1 and W(x) = x + 1 are the same."""
    heads = (a[1], b[1])
    if not all(head[0] == "apply" and len(head) == 3 and head[2][0] == "sym" for head in heads):
        return b
    (_, function_a, argument_a), (_, function_b, argument_b) = heads
    if function_a != function_b or argument_a[1] in symbols(b[2]):  # f(t) = t + x is not f(x) = x + x
        return b
    return rename(b, argument_b, argument_a)


def unwrap(node: Node) -> tuple[Node, dict[str, str]]:
    """Return (the bare expression, its marks): "percent" and "deg" for the signs, "unit" with its text."""
    marks: dict[str, str] = {}
    while True:
        while node[0] in ("percent", "deg", "unit"):
            if node[0] == "unit" and UNITS.get(node[2].lower()) == "degree":
                marks["deg"] = ""
            else:
                marks.setdefault(node[0], node[2] if node[0] == "unit" else "")
            node = node[1]

        flat = product([node])
        words = [part for part in flat[1:] if is_word(part)] if flat[0] == "mul" else []
        if not 0 < len(words) < len(flat) - 1:
            break
        # USD 12, and 5 \frac{\text{m}}{\text{s}}
        marks.setdefault("unit", " ".join(part[1] if part[0] == "text" else part[1][1] for part in words))
        node = product([part for part in flat[1:] if part not in words])

    if node[0] == "mul" and sum(part[0] == "deg" for part in node[1:]) == 1:  # 3 sqrt(2)^\circ
        marks["deg"] = ""
        node = ("mul", *(part[1] if part[0] == "deg" else part for part in node[1:]))
    return node, marks


def is_word(node: Node) -> bool:
    """Whether a factor is a word, or one over a word."""
    return node[0] == "text" or (node[0] == "pow" and node[1][0] == "text")


def known_units(text: str) -> frozenset[str]:
    """Return the units that a text names, without powers: "square inches" and "in^2" are both "in"."""
    half = half_of_day(text)
    if half:
        return frozenset((half,))
    known = {UNITS[word] for word in _UNIT_WORDS.findall(text.lower()) if word in UNITS}
    return frozenset(name for unit in known for name in COMPOUND_UNITS.get(unit, unit).split()) - {"unit"}


def plain_words(text: str) -> str:
    """Return the words of a text in lower case, without punctuation."""
    return " ".join(re.findall(r"\w+", text.casefold()))


def as_rows(node: Node) -> tuple | None:
    """Return the rows of a matrix, or of a tuple as a column, or None for any other node."""
    if node[0] == "matrix":
        return node[1:]
    if node[0] == "seq" and all(part[0] != "seq" for part in node[3:]):
        return tuple((part,) for part in node[3:])
    return None


def half_of_day(unit: str) -> str | None:
    """Return "am" or "pm" if a unit's text names it, else None."""
    half = _HALF_OF_DAY.search(unit.lower())
    return half and f"{half[1]}m"


def times_of_day(node: Node, half: str | None) -> set[tuple]:
    """Return the readings of a time as (hour, minute); an empty set if it is not a time.

    8:34 p.m. is 20:34; it is 8:34, too, since the half may be missing on the other side.
    """
    if half and node[0] == "num":
        node = ("ratio", node, ("num", Fraction(0)))  # 8 p.m.
    if node[0] != "ratio" or [part[0] for part in node[1:]] != ["num", "num"]:
        return set()
    hour, minute = (part[1] for part in node[1:])
    if hour not in range(25) or minute not in range(60):
        return set()
    return {(hour, minute)} | ({(hour % 12 + (12 if half == "pm" else 0), minute)} if half else set())


def is_clock(node: Node) -> bool:
    """Whether a:b may be a time of day."""
    return any(minute >= 10 or minute == 0 for _, minute in times_of_day(node, None))  # 3:5 is not a time


def matrix_value(node: Node) -> Node | None:
    """Return the matrix that a sum of matrices or a multiple of one is, or None for any other node."""
    if node[0] in ("matrix", "seq"):
        rows = as_rows(node)
        return None if rows is None else ("matrix", *rows)
    if node[0] == "add":
        parts = [matrix_value(part) for part in node[1:]]
        if None in parts or len({tuple(map(len, part[1:])) for part in parts}) != 1:
            return None
        aligned = zip(*(part[1:] for part in parts), strict=True)  # the first rows of all, the second, ...
        rows = (tuple(("add", *entries) for entries in zip(*rows, strict=True)) for rows in aligned)
        return ("matrix", *rows)
    if node[0] == "mul":
        matrices = [part for part in node[1:] if contains(part, "matrix")]
        value = matrix_value(matrices[0]) if len(matrices) == 1 else None
        if value is None:
            return None
        factors = [part for part in node[1:] if part is not matrices[0]]
        return ("matrix", *(tuple(product([*factors, entry]) for entry in row) for row in value[1:]))
    return None

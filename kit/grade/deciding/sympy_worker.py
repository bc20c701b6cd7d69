"""Build sympy expressions from trees and decide whether two are equal, in a process of sympy_workers.py.

No text is ever evaluated. A worker has at most MEMORY bytes of address space (on Linux; macOS accepts the
limit but ignores it; Windows has none). Its limit on CPU time (Linux, macOS) is renewed for every question,
so that a worker whose parent was killed during a question ends too. Only `serve` imports sympy, after the
limits are set.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import threading
import time

from kit.grade.trees import Node, from_json, symbols
from kit.grade.vocabulary import names
from kit.machine import limit_process

MEMORY = 1 << 30  # sympy itself takes about 150 MiB of address space

_SYMPY_NAMES = {
    "arcsin": "asin", "arccos": "acos", "arctan": "atan", "abs": "Abs", "ceil": "ceiling",
    "ln": "log", "lg": "log", "max": "Max", "min": "Min",
}  # fmt: skip
_FUNCTIONS = names("sin cos tan cot sec csc sinh cosh tanh log exp floor gcd lcm") | _SYMPY_NAMES.keys()


def build(node: Node, sympy, assumptions: dict[str, dict]):
    """Return the sympy expression of a tree. Raises ValueError if the tree is not an expression."""
    op, parts = node[0], node[1:]
    if op in ("num", "dec"):
        return sympy.Rational(node[1].numerator, node[1].denominator)
    if op == "sym":
        return sympy.Symbol(node[1], **assumptions.get(node[1], {}))
    if op == "const":
        return {"pi": sympy.pi, "e": sympy.E, "i": sympy.I, "inf": sympy.oo}[node[1]]
    if op == "unit":
        return build(node[1], sympy, assumptions)
    if op == "big":
        name, variable, low, high, body = parts
        kind = {"sum": sympy.Sum, "prod": sympy.Product, "int": sympy.Integral}[name]
        bounds = [build(bound, sympy, assumptions) for bound in (low, high)]
        counter = sympy.Symbol(variable, **assumptions.get(variable, {}))
        return kind(build(body, sympy, assumptions), (counter, *bounds))
    if op in ("call", "apply"):
        return _function(op, parts[0], [build(part, sympy, assumptions) for part in parts[1:]], sympy)
    makers = {
        "add": sympy.Add,
        "mul": sympy.Mul,
        "pow": sympy.Pow,
        "root": lambda index, value: _root(index, value, sympy),
        "fact": sympy.factorial,
        "binom": sympy.binomial,
        "percent": lambda value: value / 100,
        "deg": lambda value: value * sympy.pi / 180,
        "ratio": lambda a, b: a / b,
    }
    if op not in makers:
        raise ValueError(f"a tree's {op!r} is no expression: compare it with judge.py")
    return makers[op](*(build(part, sympy, assumptions) for part in parts))


def counting(node) -> dict[str, dict]:
    """Return sympy's assumptions on the symbols of sums and products.

    Symbols in their bounds are positive integers, and the counting symbols integers.
    """
    found: dict[str, dict] = {}
    if not isinstance(node, tuple):
        return found
    for part in node:
        found |= counting(part)
    if node[:2] in (("big", "sum"), ("big", "prod")):
        found |= {name: {"integer": True, "positive": True} for name in symbols(node[3]) | symbols(node[4])}
        found[node[2]] = {"integer": True}
    return found


def _root(index, value, sympy):
    real = index.is_Integer and index % 2 == 1 and value.is_negative
    return -sympy.root(-value, index) if real else sympy.root(value, index)


def _function(op: str, name: str, arguments: list, sympy):
    if op == "apply":
        return sympy.Function(name)(*arguments)
    if name not in _FUNCTIONS:
        raise ValueError(f"a tree's function {name!r} is none of {', '.join(sorted(_FUNCTIONS))}")
    if name == "lg":
        arguments = [*arguments, sympy.Integer(10)]
    return getattr(sympy, _SYMPY_NAMES.get(name, name))(*arguments)


def decide(a: Node, b: Node, sympy) -> tuple[bool | None, str]:
    """Return (equal or None, reason): by simplification, by value without symbols, by sympy's own test."""
    assumptions = counting(a) | counting(b)
    difference = build(a, sympy, assumptions) - build(b, sympy, assumptions)
    if difference == 0:
        return True, "same expression"
    difference = difference.doit()
    if not difference.has(sympy.Integral, sympy.Sum, sympy.Product) and _is_far_from_zero(difference, sympy):
        return False, "value"  # simplifying it would take much longer
    simplified = sympy.simplify(difference)
    if simplified == 0:
        return True, "simplified"
    if _is_far_from_zero(simplified, sympy):
        return False, "value"
    answer = simplified.equals(0)
    return (None if answer is None else bool(answer)), "sympy could not decide"


def _is_far_from_zero(value, sympy) -> bool:
    if value.free_symbols:
        return False
    number = value.evalf(30)
    return bool(number.is_number and abs(number) > sympy.Rational(1, 10**12))


def _watch(parent: int) -> None:
    """End with the parent, even during a question.

    The limit on CPU time is for code that never yields to this thread.
    """
    while os.getppid() == parent:
        time.sleep(0.5)
    os._exit(1)


def serve() -> None:
    """Answer questions until standard input closes: one JSON question per line, one answer per line."""
    answers, sys.stdout = sys.stdout, sys.stderr  # what a library prints must not look like an answer
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the parent
    if os.name == "posix":
        threading.Thread(target=_watch, args=(os.getppid(),), daemon=True).start()
    limit_process("RLIMIT_AS", MEMORY)
    import sympy

    def send(message) -> None:
        answers.write(json.dumps(message) + "\n")
        answers.flush()

    send("ready")
    for line in sys.stdin:
        question = json.loads(line)
        limit_process("RLIMIT_CPU", int(time.process_time() + question["seconds"]) + 2)
        try:
            equal, reason = decide(from_json(question["a"]), from_json(question["b"]), sympy)
            send({"equal": equal, "reason": reason})
        except (MemoryError, RecursionError, OverflowError) as error:
            reason = f"the worker ran into its limits: {type(error).__name__}"
            send({"equal": None, "reason": reason, "exhausted": True})
        except Exception as error:  # sympy raises many kinds on odd input; the reason goes into the verdict
            send({"equal": None, "reason": f"sympy could not decide: {type(error).__name__}"})
